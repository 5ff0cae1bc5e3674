"""``cupy_msda::ms_deform_attn_fused``: the operator with its front end, and the differentiable function over it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import api, problem
from ..problem import FUSED_NAMES, PLAIN, Operands, Problem, Variant, Wanted, read_variant
from .compositions import front_end, gather_composition, without_padding
from .operators import AUTOCAST, SIXTEEN_BIT, differentiate_twice, library, read_form

FORWARD, BACKWARD = "cupy_msda::ms_deform_attn_fused", "cupy_msda::ms_deform_attn_fused_backward"
_INPUTS = (
    "Tensor value, Tensor spatial_shapes, Tensor? level_start_index, Tensor reference_points, "
    "Tensor sampling_offsets, Tensor? attention_logits, int im2col_step"
)
_VARIANT = (
    "bool? deterministic, int[]? num_points, str interpolation, str padding_mode, bool align_corners, "
    "Tensor? query_lengths"
)
torch.library.define(FORWARD, f"({_INPUTS}, {_VARIANT}) -> Tensor")
# Entries of the result that output_mask leaves out are empty tensors; so is that of logits in the offsets' array.
torch.library.define(
    BACKWARD,
    f"(Tensor grad_output, {_INPUTS}, {_VARIANT}, bool[4] output_mask) -> (Tensor, Tensor, Tensor, Tensor)",
)
_forward_operator = torch.ops.cupy_msda.ms_deform_attn_fused.default
_backward_operator = torch.ops.cupy_msda.ms_deform_attn_fused_backward.default


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
) -> Tensor:
    """:func:`cupy_msda.ms_deform_attn_fused` for torch tensors, with the gradients of all that are not metadata.

    Parameters, result and errors are those of :func:`cupy_msda.ms_deform_attn_fused`; the metadata may be tensors on
    any device, NumPy arrays or Python sequences. Under autocast, what has a dtype that does not go with value's is
    taken in float32. Works under ``torch.compile``; second derivatives go through a composition of torch's own
    functions. Not for ``torch.func`` and forward-mode gradients.
    """
    for name, tensor in (
        ("value", value),
        ("reference_points", reference_points),
        ("sampling_offsets", sampling_offsets),
        ("attention_logits", attention_logits),
    ):
        if not (isinstance(tensor, Tensor) or (tensor is None and name == "attention_logits")):
            raise TypeError(f"{name}: expected a torch.Tensor, got {type(tensor).__name__}")
    variant = Variant(num_points, interpolation, padding_mode, align_corners)
    if variant != PLAIN:
        variant = read_variant(variant, len(spatial_shapes))
    if interpolation == "nearest" and torch.is_grad_enabled():
        places = {"reference_points": reference_points}
        if attention_logits is not None:
            places["sampling_offsets"] = sampling_offsets
        for name, tensor in places.items():
            if tensor.requires_grad:
                raise ValueError(
                    f"{name}: expected a tensor that requires no gradient beside interpolation='nearest', which has "
                    "none for it: detach() it"
                )
    device = value.device if torch.compiler.is_compiling() else "cpu"
    shapes, starts, lengths = (
        part if part is None or isinstance(part, Tensor) else torch.as_tensor(part, device=device)
        for part in (spatial_shapes, level_start_index, query_lengths)
    )
    return _forward_operator(
        value, shapes, starts, reference_points, sampling_offsets, attention_logits, im2col_step, deterministic,
        *variant, lengths,
    )  # fmt: skip


def _read(arguments: Sequence[Any], grad_output: Tensor | None = None) -> tuple[Problem, Operands]:
    """The problem of the arguments that both operators have."""
    value, shapes, starts, references, offsets, logits, im2col_step, deterministic, *form = arguments
    variant, lengths = read_form(tuple(form), shapes)
    return problem.read(
        value, shapes, starts, offsets, logits, im2col_step, grad_output, names=FUSED_NAMES,
        reference_points=references, deterministic=deterministic, variant=variant, query_lengths=lengths,
    )  # fmt: skip


@torch.library.impl(FORWARD, ("cpu", "cuda"))
def _forward(*arguments: Any) -> Tensor:
    return api.forward(*_read(arguments))


@torch.library.impl(BACKWARD, ("cpu", "cuda"))
def _backward(grad_output: Tensor, *arguments_and_mask: Any) -> tuple[Tensor, ...]:
    *arguments, mask = arguments_and_mask
    # The mask and the results in the order of the arguments.
    wanted = Wanted(mask[0], mask[2], mask[3], mask[1])
    of_value, of_offsets, of_logits, of_references = api.backward(*_read(arguments, grad_output), wanted)
    grads = (of_value, of_references, of_offsets, of_logits)
    return tuple(
        grad_output.new_empty(0) if grad is None or not asked else grad for grad, asked in zip(grads, mask, strict=True)
    )


@torch.library.register_fake(FORWARD)
def _forward_fake(
    value: Tensor, shapes: Tensor, starts: Tensor | None, references: Tensor, offsets: Tensor, *_: Any
) -> Tensor:
    for name, tensor, symbols in (
        ("value", value, "[N, S, M, D]"),
        ("spatial_shapes", shapes, "[L, 2]"),
        ("reference_points", references, "[N, Q, L, 2]"),
    ):
        ndim = symbols.count(",") + 1
        torch._check(
            tensor.ndim == ndim, lambda n=name, s=symbols, t=tensor: f"{n}: expected shape {s}, got {list(t.shape)}"
        )
    N, _, M, D = value.shape
    return value.new_empty((N, offsets.shape[1], M * D))


@torch.library.register_fake(BACKWARD)
def _backward_fake(
    grad_output: Tensor,
    value: Tensor,
    shapes: Tensor,
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


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:6], inputs[12])
    ctx.settings = inputs[6:12]


def _differentiate(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
    *inputs, lengths = ctx.saved_tensors
    needs = ctx.needs_input_grad
    mask = [needs[0], needs[3], needs[4], needs[5]]
    grads = _backward_operator(grad_output, *inputs, *ctx.settings, lengths, mask)
    of_value, of_references, of_offsets, of_logits = (
        grad if asked else None for grad, asked in zip(grads, mask, strict=True)
    )
    return of_value, None, None, of_references, of_offsets, of_logits, *(None,) * 7


def _save_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs[:7], inputs[13])
    ctx.settings, ctx.mask = inputs[7:13], inputs[14]


def _differentiate_backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    """Second order, through a composition that torch differentiates twice."""
    grad_output, value, shapes, starts, references, offsets, logits, lengths = ctx.saved_tensors
    variant, lengths = read_form((*ctx.settings[2:], lengths), shapes)
    inputs = [t for t in (value, references, offsets, logits) if t is not None]

    def output_of(value: Tensor, *samples: Tensor) -> Tensor:
        locations, weights = front_end(shapes, *samples, variant=variant)
        return gather_composition(value, shapes, starts, *without_padding(locations, weights, lengths), variant)

    of_output, of_value, of_references, of_offsets, *of_logits = differentiate_twice(
        output_of, (grad_output, *inputs), grads[: len(inputs)], ctx.mask[: len(inputs)]
    )
    return of_output, of_value, None, None, of_references, of_offsets, *(of_logits or [None]), *(None,) * 8


torch.library.register_autograd(FORWARD, _differentiate, setup_context=_save)
torch.library.register_autograd(BACKWARD, _differentiate_backward, setup_context=_save_backward)


def _forward_autocast(
    value: Tensor,
    shapes: Tensor,
    starts: Tensor | None,
    references: Tensor,
    offsets: Tensor,
    logits: Tensor | None,
    *settings: Any,
) -> Tensor:
    wide = torch.float32 if value.dtype in SIXTEEN_BIT else value.dtype
    if references.dtype not in (value.dtype, wide):
        references = references.to(wide)
    if offsets.dtype not in (value.dtype, wide) or (logits is not None and logits.dtype is not offsets.dtype):
        offsets, logits = offsets.to(wide), None if logits is None else logits.to(wide)
    with torch._C._ExcludeDispatchKeyGuard(AUTOCAST):
        return _forward_operator(value, shapes, starts, references, offsets, logits, *settings)


for _key in ("AutocastCUDA", "AutocastCPU"):
    library.impl("ms_deform_attn_fused", _forward_autocast, _key)
