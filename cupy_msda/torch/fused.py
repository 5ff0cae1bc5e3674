"""The differentiable function with the front end, and which way each call goes: straight, dispatched, or decomposed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..call import PLAIN, Variant
from ..validate import read_variant
from . import fast_path
from .functional import (
    apply,
    compose,
    decomposes,
    dispatched,
    is_plain,
    observed,
    refuse_gradient,
    require_tensors,
    straight,
)
from .fused_operators import agreed_dtypes, dtypes_agree, forward_operator, transformed_forward
from .reference import front_end


def ms_deform_attn_fused(
    value: Tensor,
    spatial_shapes: Any,
    level_start_index: Any,
    reference_points: Tensor,
    sampling_offsets: Tensor,
    attention_logits: Tensor | None = None,
    im2col_step: int = 64,
    *,
    num_points: Sequence[int] | None = None,
    interpolation: str = "bilinear",
    padding_mode: str = "zeros",
    align_corners: bool = False,
    query_lengths: Any = None,
    deterministic: bool | None = None,
    validate: bool = False,
) -> Tensor:
    """:func:`cupy_msda.ms_deform_attn_fused` for torch tensors, with the gradients of all that are not metadata.

    Parameters, result and errors are those of :func:`cupy_msda.ms_deform_attn_fused`; the metadata may be tensors on
    any device, NumPy arrays or Python sequences. Under autocast, what has a dtype that does not go with value's is
    taken in float32. Works under ``torch.compile``, ``torch.export``, ``torch.func`` and ``torch.onnx.export``, where
    `validate` has no effect, because it reads data (nor has it beside `query_lengths`); second derivatives go through a
    composition of torch's own functions. `deterministic` holds for the gradients; None is what
    ``torch.use_deterministic_algorithms`` says when the backward runs.
    """
    variant = PLAIN
    if num_points is not None or interpolation != "bilinear" or padding_mode != "zeros" or align_corners is not False:
        variant = read_variant(Variant(num_points, interpolation, padding_mode, align_corners), len(spatial_shapes))
    elif not (torch.compiler.is_compiling() or validate or query_lengths is not None or observed()):
        tensors = (value, sampling_offsets, attention_logits, reference_points, spatial_shapes, level_start_index)
        if attention_logits is None:
            tensors = (*tensors[:2], *tensors[3:])
        for matches, recipe, step, fixed_order, differentiable in fast_path.recent_fused[attention_logits is None]:
            if step is im2col_step and fixed_order is deterministic and matches(*tensors):
                if differentiable and torch.is_grad_enabled():
                    call = (recipe, None, spatial_shapes, level_start_index, step, deterministic, False, PLAIN)
                    return apply(value, sampling_offsets, attention_logits, reference_points, call)
                output = recipe.forward(
                    value, spatial_shapes, level_start_index, sampling_offsets, attention_logits, reference_points
                )
                if output is not None:
                    return output
                break
    tensors = {
        "value": value,
        "reference_points": reference_points,
        "sampling_offsets": sampling_offsets,
        "attention_logits": attention_logits,
    }
    if attention_logits is None:
        del tensors["attention_logits"]
    require_tensors(**tensors)
    if interpolation == "nearest" and torch.is_grad_enabled():
        refuse_gradient("reference_points", reference_points)
        if attention_logits is not None:
            refuse_gradient("sampling_offsets", sampling_offsets)
    samples, metadata = (reference_points, sampling_offsets, attention_logits), (spatial_shapes, level_start_index)
    if query_lengths is None and is_plain(*tensors.values()) and dtypes_agree(value, *samples):
        inputs = (value, sampling_offsets, attention_logits, reference_points)
        return straight(*inputs, *metadata, im2col_step, deterministic, validate, variant)
    if decomposes():
        return _decompose(value, *metadata, *samples, variant, query_lengths)
    operators = (forward_operator, transformed_forward)
    return dispatched(operators, value, *metadata, samples, im2col_step, deterministic, variant, query_lengths)


def _decompose(
    value: Tensor,
    shapes: Any,
    starts: Any,
    references: Tensor,
    offsets: Tensor,
    logits: Tensor | None,
    variant: Variant,
    lengths: Any,
) -> Tensor:
    samples = agreed_dtypes(value, references, offsets, logits)
    dtype = torch.float64 if value.dtype == torch.float64 else torch.float32
    wide = (None if tensor is None else tensor.to(dtype) for tensor in samples)
    locations, weights = front_end(torch.as_tensor(shapes, device=value.device), *wide, variant=variant)
    # Locations are exact in the dtype of the arithmetic only, so value follows them there.
    return compose(value.to(dtype), shapes, starts, locations, weights, variant, lengths).to(value.dtype)
