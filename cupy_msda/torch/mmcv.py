"""mmcv, MMDetection, BEVFormer and others that call mmcv's operator, served by this one.

They call it in three ways: ``MultiScaleDeformableAttnFunction.apply`` on a GPU, ``multi_scale_deformable_attn_pytorch``
on a CPU, and the two functions of the compiled ``mmcv._ext`` from autograd functions of their own. :func:`patch` serves
all of them; :func:`install` does so where mmcv has no compiled operators.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from typing import Any

from torch import Tensor

from . import extension
from .dtypes import agreed_dtypes
from .functional import ms_deform_attn
from .integrations import search
from .integrations.model_patch import ModelPatch
from .integrations.module_name import ModuleName
from .integrations.without_operators import WithoutOperators

_COMPILED, _MODULE = "mmcv._ext", "mmcv.ops.multi_scale_deform_attn"
# One for all calls of install: mmcv.ops keeps the one that it was imported with.
_WITHOUT = WithoutOperators(_COMPILED, "pip install mmcv, compiled for this torch")


class MultiScaleDeformableAttnFunction:
    """mmcv's autograd function of this name, for code that imports it from here; :func:`patch` does not need it."""

    @staticmethod
    def apply(
        value: Tensor,
        value_spatial_shapes: Tensor,
        value_level_start_index: Tensor,
        sampling_locations: Tensor,
        attention_weights: Tensor,
        im2col_step: Any,
    ) -> Tensor:
        """:func:`ms_deform_attn`; mmcv hands `im2col_step` over as an int or as a tensor of one."""
        locations, weights = agreed_dtypes(value, sampling_locations, attention_weights)
        return ms_deform_attn(
            value, value_spatial_shapes, value_level_start_index, locations, weights, int(im2col_step)
        )


def multi_scale_deformable_attn_pytorch(
    value: Tensor, value_spatial_shapes: Tensor, sampling_locations: Tensor, attention_weights: Tensor
) -> Tensor:
    """:func:`ms_deform_attn` by the signature of mmcv's CPU path, for code that imports it from here."""
    locations, weights = agreed_dtypes(value, sampling_locations, attention_weights)
    return ms_deform_attn(value, value_spatial_shapes, None, locations, weights)


def patch() -> ModelPatch:
    """Serve all callers of mmcv's operator, in any order of imports.

    Tensors on devices without kernels (see :func:`cupy_msda.torch.ms_deform_attn`) are left to mmcv.

    Returns
    -------
    ModelPatch
        A context manager, as of :func:`cupy_msda.torch.patch`.

    Raises
    ------
    ModuleNotFoundError
        Without mmcv, or where mmcv has no compiled operators: :func:`install` is for that.
    """
    done = ModelPatch()
    try:
        _serve(done)
    except ModuleNotFoundError as error:
        done.undo()
        if error.name != _COMPILED:
            raise
        raise ModuleNotFoundError(
            f"{_COMPILED} is not there, as in mmcv-lite: call cupy_msda.torch.mmcv.install()", name=_COMPILED
        ) from error
    except BaseException:
        done.undo()
        raise
    return done


def install() -> ModelPatch:
    """Make ``mmcv.ops`` importable where mmcv has no compiled operators (mmcv-lite), and serve its attention.

    Models that use no other compiled operator run as they are. Any other operator raises when it is called.

    Returns
    -------
    ModelPatch
        A context manager, as of :func:`cupy_msda.torch.patch`. After ``undo()`` ``mmcv.ops`` stays imported.

    Raises
    ------
    ModuleNotFoundError
        Without mmcv.
    RuntimeError
        Where mmcv has compiled operators: :func:`patch` is for that.
    """
    importlib.import_module("mmcv")
    if sys.modules.get(_COMPILED) is _WITHOUT:
        return patch()
    if importlib.util.find_spec(_COMPILED) is not None:
        raise RuntimeError(f"{_COMPILED} is there: expected an mmcv without compiled operators; call patch() instead")
    name = ModuleName(_COMPILED, _WITHOUT)
    done = ModelPatch()
    try:
        name.install()
        _serve(done)
    except BaseException:
        done.undo()
        name.uninstall()
        raise
    done.at_undo(name.uninstall)
    return done


def _serve(done: ModelPatch) -> None:
    module = importlib.import_module(_MODULE)  # which imports the compiled operators
    if compiled := sys.modules.get(_COMPILED):
        done.serve_compiled(compiled, "ms_deform_attn_forward", _forward)
        done.serve_compiled(compiled, "ms_deform_attn_backward", _backward)
    done.serve(list(search.in_module(module)))


def _forward(
    value: Tensor,
    value_spatial_shapes: Tensor,
    value_level_start_index: Tensor,
    sampling_locations: Tensor,
    attention_weights: Tensor,
    im2col_step: Any,
) -> Any:
    """By the parameters of ``mmcv._ext``."""
    return extension.ms_deform_attn_forward(
        value, value_spatial_shapes, value_level_start_index, sampling_locations, attention_weights, int(im2col_step)
    )


def _backward(
    value: Tensor,
    value_spatial_shapes: Tensor,
    value_level_start_index: Tensor,
    sampling_locations: Tensor,
    attention_weights: Tensor,
    grad_output: Tensor,
    grad_value: Tensor,
    grad_sampling_loc: Tensor,
    grad_attn_weight: Tensor,
    im2col_step: Any,
) -> None:
    """By the parameters of ``mmcv._ext``, which writes into tensors of its caller."""
    grads = extension.ms_deform_attn_backward(
        value, value_spatial_shapes, value_level_start_index, sampling_locations, attention_weights, grad_output,
        int(im2col_step),
    )  # fmt: skip
    for given, grad in zip((grad_value, grad_sampling_loc, grad_attn_weight), grads, strict=True):
        given.copy_(grad)
