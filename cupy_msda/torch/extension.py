"""Replaces ``MultiScaleDeformableAttention``, the compiled extension of Deformable DETR and its successors.

DINO, Mask2Former and Grounding DINO ``import MultiScaleDeformableAttention as MSDA`` (or find it under another name)
and call its two functions from an autograd function of their own. After :func:`install` that import finds this module,
and nothing is compiled.
"""

from __future__ import annotations

import argparse
import functools
import sys
import warnings
from collections import Counter
from collections.abc import Callable
from types import ModuleType
from typing import Any, TypeVar

import torch
from torch import Tensor

from .. import api
from ..arrays.cupy_module import cuda_unavailable
from ..call import ALL, EXTENSION_NAMES, Arguments
from . import devices
from .dtypes import agreed_dtypes
from .integrations import import_stub, late_imports
from .integrations.module_name import ModuleName
from .integrations.patch import count_call
from .watchers import call_watched, watchers

__all__ = ["calls", "install", "ms_deform_attn_backward", "ms_deform_attn_forward", "uninstall"]

_DEFAULT = "MultiScaleDeformableAttention"
_installed: dict[str, ModuleName] = {}
_mended: list[Any] = []
#: Calls of each function that this module has answered.
calls: Counter[str] = Counter()
# Functions that have warned of an exception.
_warned: set[str] = set()
Operator = TypeVar("Operator", bound=Callable[..., Any])


def _counted(function: Operator) -> Operator:
    """Count calls, and warn of the first exception: many models catch all of them and take a slow path in silence."""

    @functools.wraps(function)
    def counted(*arguments: Any, **named: Any) -> Any:
        try:
            result = function(*arguments, **named)
        except Exception as error:
            if function.__name__ not in _warned:
                _warned.add(function.__name__)
                warnings.warn(
                    f"cupy_msda: {function.__name__} raised {type(error).__name__}: {error} (If the caller catches "
                    "this, it goes on with a slow path of its own.)",
                    stacklevel=2,
                )
            raise
        if count_call():
            calls[function.__name__] += 1
        return result

    return counted  # type: ignore[return-value]


@_counted
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


@_counted
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


def install(*names: str) -> ModuleType:
    """Make ``import`` find this module under the names of extensions, and return it.

    The package that a name lies in may be imported before or after that. It keeps what it has under the name until
    :func:`uninstall`. Modules whose import of an extension has failed get this one.

    Parameters
    ----------
    *names : str
        By default ``"MultiScaleDeformableAttention"``; ``"groundingdino._C"`` for Grounding DINO's own repository,
        ``"detrex._C"`` for detrex.

    Raises
    ------
    RuntimeError
        Where another module of that name is imported already: what holds it would go on using it.
    ValueError
        For what is no name of a module.

    Warns
    -----
    UserWarning
        Where torch has a GPU and CuPy cannot use it, which a caller that catches every exception would hide; and where
        a module holds another extension.
    """
    names = names or (_DEFAULT,)
    ours = sys.modules[__name__]
    for name in names:
        _check(name, ours)
    if torch.cuda.is_available() and torch.version.hip is None and (problem := cuda_unavailable()):
        warnings.warn(f"cupy_msda: tensors on a GPU will be refused: {problem}", stacklevel=2)
    for name in names:
        if name != __name__:
            _installed.setdefault(name, ModuleName(name, ours)).install()
    _mended.extend(late_imports.mend(ours))
    return ours


def uninstall(*names: str) -> None:
    """Undo :func:`install`, of the same names; what has imported the module keeps it."""
    for name in names or (_DEFAULT,):
        if name in _installed:
            _installed.pop(name).uninstall()
    if not _installed:
        late_imports.undo(_mended, sys.modules[__name__])
        _mended.clear()


def _check_name(name: str) -> None:
    if not isinstance(name, str) or not all(part.isidentifier() for part in name.split(".")):
        raise ValueError(f"name: expected the name of a module, such as 'groundingdino._C', got {name!r}")


def _check(name: str, ours: ModuleType) -> None:
    _check_name(name)
    found = sys.modules.get(name)
    if found is not None and found is not ours:
        raise RuntimeError(
            f"{name} is imported already, from {getattr(found, '__file__', 'elsewhere')}: call install before that"
        )


def main(arguments: list[str] | None = None) -> int:
    """``python -m cupy_msda.torch.extension NAME...``: the stand-in for programs that nobody edits."""
    parser = argparse.ArgumentParser(
        prog="python -m cupy_msda.torch.extension",
        description="Write an import stub into this environment: every Python that starts in it, and its subprocesses, "
        "finds cupy_msda under these names.",
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of an extension, such as {_DEFAULT}")
    parser.add_argument("--remove", action="store_true", help="remove these names again, or all of them")
    options = parser.parse_args(arguments)
    before = import_stub.installed(import_stub.folder())
    if not options.names and not options.remove:
        print(f"installed: {', '.join(before) or 'no name'}")
        return 0
    try:
        for name in options.names:
            _check_name(name)
    except ValueError as error:
        parser.error(str(error))
    if options.remove:
        names = tuple(name for name in before if options.names and name not in options.names)
    else:
        names = tuple(dict.fromkeys([*before, *options.names]))
    try:
        files = import_stub.write(import_stub.folder(), names)
    except OSError as error:
        parser.error(f"cannot write into {import_stub.folder()}: {error.strerror}; use a virtual environment")
    print(f"installed: {', '.join(names)} ({files[0]})" if names else "installed: no name")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
