"""The two ways that mmcv and MMDetection call multi-scale deformable attention, by their signatures.

``MultiScaleDeformableAttnFunction.apply`` is what mmcv's layer calls on a GPU,
``multi_scale_deformable_attn_pytorch`` on a CPU; :func:`patch` puts both into ``mmcv.ops``.
"""

from __future__ import annotations

import importlib
from typing import Any

from torch import Tensor

from .dtypes import agreed_dtypes
from .functional import ms_deform_attn
from .integrations.patch import Patch, standing_in


class MultiScaleDeformableAttnFunction:
    """Stands in for mmcv's autograd function of this name."""

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
    """:func:`ms_deform_attn` by the signature of mmcv's CPU path; each level follows the one before it."""
    locations, weights = agreed_dtypes(value, sampling_locations, attention_weights)
    return ms_deform_attn(value, value_spatial_shapes, None, locations, weights)


def patch() -> Patch:
    """Put both into ``mmcv.ops.multi_scale_deform_attn``; a context manager, whose ``undo`` restores mmcv's own.

    Tensors on devices without kernels (see :func:`cupy_msda.torch.ms_deform_attn`) are left to mmcv's own functions.

    Raises
    ------
    ModuleNotFoundError
        Without mmcv.
    """
    module = importlib.import_module("mmcv.ops.multi_scale_deform_attn")
    theirs = module.MultiScaleDeformableAttnFunction

    class Served(MultiScaleDeformableAttnFunction):
        apply = staticmethod(standing_in(MultiScaleDeformableAttnFunction.apply, theirs.apply))

    served_function = standing_in(multi_scale_deformable_attn_pytorch, module.multi_scale_deformable_attn_pytorch)
    done = Patch()
    for ours, served in (
        (MultiScaleDeformableAttnFunction, Served),
        (multi_scale_deformable_attn_pytorch, served_function),
    ):
        done.replace(module, ours.__name__, served)
        done.served.append(f"{module.__name__}.{ours.__name__}")
    return done
