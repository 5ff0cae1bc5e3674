"""``cupy_msda::ms_deform_attn_fused`` and its backward: the operator with its front end, in torch's dispatcher."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..call import Wanted
from . import fast_path, operators
from .operators import (
    AUTOCAST,
    check_ndim,
    differentiate_twice,
    library,
    read_form,
    transformable,
    under_transform,
)
from .reference import front_end, gather_composition, without_padding

FORWARD, BACKWARD = "cupy_msda::ms_deform_attn_fused", "cupy_msda::ms_deform_attn_fused_backward"
_INPUTS = (
    "Tensor value, Tensor? spatial_shapes, Tensor? level_start_index, Tensor reference_points, "
    "Tensor sampling_offsets, Tensor? attention_logits, int im2col_step"
)
_VARIANT = (
    "bool? deterministic, int[]? num_points, str interpolation, str padding_mode, bool align_corners, "
    "Tensor? query_lengths, SymInt[]? level_sizes"
)
torch.library.define(FORWARD, f"({_INPUTS}, {_VARIANT}) -> Tensor")
# Entries of the result that output_mask leaves out are empty tensors; so is that of logits in the offsets' array.
torch.library.define(
    BACKWARD,
    f"(Tensor grad_output, {_INPUTS}, {_VARIANT}, bool[4] output_mask) -> (Tensor, Tensor, Tensor, Tensor)",
)
forward_operator = torch.ops.cupy_msda.ms_deform_attn_fused.default
backward_operator = torch.ops.cupy_msda.ms_deform_attn_fused_backward.default


@torch.library.impl(FORWARD, ("cpu", "cuda"))
def _forward(
    value: Tensor,
    shapes: Tensor | None,
    starts: Tensor | None,
    references: Tensor,
    offsets: Tensor,
    logits: Tensor | None,
    im2col_step: int,
    deterministic: bool | None,
    *form: Any,
) -> Tensor:
    shapes, variant, lengths = read_form(shapes, form)
    return fast_path.forward(
        value, shapes, starts, offsets, logits, im2col_step, deterministic, variant, lengths, references
    )


@torch.library.impl(BACKWARD, ("cpu", "cuda"))
def _backward(
    grad_output: Tensor,
    value: Tensor,
    shapes: Tensor | None,
    starts: Tensor | None,
    references: Tensor,
    offsets: Tensor,
    logits: Tensor | None,
    im2col_step: int,
    deterministic: bool | None,
    *form_and_mask: Any,
) -> tuple[Tensor, ...]:
    *form, mask = form_and_mask
    # The mask and the results in the order of the arguments.
    wanted = Wanted(mask[0], mask[2], mask[3], mask[1])
    shapes, *variant_and_lengths = read_form(shapes, form)
    of_value, of_offsets, of_logits, of_references = fast_path.backward(
        grad_output, value, shapes, starts, offsets, logits, im2col_step, deterministic, *variant_and_lengths, wanted,
        references,
    )  # fmt: skip
    grads = (of_value, of_references, of_offsets, of_logits)
    return tuple(
        grad_output.new_empty(0) if grad is None or not asked else grad for grad, asked in zip(grads, mask, strict=True)
    )


@torch.library.register_fake(FORWARD)
def _forward_fake(
    value: Tensor, shapes: Tensor | None, starts: Tensor | None, references: Tensor, offsets: Tensor, *_: Any
) -> Tensor:
    for name, tensor, symbols in (
        ("value", value, "[N, S, M, D]"),
        ("spatial_shapes", shapes, "[L, 2]"),
        ("reference_points", references, "[N, Q, L, 2]"),
    ):
        check_ndim(name, tensor, symbols)
    N, _, M, D = value.shape
    return value.new_empty((N, offsets.shape[1], M * D))


@torch.library.register_fake(BACKWARD)
def _backward_fake(
    grad_output: Tensor,
    value: Tensor,
    shapes: Tensor | None,
    starts: Tensor | None,
    references: Tensor,
    offsets: Tensor,
    logits: Tensor | None,
    *others: Any,
) -> tuple[Tensor, ...]:
    inputs = zip((value, references, offsets, logits), others[-1], strict=True)
    return tuple(
        tensor.new_empty(tensor.shape) if asked and tensor is not None else value.new_empty(0)
        for tensor, asked in inputs
    )


def _save_forward(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:6], inputs[12])
    ctx.settings, ctx.level_sizes = inputs[6:12], inputs[13]


def _differentiate_forward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
    *inputs, lengths = ctx.saved_tensors
    needs = ctx.needs_input_grad
    mask = [needs[0], needs[3], needs[4], needs[5]]
    operator = _transformed_backward if under_transform() else backward_operator
    grads = operator(grad_output, *inputs, *ctx.settings, lengths, ctx.level_sizes, mask)
    of_value, of_references, of_offsets, of_logits = (
        grad if asked else None for grad, asked in zip(grads, mask, strict=True)
    )
    return of_value, None, None, of_references, of_offsets, of_logits, *(None,) * 8


def _save_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs[:7], inputs[13])
    ctx.settings, ctx.level_sizes, ctx.mask = inputs[7:13], *inputs[14:]


def _differentiate_backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    """Second order, through a composition that torch differentiates twice."""
    grad_output, value, shapes, starts, references, offsets, logits, lengths = ctx.saved_tensors
    shapes, variant, lengths = read_form(shapes, (*ctx.settings[2:], lengths, ctx.level_sizes))
    shapes = torch.as_tensor(shapes, device=value.device)
    inputs = [t for t in (value, references, offsets, logits) if t is not None]

    def output_of(value: Tensor, *samples: Tensor) -> Tensor:
        locations, weights = front_end(shapes, *samples, variant=variant)
        return gather_composition(value, shapes, starts, *without_padding(locations, weights, lengths), variant)

    of_output, of_value, of_references, of_offsets, *of_logits = differentiate_twice(
        output_of, (grad_output, *inputs), grads[: len(inputs)], ctx.mask[: len(inputs)]
    )
    return of_output, of_value, None, None, of_references, of_offsets, *(of_logits or [None]), *(None,) * 9


torch.library.register_autograd(FORWARD, _differentiate_forward, setup_context=_save_forward)
torch.library.register_autograd(BACKWARD, _differentiate_backward, setup_context=_save_backward)
transformed_forward = transformable(forward_operator, FORWARD, _save_forward, _differentiate_forward, metadata=(1, 2))
_transformed_backward = transformable(
    backward_operator, BACKWARD, _save_backward, _differentiate_backward, metadata=(2, 3)
)


def dtypes_agree(value: Tensor, references: Tensor, offsets: Tensor, logits: Tensor | None) -> bool:
    """Whether the contract allows these dtypes together."""
    samples = (offsets,) if logits is None else (offsets, logits)
    return operators.dtypes_agree(value, references) and operators.dtypes_agree(value, *samples)


def agreed_dtypes(
    value: Tensor, references: Tensor, offsets: Tensor, logits: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """References, offsets and logits in dtypes that go with value's, those that do not in the widest that does."""
    (references,) = operators.agreed_dtypes(value, references)
    if logits is None:
        return references, *operators.agreed_dtypes(value, offsets), None
    return references, *operators.agreed_dtypes(value, offsets, logits)


def _forward_autocast(
    value: Tensor,
    shapes: Tensor | None,
    starts: Tensor | None,
    references: Tensor,
    offsets: Tensor,
    logits: Tensor | None,
    *settings: Any,
) -> Tensor:
    samples = agreed_dtypes(value, references, offsets, logits)
    with torch._C._ExcludeDispatchKeyGuard(AUTOCAST):
        return forward_operator(value, shapes, starts, *samples, *settings)


for _key in ("AutocastCUDA", "AutocastCPU"):
    library.impl("ms_deform_attn_fused", _forward_autocast, _key)
