"""Gradients: the autograd function of eager calls, and those of the registered operators, of first and second order.

The registered operators have rules of vmap here too, and forms for the transforms of torch.func.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..call import Arguments, Wanted
from . import compat, fast_path
from .operators import (
    ATTENTION,
    FUSED_ATTENTION,
    Operator,
    arguments_of,
    registered_backward,
    with_mask,
    without_mask,
)
from .reference import differentiable_attention


class _Attention(torch.autograd.Function):
    """An eager call with gradients: what the operators' registered autograd does, without the dispatcher.

    A known layout comes as `repeat`: its launch plan, shapes and starts. Any other call comes as `arguments`.
    """

    @staticmethod
    def forward(
        ctx: Any,
        value: Tensor,
        locations: Tensor,
        weights: Tensor | None,
        references: Tensor | None,
        repeat: tuple[fast_path.LaunchPlan, Any, Any] | None,
        arguments: Arguments | None,
    ) -> Tensor:
        ctx.save_for_backward(value, locations, weights, references)
        if repeat is not None:
            ctx.repeat = repeat
            plan, shapes, starts = repeat
            output = plan.forward(value, shapes, starts, locations, weights, references)
            if output is not None:
                return output
            arguments = plan.arguments(value, shapes, starts, locations, weights, references)
        assert arguments is not None
        output, found = fast_path.forward(arguments)
        ctx.repeat = (found, arguments.spatial_shapes, arguments.level_start_index)
        if found is None:
            # Without the tensors, whose memory autograd frees with the saved ones.
            ctx.arguments = dataclasses.replace(
                arguments, value=None, locations=None, weights=None, reference_points=None, validate=False
            )
        return output

    @staticmethod
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]  (there is one output)
        ctx: Any, grad_output: Tensor
    ) -> tuple[Tensor | None, ...]:
        value, locations, weights, references = ctx.saved_tensors
        plan, shapes, starts = ctx.repeat
        wanted = Wanted(*ctx.needs_input_grad[:4])
        registered = torch.is_grad_enabled() or type(grad_output) is not Tensor or compat.dispatch_modes()
        grads = None
        if plan is not None and not registered:
            grads = plan.backward(wanted)(grad_output, value, shapes, starts, locations, weights, references)
        if grads is None:
            if plan is not None:
                arguments = plan.arguments(value, shapes, starts, locations, weights, references)
            else:
                arguments = dataclasses.replace(
                    ctx.arguments, value=value, locations=locations, weights=weights, reference_points=references
                )
            grads = (registered_backward if registered else fast_path.backward)(arguments, grad_output, wanted)
        return (
            grads[0] if wanted.value else None,
            grads[1] if wanted.locations else None,
            grads[2] if wanted.weights else None,
            grads[3] if wanted.references else None,
            None,
            None,
        )


#: ``apply_attention(value, locations, weights, references, repeat, arguments)``, outside the transforms of torch.func.
apply_attention = compat.direct_apply(_Attention)


def _save_inputs(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    """Of an operator, or of its backward."""
    ctx.save_for_backward(*(part if isinstance(part, Tensor) else None for part in inputs))
    ctx.other_inputs = [None if isinstance(part, Tensor) else part for part in inputs]


def _saved_inputs(ctx: Any) -> tuple[Any, ...]:
    pairs = zip(ctx.saved_tensors, ctx.other_inputs, strict=True)
    return tuple(other if saved is None else saved for saved, other in pairs)


def _differentiate_forward(operator: Operator, ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
    """The gradients of a forward's inputs."""
    inputs = _saved_inputs(ctx)
    mask = [ctx.needs_input_grad[place] for place in operator.tensors.values()]
    backward = _TRANSFORMED_BACKWARD[operator.name] if compat.under_transform() else operator.backward
    grads = backward(grad_output, *with_mask(operator, inputs, mask))
    found: list[Tensor | None] = [None] * len(inputs)
    for place, grad, wanted in zip(operator.tensors.values(), grads, mask, strict=True):
        found[place] = grad if wanted else None
    return tuple(found)


def _differentiate_backward(operator: Operator, ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    """The gradients of a backward's inputs, by a reference implementation that torch differentiates twice.

    It is rarely needed, so its speed is secondary. It holds the value vectors of the four neighbours of every sample,
    4 * N * Q * M * L * P * D numbers, several times.
    """
    grad_output, *saved = _saved_inputs(ctx)
    inputs, mask = without_mask(operator, saved)
    arguments = arguments_of(operator, inputs)
    present = [name for name in operator.tensors if getattr(arguments, name) is not None]

    def output_of(*tensors: Tensor) -> Tensor:
        given: dict[str, Any] = dict(zip(present, tensors, strict=True))
        return differentiable_attention(dataclasses.replace(arguments, **given))

    sources = (grad_output, *(getattr(arguments, name) for name in present))
    known = [grad if wanted else None for grad, wanted in zip(grads, mask, strict=True)][: len(present)]
    of_output, *second = _differentiate_twice(output_of, sources, known)
    # One for grad_output, and one for the mask.
    found: list[Tensor | None] = [of_output, *(None for _ in inputs), None]
    for name, grad in zip(present, second, strict=True):
        found[1 + operator.tensors[name]] = grad
    return tuple(found)


def _differentiate_twice(
    output_of: Callable[..., Tensor], sources: Sequence[Tensor], grads: Sequence[Tensor | None]
) -> list[Tensor]:
    """Gradients of `sources`, the output's gradient and the inputs of `output_of`.

    `grads` are those of the inputs' gradients; None counts for nothing.
    """
    dtype = torch.float64 if sources[1].dtype == torch.float64 else torch.float32

    def gradients(grad_output: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
        pull_back: Callable[..., Any] = torch.func.vjp(output_of, *inputs)[1]
        return pull_back(grad_output)

    pull_back: Callable[..., Any]
    first, pull_back = torch.func.vjp(gradients, *(tensor.to(dtype) for tensor in sources))[:2]
    incoming = [torch.zeros_like(of) if grad is None else grad.to(dtype) for grad, of in zip(grads, first, strict=True)]
    return [grad.to(source.dtype) for grad, source in zip(pull_back(tuple(incoming)), sources, strict=True)]


def _vmap_rule(operator: Callable[..., Any], metadata: tuple[int, int]) -> Callable[..., Any]:
    """Makes the mapped dimension part of N; inputs at the places `metadata` must be the same for all."""

    def rule(info: Any, in_dims: tuple[int | None, ...], *inputs: Any) -> tuple[Any, Any]:
        size, folded = info.batch_size, []
        for place, (dim, argument) in enumerate(zip(in_dims, inputs, strict=True)):
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


def _register(
    operator: Callable[..., Any], name: str, differentiate: Callable[..., Any], metadata: tuple[int, int]
) -> Callable[..., Any]:
    """Registers the gradients and the rule of vmap of `operator`, and returns its form for torch.func.

    The transforms of torch.func do not go through registered gradients but through those of an autograd function.
    `metadata` are the places of the inputs that are the same for all samples of vmap.
    """
    rule = _vmap_rule(operator, metadata)
    torch.library.register_autograd(name, differentiate, setup_context=_save_inputs)
    if hasattr(torch.library, "register_vmap"):  # torch >= 2.5
        torch.library.register_vmap(name, rule)

    class Transformed(torch.autograd.Function):
        @staticmethod
        def forward(*inputs: Any) -> Any:
            return operator(*inputs)

        setup_context = staticmethod(_save_inputs)
        backward = staticmethod(differentiate)
        vmap = staticmethod(rule)

    return Transformed.apply


#: The forwards for torch.func, by the names of the operators.
TRANSFORMED = {
    one.name: _register(one.forward, one.name, partial(_differentiate_forward, one), metadata=(1, 2))
    for one in (ATTENTION, FUSED_ATTENTION)
}
_TRANSFORMED_BACKWARD = {
    one.name: _register(one.backward, f"{one.name}_backward", partial(_differentiate_backward, one), metadata=(2, 3))
    for one in (ATTENTION, FUSED_ATTENTION)
}
