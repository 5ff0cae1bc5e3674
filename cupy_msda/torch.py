"""The torch operator: differentiable multi-scale deformable attention, on the CPU and on CUDA."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import api, problem

__all__ = ["MSDeformAttnFunction", "ms_deform_attn"]


class MSDeformAttnFunction(torch.autograd.Function):
    """Drop-in for the autograd function of Deformable DETR.

    ``MSDeformAttnFunction.apply(value, spatial_shapes, level_start_index, sampling_locations, attention_weights,
    im2col_step)``; shapes and dtypes are those of :func:`cupy_msda.ms_deform_attn`.
    """

    @staticmethod
    def forward(
        ctx: Any,
        value: Tensor,
        spatial_shapes: Any,
        level_start_index: Any,
        sampling_locations: Tensor,
        attention_weights: Tensor,
        im2col_step: int = 64,
        deterministic: bool | None = None,
        validate: bool = False,
    ) -> Tensor:
        ctx.levels = (spatial_shapes, level_start_index)
        ctx.im2col_step, ctx.deterministic = im2col_step, deterministic
        ctx.save_for_backward(value, sampling_locations, attention_weights)
        return api.ms_deform_attn(
            value,
            spatial_shapes,
            level_start_index,
            sampling_locations,
            attention_weights,
            im2col_step,
            deterministic=deterministic,
            validate=validate,
        )

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        value, locations, weights = ctx.saved_tensors
        found, operands = problem.read(
            value, *ctx.levels, locations, weights, ctx.im2col_step, grad_output, deterministic=ctx.deterministic
        )
        needs = ctx.needs_input_grad
        grads = api.backward(found, operands, grad_value=needs[0], grad_samples=needs[3] or needs[4])
        return grads[0], None, None, grads[1], grads[2], None, None, None


def ms_deform_attn(
    value: Tensor,
    spatial_shapes: Any,
    level_start_index: Any,
    sampling_locations: Tensor,
    attention_weights: Tensor,
    im2col_step: int = 64,
    *,
    deterministic: bool | None = None,
    validate: bool = False,
) -> Tensor:
    """:func:`cupy_msda.ms_deform_attn` for torch tensors, with gradients of value, locations and weights.

    Parameters, result and errors are those of :func:`cupy_msda.ms_deform_attn`; the metadata may be tensors on any
    device, NumPy arrays or Python sequences.
    """
    for name, tensor in (
        ("value", value),
        ("sampling_locations", sampling_locations),
        ("attention_weights", attention_weights),
    ):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name}: expected a torch.Tensor, got {type(tensor).__name__}")
    return MSDeformAttnFunction.apply(
        value,
        spatial_shapes,
        level_start_index,
        sampling_locations,
        attention_weights,
        im2col_step,
        deterministic,
        validate,
    )
