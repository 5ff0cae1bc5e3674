"""The differentiable function with the front end, and which way each call goes: straight, dispatched, or decomposed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..problem import PLAIN, Variant, read_variant
from . import quick
from .compositions import front_end
from .front_operators import agreed_dtypes, dtypes_agree, forward_operator, transformed_forward
from .functional import apply, compose, decomposes, is_plain, level_sizes, metadata_tensor, observed, refuse_tangents
from .operators import under_transform


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
    elif not (torch.compiler.is_compiling() or validate or query_lengths is not None or decomposes() or observed()):
        tensors = (value, sampling_offsets, attention_logits, reference_points, spatial_shapes, level_start_index)
        if attention_logits is None:
            tensors = (*tensors[:2], *tensors[3:])
        for matches, recipe, step, fixed_order, differentiable in quick.recent_fused[attention_logits is None]:
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
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name}: expected a torch.Tensor, got {type(tensor).__name__}")
    if interpolation == "nearest" and torch.is_grad_enabled():
        _refuse_gradients(reference_points, None if attention_logits is None else sampling_offsets)
    samples = (reference_points, sampling_offsets, attention_logits)
    metadata = (spatial_shapes, level_start_index)
    if query_lengths is None and is_plain(*tensors.values()) and dtypes_agree(value, *samples):
        settings = (*metadata, im2col_step, deterministic)
        inputs = (value, sampling_offsets, attention_logits)
        key = quick.key_of(*inputs, *settings, variant, reference_points)
        recipe = None if validate else quick.recall(key, *inputs, *settings, variant, reference_points)
        if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors.values()):
            return apply(*inputs, reference_points, (recipe, key, *settings, validate, variant))
        settings = (im2col_step, deterministic, validate, variant, reference_points)
        return quick.follow(recipe, key, value, *metadata, *inputs[1:], *settings)
    if decomposes():
        return _decompose(value, *metadata, *samples, variant, query_lengths)
    operator = forward_operator
    if not torch.compiler.is_compiling():
        refuse_tangents(value, *samples)
        if under_transform():
            operator = transformed_forward
    shapes, sizes = level_sizes(spatial_shapes, value)
    return operator(
        value, shapes, metadata_tensor(level_start_index, value), *samples, im2col_step, deterministic, *variant,
        metadata_tensor(query_lengths, value), sizes,
    )  # fmt: skip


def _refuse_gradients(references: Tensor, offsets: Tensor | None) -> None:
    """What interpolation='nearest' has no gradient of; None where offsets and logits are one array."""
    for name, tensor in (("reference_points", references), ("sampling_offsets", offsets)):
        if tensor is not None and tensor.requires_grad:
            raise ValueError(
                f"{name}: expected a tensor that requires no gradient beside interpolation='nearest', which has "
                "none for it: detach() it"
            )


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
