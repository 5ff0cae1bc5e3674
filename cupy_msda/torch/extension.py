"""Replaces ``MultiScaleDeformableAttention``, the compiled extension of Deformable DETR and its successors.

DINO, Mask2Former and Grounding DINO ``import MultiScaleDeformableAttention as MSDA`` (or find it under another name)
and call its two functions from an autograd function of their own. After :func:`install` that import finds this module,
and nothing is compiled.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from .. import api
from ..call import ALL, EXTENSION_NAMES, Arguments
from . import devices
from .dtypes import agreed_dtypes
from .integrations.module_name import ModuleName
from .watchers import call_watched, watchers

__all__ = ["install", "ms_deform_attn_backward", "ms_deform_attn_forward", "uninstall"]

_installed: dict[str, ModuleName] = {}


def ms_deform_attn_forward(
    value: Any,
    spatial_shapes: Any,
    level_start_index: Any,
    sampling_loc: Any,
    attn_weight: Any,
    im2col_step: int,
) -> Any:
    """:func:`cupy_msda.ms_deform_attn_forward` by the rule of autocast.

    Locations and weights whose dtypes do not go with value's are taken in float32, or in value's dtype where that is
    not 16-bit: under autocast a linear layer makes value and weights 16-bit, and locations may stay float32.
    """
    locations, weights = _agreed(value, sampling_loc, attn_weight)
    arguments = _arguments(value, spatial_shapes, level_start_index, locations, weights, im2col_step)
    return call_watched(_forward, arguments) if watchers else _forward(arguments)


def _forward(arguments: Arguments) -> Any:
    if not devices.serves(arguments.value):
        with torch.no_grad():
            return devices.forward(arguments)
    return api.ms_deform_attn_forward(
        arguments.value, arguments.spatial_shapes, arguments.level_start_index, arguments.locations, arguments.weights,
        arguments.im2col_step,
    )  # fmt: skip


def ms_deform_attn_backward(
    value: Any,
    spatial_shapes: Any,
    level_start_index: Any,
    sampling_loc: Any,
    attn_weight: Any,
    grad_output: Any,
    im2col_step: int,
) -> tuple[Any, Any, Any]:
    """:func:`cupy_msda.ms_deform_attn_backward` by the rule of autocast, each gradient in the dtype of its input."""
    given = (sampling_loc, attn_weight)
    locations, weights = _agreed(value, *given)
    others: list[Any]
    if devices.serves(value):
        of_value, *others = api.ms_deform_attn_backward(
            value, spatial_shapes, level_start_index, locations, weights, grad_output, im2col_step
        )
    else:
        arguments = _arguments(value, spatial_shapes, level_start_index, locations, weights, im2col_step)
        with torch.no_grad():
            of_value, *others = devices.backward(arguments, grad_output, ALL)[:3]
    if isinstance(of_value, Tensor):
        others = [grad.to(tensor.dtype) for grad, tensor in zip(others, given, strict=True)]
    of_locations, of_weights = others
    return of_value, of_locations, of_weights


def _arguments(value: Any, shapes: Any, starts: Any, locations: Any, weights: Any, im2col_step: int) -> Arguments:
    return Arguments(value, shapes, starts, None, locations, weights, im2col_step, names=EXTENSION_NAMES)


def _agreed(value: Any, *samples: Any) -> tuple[Any, ...]:
    if all(isinstance(array, Tensor) for array in (value, *samples)):
        return agreed_dtypes(value, *samples)
    return samples


def install(name: str = "MultiScaleDeformableAttention") -> ModuleType:
    """Make ``import`` find this module under the name of the extension, and return it.

    The package that the name lies in may be imported before or after that. It keeps what it has under this name until
    :func:`uninstall`.

    Parameters
    ----------
    name : str
        ``"groundingdino._C"`` for Grounding DINO's own repository.

    Raises
    ------
    RuntimeError
        Where another module of that name is imported already: what holds it would go on using it.
    ValueError
        For what is no name of a module.
    """
    if not isinstance(name, str) or not all(part.isidentifier() for part in name.split(".")):
        raise ValueError(f"name: expected the name of a module, such as 'groundingdino._C', got {name!r}")
    ours = sys.modules[__name__]
    found = sys.modules.get(name)
    if found is not None and found is not ours:
        raise RuntimeError(
            f"{name} is imported already, from {getattr(found, '__file__', 'elsewhere')}: call install before that"
        )
    if name != __name__:
        _installed.setdefault(name, ModuleName(name, ours)).install()
    return ours


def uninstall(name: str = "MultiScaleDeformableAttention") -> None:
    """Undo :func:`install`; what has imported the module keeps it."""
    if name in _installed:
        _installed.pop(name).uninstall()
