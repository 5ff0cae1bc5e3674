"""``cupy_msda::ms_deform_attn`` and its backward as operators of torch's dispatcher.

What a built-in operator has: a schema, kernels for the CPU and CUDA, shapes without data (fake tensors: torch.compile,
torch.export), gradients of first and second order, rules for autocast and for vmap.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..call import PLAIN, Variant, Wanted
from ..validate import read_variant
from . import fast_path
from .reference import gather_composition, without_padding

FORWARD, BACKWARD = "cupy_msda::ms_deform_attn", "cupy_msda::ms_deform_attn_backward"
_INPUTS = (
    "Tensor value, Tensor? spatial_shapes, Tensor? level_start_index, Tensor sampling_locations, "
    "Tensor attention_weights, int im2col_step"
)
_VARIANT = (
    'int[]? num_points=None, str interpolation="bilinear", str padding_mode="zeros", bool align_corners=False, '
    "Tensor? query_lengths=None, SymInt[]? level_sizes=None"
)
# What the variant is followed by: lengths, and H, W of every level in the place of spatial_shapes, for compiled code.
torch.library.define(FORWARD, f"({_INPUTS}=64, bool? deterministic=None, {_VARIANT}) -> Tensor")
# Entries of the result that output_mask leaves out are empty tensors.
torch.library.define(
    BACKWARD,
    f"(Tensor grad_output, {_INPUTS}, bool? deterministic, bool[3] output_mask, {_VARIANT}) "
    "-> (Tensor, Tensor, Tensor)",
)
forward_operator = torch.ops.cupy_msda.ms_deform_attn.default
backward_operator = torch.ops.cupy_msda.ms_deform_attn_backward.default


@torch.library.impl(FORWARD, ("cpu", "cuda"))
def _forward(value: Tensor, shapes: Tensor | None, *others: Any) -> Tensor:
    """`others` are those of ``fast_path.forward`` and then the form's, without defaults at the end."""
    shapes, variant, lengths = read_form(shapes, others[5:])
    return fast_path.forward(value, shapes, *others[:5], variant=variant, lengths=lengths)


def read_form(shapes: Tensor | None, form: Sequence[Any]) -> tuple[Any, Variant, Tensor | None]:
    """Level sizes, the variant, and the lengths of queries, out of an operator's shapes and what comes last in it."""
    variant, lengths, sizes = form[:4], form[4] if len(form) > 4 else None, form[5] if len(form) > 5 else None
    if sizes is not None:
        shapes = [[h, w] for h, w in zip(sizes[::2], sizes[1::2], strict=True)]
    return shapes, read_variant(Variant(*variant), len(shapes)) if variant else PLAIN, lengths


@torch.library.impl(BACKWARD, ("cpu", "cuda"))
def _backward(
    grad_output: Tensor,
    value: Tensor,
    shapes: Tensor | None,
    starts: Tensor | None,
    locations: Tensor,
    weights: Tensor,
    im2col_step: int,
    deterministic: bool | None,
    output_mask: list[bool],
    *form: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    shapes, *variant_and_lengths = read_form(shapes, form)
    inputs, wanted = (starts, locations, weights), Wanted(*output_mask)
    grads = fast_path.backward(
        grad_output, value, shapes, *inputs, im2col_step, deterministic, *variant_and_lengths, wanted
    )
    return tuple(grad if wanted else value.new_empty(0) for grad, wanted in zip(grads[:3], output_mask, strict=True))


@torch.library.register_fake(FORWARD)
def _forward_fake(
    value: Tensor,
    shapes: Tensor | None,
    starts: Tensor | None,
    locations: Tensor,
    weights: Tensor,
    im2col_step: int = 64,
    deterministic: bool | None = None,
    num_points: list[int] | None = None,
    *others: Any,
) -> Tensor:
    points = "L, P" if num_points is None else "sum(num_points)"
    for name, tensor, symbols in (
        ("value", value, "[N, S, M, D]"),
        ("spatial_shapes", shapes, "[L, 2]"),
        ("sampling_locations", locations, f"[N, Q, M, {points}, 2]"),
        ("attention_weights", weights, f"[N, Q, M, {points}]"),
    ):
        check_ndim(name, tensor, symbols)
    N, _, M, D = value.shape
    Q = locations.shape[1]
    L = len(others[4]) // 2 if shapes is None else shapes.shape[0]
    samples = (L, locations.shape[4]) if num_points is None else (sum(num_points),)
    for name, tensor, symbols, expected in (
        ("sampling_locations", locations, f"[N, Q, M, {points}, 2]", (N, Q, M, *samples, 2)),
        ("attention_weights", weights, f"[N, Q, M, {points}]", (N, Q, M, *samples)),
    ):
        for have, want in zip(tensor.shape, expected, strict=True):
            torch._check(
                have == want,
                lambda n=name, s=symbols, e=expected, t=tensor: f"{n}: expected shape {s} = {e}, got {list(t.shape)}",
            )
    return value.new_empty((N, Q, M * D))


def check_ndim(name: str, tensor: Tensor | None, symbols: str) -> None:
    """An error that names the tensor, where there is one, unless it has the dimensions that `symbols` list."""
    torch._check(
        tensor is None or tensor.ndim == symbols.count(",") + 1,
        lambda: f"{name}: expected shape {symbols}, got {list(tensor.shape)}",
    )


@torch.library.register_fake(BACKWARD)
def _backward_fake(
    grad_output: Tensor,
    value: Tensor,
    shapes: Tensor | None,
    starts: Tensor | None,
    locations: Tensor,
    weights: Tensor,
    im2col_step: int,
    deterministic: bool | None,
    output_mask: list[bool],
    *_: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    return tuple(
        tensor.new_empty(tensor.shape) if wanted else value.new_empty(0)
        for tensor, wanted in zip((value, locations, weights), output_mask, strict=True)
    )


def save_forward(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    value, shapes, starts, locations, weights, ctx.im2col_step, ctx.deterministic, *ctx.form = inputs
    ctx.save_for_backward(value, shapes, starts, locations, weights)


def differentiate_forward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
    needs = ctx.needs_input_grad
    mask = [needs[0], needs[3], needs[4]]
    operator = _transformed_backward if under_transform() else backward_operator
    grads = operator(grad_output, *ctx.saved_tensors, ctx.im2col_step, ctx.deterministic, mask, *ctx.form)
    of_value, of_locations, of_weights = (grad if wanted else None for grad, wanted in zip(grads, mask, strict=True))
    return of_value, None, None, of_locations, of_weights, None, None, *(None for _ in ctx.form)


def _save_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    grad_output, value, shapes, starts, locations, weights, _, _, ctx.mask, *ctx.form = inputs
    ctx.save_for_backward(grad_output, value, shapes, starts, locations, weights)


def _differentiate_backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    """Second order, through a composition that torch differentiates twice: rarely needed, so its speed is secondary.

    It holds the four rows of every sample, 4 * N * Q * M * L * P * D numbers, several times over.
    """
    grad_output, value, shapes, starts, locations, weights = ctx.saved_tensors
    shapes, variant, lengths = read_form(shapes, ctx.form)
    shapes = torch.as_tensor(shapes, device=value.device)

    def output_of(value: Tensor, *samples: Tensor) -> Tensor:
        return gather_composition(value, shapes, starts, *without_padding(*samples, lengths), variant)

    of_output, of_value, of_locations, of_weights = differentiate_twice(
        output_of, (grad_output, value, locations, weights), grads, ctx.mask
    )
    none = (None for _ in ctx.form)
    return of_output, of_value, None, None, of_locations, of_weights, None, None, None, *none


def differentiate_twice(
    output_of: Callable[..., Tensor], sources: Sequence[Tensor], grads: Sequence[Tensor | None], mask: Sequence[bool]
) -> list[Tensor]:
    """Gradients of `sources`, the output's gradient and the inputs of `output_of`, from `grads`, those of the inputs'
    gradients. What `mask` leaves out counts for nothing.
    """
    dtype = torch.float64 if sources[1].dtype == torch.float64 else torch.float32

    def gradients(grad_output: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
        _, pull_back = torch.func.vjp(output_of, *inputs)
        return pull_back(grad_output)

    first, pull_back = torch.func.vjp(gradients, *(tensor.to(dtype) for tensor in sources))
    incoming = [
        grad.to(dtype) if wanted and grad is not None else torch.zeros_like(of)
        for grad, of, wanted in zip(grads, first, mask, strict=True)
    ]
    return [grad.to(source.dtype) for grad, source in zip(pull_back(tuple(incoming)), sources, strict=True)]


torch.library.register_autograd(FORWARD, differentiate_forward, setup_context=save_forward)
torch.library.register_autograd(BACKWARD, _differentiate_backward, setup_context=_save_backward)


def dtypes_agree(value: Tensor, *together: Tensor) -> bool:
    """Whether the contract allows value's dtype beside those of `together`, which have to be the same."""
    dtype = together[0].dtype
    return all(tensor.dtype is dtype for tensor in together) and (
        dtype is value.dtype or (dtype is torch.float32 and value.dtype in SIXTEEN_BIT)
    )


def agreed_dtypes(value: Tensor, *together: Tensor) -> tuple[Tensor, ...]:
    """`together`, such as locations and weights, in dtypes that go with value's: their own, else the widest that does.

    The rule of autocast. It lowers nothing and never touches value, so it costs no copy in the usual case, where a
    linear layer made value 16-bit, and softmax and the reference points made the others float32.
    """
    if dtypes_agree(value, *together):
        return together
    dtype = torch.float32 if value.dtype in SIXTEEN_BIT else value.dtype
    return tuple(tensor.to(dtype) for tensor in together)


SIXTEEN_BIT = (torch.float16, torch.bfloat16)
AUTOCAST = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCUDA) | torch._C.DispatchKeySet(
    torch._C.DispatchKey.AutocastCPU
)


def _forward_autocast(
    value: Tensor, shapes: Tensor | None, starts: Tensor | None, locations: Tensor, weights: Tensor, *settings: Any
) -> Tensor:
    locations, weights = agreed_dtypes(value, locations, weights)
    with torch._C._ExcludeDispatchKeyGuard(AUTOCAST):
        return forward_operator(value, shapes, starts, locations, weights, *settings)


library = torch.library.Library("cupy_msda", "IMPL")
for _key in ("AutocastCUDA", "AutocastCPU"):
    library.impl("ms_deform_attn", _forward_autocast, _key)


def _vmap_rule(operator: Callable[..., Any], metadata: tuple[int, int]) -> Callable[..., Any]:
    """Makes the mapped dimension part of N; arguments at the places `metadata` must be the same for all."""

    def rule(info: Any, in_dims: tuple[int | None, ...], *arguments: Any) -> tuple[Any, Any]:
        size, folded = info.batch_size, []
        for place, (dim, argument) in enumerate(zip(in_dims, arguments, strict=True)):
            if place in metadata and dim is not None:
                raise ValueError(
                    "spatial_shapes, level_start_index: expected the same for every sample of vmap, got a dimension to "
                    f"map over, in_dims = {dim}"
                )
            if isinstance(argument, Tensor) and place not in metadata:
                mapped = argument.expand(size, *argument.shape) if dim is None else argument.movedim(dim, 0)
                argument = mapped.flatten(0, 1)
            folded.append(argument)
        results = operator(*folded)
        if isinstance(results, Tensor):
            return _unfold(results, size), 0
        return tuple(_unfold(result, size) for result in results), (0,) * len(results)

    return rule


def _unfold(tensor: Tensor, size: int) -> Tensor:
    return tensor.view(size, tensor.shape[0] // size, *tensor.shape[1:])


def under_transform() -> bool:
    """Whether this runs inside vmap, grad or another transform of torch.func."""
    return torch._C._functorch.peek_interpreter_stack() is not None


def transformable(
    operator: Callable[..., Any],
    name: str,
    save: Callable[..., None],
    differentiate: Callable[..., Any],
    metadata: tuple[int, int],
) -> Callable[..., Any]:
    """`operator` for torch.func, whose transforms do not go through registered gradients but through a function's.

    Its rule for vmap is that of the operator `name`, too; `metadata` are the places of the arguments that are the same
    for all.
    """
    rule = _vmap_rule(operator, metadata)
    if hasattr(torch.library, "register_vmap"):  # torch >= 2.5
        torch.library.register_vmap(name, rule)

    class Transformed(torch.autograd.Function):
        @staticmethod
        def forward(*arguments: Any) -> Any:
            return operator(*arguments)

        setup_context = staticmethod(save)
        backward = staticmethod(differentiate)
        vmap = staticmethod(rule)

    return Transformed.apply


transformed_forward = transformable(forward_operator, FORWARD, save_forward, differentiate_forward, metadata=(1, 2))
_transformed_backward = transformable(
    backward_operator, BACKWARD, _save_backward, _differentiate_backward, metadata=(2, 3)
)
