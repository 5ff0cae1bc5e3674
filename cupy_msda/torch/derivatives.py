"""Derivatives of the registered operators and their backwards: reverse mode, forward mode and vmap.

They are rules of torch's dispatcher, so every transformation of torch finds them: autograd, dual numbers, torch.func,
torch.compile and compositions of these.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from ..call import DIFFERENTIABLE, Arguments
from . import compat
from .autograd import saveable
from .operators import (
    ATTENTION,
    FUSED_ATTENTION,
    Operator,
    arguments_of,
    check_shapes,
    inputs_of,
    operator_of,
    with_mask,
    without_mask,
)
from .reference import differentiable_attention, differentiable_gradients, nan_of_wrong_metadata
from .samples import in_float


def _save_inputs(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    """Of an operator, or of its backward."""
    tensors = [part if isinstance(part, Tensor) else None for part in inputs]
    ctx.save_for_backward(*map(saveable, tensors))
    # Of metadata on the host a copy: autograd does not see every change, such as one through an array of NumPy.
    ctx.other_inputs = [
        part.clone() if _is_known_metadata(tensor) else None if tensor is not None else part
        for part, tensor in zip(inputs, tensors, strict=True)
    ]
    ctx.set_materialize_grads(False)


def _saved_inputs(ctx: Any) -> tuple[Any, ...]:
    pairs = zip(ctx.saved_tensors, ctx.other_inputs, strict=True)
    return tuple(saved if other is None else other for saved, other in pairs)


def _is_known_metadata(tensor: Tensor | None) -> bool:
    if tensor is None or tensor.device.type != "cpu" or tensor.is_floating_point():
        return False
    return not torch.compiler.is_compiling() and compat.all_known([tensor])


def _differentiate_forward(operator: Operator, ctx: Any, grad_output: Tensor | None) -> tuple[Tensor | None, ...]:
    """The gradients of a forward's inputs."""
    inputs = _saved_inputs(ctx)
    found: list[Tensor | None] = [None] * len(inputs)
    if grad_output is None:
        return tuple(found)
    mask = [ctx.needs_input_grad[place] for place in operator.tensors.values()]
    grads = operator.backward(grad_output, *with_mask(operator, inputs, mask))
    for place, grad, wanted in zip(operator.tensors.values(), grads, mask, strict=True):
        found[place] = grad if wanted else None
    return tuple(found)


def _differentiate_backward(operator: Operator, ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    """The gradients of a backward's inputs. They are rarely needed, so their speed is secondary."""
    inputs = _saved_inputs(ctx)
    found: list[Tensor | None] = [None] * len(inputs)
    incoming = tuple(grad for grad in grads if grad is not None)
    if not incoming:
        return tuple(found)
    places = _differentiable_places(operator, inputs)

    def gradients(*tensors: Tensor) -> tuple[Tensor, ...]:
        given = list(inputs)
        for place, tensor in zip(places, tensors, strict=True):
            given[place] = tensor
        results = _reference_backward(operator, *given)
        return tuple(result for result, grad in zip(results, grads, strict=True) if grad is not None)

    sources = [inputs[place] for place in places]
    pull_back: Callable[..., Any] = torch.func.vjp(gradients, *sources)[1]
    for place, grad in zip(places, pull_back(incoming), strict=True):
        found[place] = grad
    return tuple(found)


def _differentiable_places(operator: Operator, inputs: Sequence[Any]) -> list[int]:
    """Those of grad_output and the differentiable inputs that are there, among the inputs of a backward."""
    forward_inputs, _ = without_mask(operator, inputs[1:])
    present = [place for place in operator.tensors.values() if forward_inputs[place] is not None]
    return [0, *(1 + place for place in present)]


def _reference_forward(operator: Operator, *inputs: Any) -> Tensor:
    """A forward in torch's own functions."""
    arguments = arguments_of(operator, inputs)
    check_shapes(arguments)
    return differentiable_attention(_checked(in_float(arguments))).to(arguments.value.dtype)


def _reference_backward(operator: Operator, grad_output: Tensor, *inputs: Any) -> tuple[Tensor, ...]:
    """A backward in torch's own functions."""
    inputs, mask = without_mask(operator, inputs)
    arguments = arguments_of(operator, inputs)
    widened = _checked(in_float(arguments))
    gradients = differentiable_gradients(widened, grad_output.to(widened.value.dtype))
    grads = dict(zip(DIFFERENTIABLE, gradients, strict=True))
    return tuple(
        grad_output.new_empty(0) if grad is None or not wanted else grad.to(inputs[place].dtype)
        for (name, place), wanted in zip(operator.tensors.items(), mask, strict=True)
        for grad in (grads[name],)
    )


def _checked(arguments: Arguments) -> Arguments:
    """`arguments`, with NaN in all tensors that are differentiable if the metadata are wrong.

    Compiled code drops an output that nothing uses, and what checks with it. The derivatives by an input that is a
    product with NaN are NaN, also those by a sample that is out of bounds.
    """
    factor = nan_of_wrong_metadata(arguments)
    tensors = {name: getattr(arguments, name) for name in DIFFERENTIABLE}
    return dataclasses.replace(
        arguments, **{name: tensor * factor for name, tensor in tensors.items() if tensor is not None}
    )


def _has_tangents(inputs: Sequence[Any]) -> bool:
    """Whether an input is a dual number of forward-mode differentiation."""
    tensors = (part for part in inputs if isinstance(part, Tensor) and part.is_floating_point())
    return any(forward_ad.unpack_dual(tensor, level=0).tangent is not None for tensor in tensors)


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
        value = next(place for place, argument in enumerate(inputs) if isinstance(argument, Tensor))
        N = inputs[value].movedim(in_dims[value] or 0, 0).shape[in_dims[value] is not None]
        results = operator(*folded)
        if isinstance(results, Tensor):
            return _unfold(results, size, N), 0
        return tuple(_unfold(result, size, N) for result in results), (0,) * len(results)

    return rule


def _unfold(tensor: Tensor, size: int, N: int) -> Tensor:
    """Takes N apart again. A gradient that nothing asks for is empty, without dimensions for N."""
    return tensor.view(size, *((0,) if tensor.ndim == 1 else (N, *tensor.shape[1:])))


def _register(
    name: str,
    operator: Callable[..., Any],
    differentiate: Callable[..., Any],
    reference: Callable[..., Any],
    metadata: tuple[int, int],
) -> bool:
    """Registers gradients, forward mode and the rule of vmap of `operator`; whether torch has the means for all.

    ``torch.library.register_autograd`` has no forward mode and refuses the transforms of torch.func, so it serves only
    where a release of torch lacks what the rest needs. `metadata` are the places of the inputs that are the same for
    all samples of vmap.
    """
    apply = compat.differentiable_kernel(operator, _save_inputs, differentiate)
    if apply is None:
        torch.library.register_autograd(name, differentiate, setup_context=_save_inputs)
        return False

    def kernel(*inputs: Any) -> Any:
        return (reference if _has_tangents(inputs) else apply)(*inputs)

    _library.impl(name.partition("::")[2], kernel, "Autograd")
    if hasattr(torch.library, "register_vmap"):  # torch >= 2.5
        torch.library.register_vmap(name, _vmap_rule(operator, metadata))
    return True


_library = torch.library.Library("cupy_msda", "IMPL")
_transformable = True
for _one in (ATTENTION, FUSED_ATTENTION):
    _transformable &= _register(
        _one.name, _one.forward, partial(_differentiate_forward, _one), partial(_reference_forward, _one), (1, 2)
    )
    _transformable &= _register(
        f"{_one.name}_backward", _one.backward, partial(_differentiate_backward, _one),
        partial(_reference_backward, _one), (2, 3),
    )  # fmt: skip


def registered_forward(arguments: Arguments) -> Tensor:
    """The output by the registered operator, which every transformation of torch sees.

    Where a release of torch lacks the means for its rules, transformations see the composition instead.
    """
    operator, inputs = operator_of(arguments), inputs_of(arguments)
    if not (_transformable or torch.compiler.is_compiling()) and (compat.under_transform() or _has_tangents(inputs)):
        return _reference_forward(operator, *inputs)
    return operator.forward(*inputs)
