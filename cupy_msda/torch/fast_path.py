"""Plain CUDA tensors, again: a call whose layout was seen before costs its outputs, its launches and little more.

The first call of a layout (shapes, dtypes, devices, host metadata; everything contiguous) goes the general way: its
tensors are handed over by DLPack and validated, its kernel is planned and compiled. It leaves a :class:`Recipe`.
Whatever validation looks at is part of the recipe's key, so a later call with that key needs only the addresses. Those
come from ``Tensor.data_ptr``: reading five ``DLTensor`` through DLPack's C functions took 10 us a call, ``data_ptr``
takes 0.5 (on the host of an H100; benchmarks/NOTES.md). What has no key goes the general way every time.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from .. import api, arrays, validate
from ..call import FUSED_NAMES, OPERATOR_NAMES, PLAIN, ArgumentNames, Arguments, Call, Problem, Variant, Wanted
from ..cuda import plan
from ..cuda import run as cuda

# What the vectors of the kernels want, and what torch's allocator gives.
_ALIGNMENT = 16
# A model comes back to few layouts; one that never does must not fill the memory.
_MOST_RECIPES = 4096

# Of value, locations, weights and reference points. With those, offsets stand in for locations and logits for weights,
# here and throughout, and weights are None where both are one array.
Gradients = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]


class Recipe:
    """How to repeat the calls of one layout. The repeating functions are closures: their variables are at hand faster
    than attributes, and in the backward, which runs in a thread of the autograd engine, every look-up is a cold one.

    Attributes
    ----------
    forward : callable
        ``forward(value, shapes, starts, locations, weights, references=None)`` -> output, or None where an address is
        not aligned.
    levels : tuple of int
        The words of metadata that came from the host; empty where it is on the device.
    """

    __slots__ = ("backwards", "deterministic", "forward", "levels", "problem", "strides")

    def __init__(self, found: Problem, value: Tensor, deterministic: bool | None) -> None:
        self.problem, self.deterministic = found, deterministic
        self.strides = None if value.is_contiguous() else value.stride()
        self.levels = () if found.levels is None else cuda.levels_by_value(found.levels)
        self.backwards: dict[tuple[Wanted, bool], Callable[..., Gradients | None]] = {}
        # One element, seen as an output: `empty_like` of it is 1 us cheaper than `new_empty`.
        self.forward = self._forward(value.detach().new_empty(()).expand(found.output_shape))

    def backward(self, wanted: Wanted) -> Callable[..., Gradients | None]:
        """``backward(grad_output, value, shapes, starts, locations, weights, references=None)`` -> the gradients that
        are wanted, or None where a saved tensor came back with strides, or an address is not aligned.
        """
        fixed_order = self.deterministic
        if fixed_order is None:  # torch's own switch, as it stands when the backward runs
            fixed_order = _wants_determinism()
        key = (wanted, fixed_order)
        repeat = self.backwards.get(key)
        if repeat is None:
            repeat = self.backwards[key] = self._backward(*key)
        return repeat

    def _forward(self, like_output: Tensor) -> Callable[..., Tensor | None]:
        levels, sizes, device = self.levels, plan.size_words(self.problem), self.problem.device[1]
        packed, to_logits = _packing(self.problem)
        get_device, set_device = _device_functions()
        empty_like, stream_of = torch.empty_like, torch._C._cuda_getCurrentRawStream
        with cuda.on_device(device):
            run = cuda.prepare_forward(self.problem, _ALIGNMENT, stream_of(device)).run

        def forward(
            value: Tensor, shapes: Any, starts: Any, locations: Tensor, weights: Any, references: Tensor | None = None
        ) -> Tensor | None:
            at_value, at_locations = value.data_ptr(), locations.data_ptr()
            at_weights = 0 if packed else weights.data_ptr()
            at_references = 0 if references is None else references.data_ptr()
            if (at_value | at_locations | at_weights | at_references) % _ALIGNMENT:
                return None
            if packed:
                at_weights = at_locations + to_logits
            output = empty_like(like_output)
            metadata = levels or (shapes.data_ptr(), starts.data_ptr())
            # Also gives a thread that has never used CUDA its context, which a launch by the driver does not.
            before = get_device()
            set_device(device)
            try:
                run(
                    stream_of(device), at_value, *metadata, at_locations, at_weights, at_references, 0,
                    output.data_ptr(), *sizes,
                )  # fmt: skip
            finally:
                if before != device:
                    set_device(before)
            return output

        return forward

    def _backward(self, wanted: Wanted, fixed_order: bool) -> Callable[..., Gradients | None]:
        levels, device = self.levels, self.problem.device[1]
        found = replace(self.problem, deterministic=fixed_order)
        packed, to_logits = _packing(found)
        wanted = found.computed(wanted)
        get_device, set_device = _device_functions()
        empty_like, empty, stream_of = torch.empty_like, torch.empty, torch._C._cuda_getCurrentRawStream
        with cuda.on_device(device):
            steps = cuda.prepare_backward(found, _ALIGNMENT, stream_of(device), wanted)
        run, need = steps.run, steps.workspace
        strides, contiguous = self.strides, torch.contiguous_format
        grad_value, grad_locations, grad_weights, grad_references = wanted

        def backward(
            grad_output: Tensor,
            value: Tensor,
            shapes: Any,
            starts: Any,
            locations: Tensor,
            weights: Any,
            references: Tensor | None = None,
        ) -> Gradients | None:
            if not (locations.is_contiguous() and (packed or weights.is_contiguous())):
                return None
            if not (references is None or references.is_contiguous()):
                return None
            if not value.is_contiguous() if strides is None else value.stride() != strides:
                return None
            grad_output = grad_output.contiguous()
            at_value, at_locations, at_grad_output = value.data_ptr(), locations.data_ptr(), grad_output.data_ptr()
            at_weights = 0 if packed else weights.data_ptr()
            at_references = 0 if references is None else references.data_ptr()
            if (at_value | at_locations | at_weights | at_references | at_grad_output) % _ALIGNMENT:
                return None
            of_value = of_locations = of_weights = of_references = None
            at_grad_value = at_grad_locations = at_grad_weights = at_grad_references = at_workspace = 0
            if grad_value:
                of_value = empty_like(value, memory_format=contiguous)
                at_grad_value = of_value.data_ptr()
            if need:
                workspace = empty(need, dtype=torch.uint8, device=value.device)
                at_workspace = workspace.data_ptr()
            if grad_locations:
                of_locations = empty_like(locations)
                at_grad_locations = of_locations.data_ptr()
            if packed:
                at_weights = at_locations + to_logits
                at_grad_weights = at_grad_locations + to_logits if grad_weights else 0
            elif grad_weights:
                of_weights = empty_like(weights)
                at_grad_weights = of_weights.data_ptr()
            if grad_references:
                of_references = empty_like(references)
                at_grad_references = of_references.data_ptr()
            metadata = levels or (shapes.data_ptr(), starts.data_ptr())
            before = get_device()
            set_device(device)
            try:
                run(
                    stream_of(device), metadata, at_value, at_locations, at_weights, at_references, 0, at_grad_output,
                    at_grad_value, at_grad_locations, at_grad_weights, at_grad_references, at_workspace,
                )  # fmt: skip
            finally:
                if before != device:
                    set_device(before)
            return of_value, of_locations, of_weights, of_references

        return backward


def _packing(found: Problem) -> tuple[bool, int]:
    """Whether offsets and logits are one array, and the bytes in it before the first logits."""
    packed = found.fused is not None and found.fused.packed
    return packed, 2 * found.K * arrays.item_size(found.location_dtype) if packed else 0


_wants_determinism = torch.are_deterministic_algorithms_enabled


def _device_functions() -> tuple[Callable[[], int], Callable[[int], None]]:
    runtime = arrays.require_cupy("a CUDA tensor").cuda.runtime
    return runtime.getDevice, runtime.setDevice


# All recipes by key, and what was called last, newest first: (matches, recipe, im2col_step, deterministic, whether an
# input requires a gradient). `matches` is one C call of torch's compiler, which compares types, dispatch keys, dtypes,
# devices, sizes and strides: a third of the time of a key, which decides wherever nothing here matches. Calls with a
# front end are apart, by whether they are packed: `matches` takes other tensors there.
recipes: dict[tuple[Any, ...] | None, Recipe] = {}
recent: tuple[tuple[Any, ...], ...] = ()
recent_fused: dict[bool, tuple[tuple[Any, ...], ...]] = {False: (), True: ()}
# The layers of a model come back to about as many layouts.
_MOST_RECENT = 4


def recall(
    key: tuple[Any, ...] | None,
    value: Tensor,
    locations: Tensor,
    weights: Tensor | None,
    shapes: Any,
    starts: Any,
    im2col_step: int,
    deterministic: bool | None,
    variant: Variant,
    references: Tensor | None = None,
) -> Recipe | None:
    """The recipe of `key` if a call has left one; it is among the recent ones from then on."""
    global recent
    recipe = recipes.get(key)
    if recipe is not None and not recipe.levels and _TensorGuards is not None and variant == PLAIN:
        given = (value, locations, weights, references, shapes, starts)
        tensors = [tensor for tensor in given if tensor is not None]
        guards = _TensorGuards(*tensors, dynamic_dims_sizes=None, dynamic_dims_strides=None)
        differentiable = any(tensor.requires_grad for tensor in tensors)
        entry = (guards.check, recipe, im2col_step, deterministic, differentiable)
        if references is None:
            recent = (entry, *recent[: _MOST_RECENT - 1])
        else:
            packed = weights is None
            recent_fused[packed] = (entry, *recent_fused[packed][: _MOST_RECENT - 1])
    return recipe


_TensorGuards = getattr(getattr(torch._C._dynamo, "guards", None), "TensorGuards", None)


def key_of(
    value: Tensor,
    locations: Tensor,
    weights: Tensor | None,
    shapes: Any,
    starts: Any,
    im2col_step: Any,
    deterministic: Any,
    variant: Variant,
    references: Tensor | None = None,
) -> tuple[Any, ...] | None:
    """What a recipe for this call depends on; None where there can be none."""
    others = [(t.shape, t.dtype, t.get_device()) if t is not None else None for t in (weights, references)]
    if not (locations.is_contiguous() and all(t is None or t.is_contiguous() for t in (weights, references))):
        return None
    if not (type(im2col_step) is int and (deterministic is None or type(deterministic) is bool)):
        return None
    if type(shapes) is Tensor and type(starts) is Tensor:
        if not (shapes.is_contiguous() and starts.is_contiguous()):
            return None
        metadata = (
            shapes.shape, shapes.dtype, shapes.get_device(), starts.shape, starts.dtype, starts.get_device()
        )  # fmt: skip
    else:
        metadata = _host_metadata(shapes, starts)
        if metadata is None:
            return None
    return (
        value.shape, value.dtype, value.get_device(), None if value.is_contiguous() else value.stride(),
        locations.shape, locations.dtype, locations.get_device(),
        *others, metadata, im2col_step, deterministic, variant,
    )  # fmt: skip


def _host_metadata(shapes: Any, starts: Any) -> tuple[Any, ...] | None:
    """Metadata given as sequences of ints, as part of a key; None for anything else."""
    if type(shapes) not in (list, tuple) or not (starts is None or type(starts) in (list, tuple)):
        return None
    try:
        rows = (*map(tuple, shapes), tuple(starts or ()))
    except TypeError:
        return None
    if any(type(number) is not int for row in rows for number in row):
        return None
    return (*rows, starts is None)


def forward(
    value: Tensor,
    shapes: Any,
    starts: Any,
    locations: Tensor,
    weights: Tensor | None,
    im2col_step: int = 64,
    deterministic: bool | None = None,
    variant: Variant = PLAIN,
    lengths: Tensor | None = None,
    references: Tensor | None = None,
) -> Tensor:
    """The output, recording no gradient; arguments and errors of :func:`cupy_msda.ms_deform_attn`."""
    if lengths is not None:
        return api.forward(
            validate.read(
                Arguments(
                    value, shapes, starts, references, locations, weights, im2col_step, variant, lengths, deterministic,
                    names=_names(references),
                )
            )
        )  # fmt: skip
    key = key_of(value, locations, weights, shapes, starts, im2col_step, deterministic, variant, references)
    call = (shapes, starts, locations, weights, im2col_step, deterministic, False, variant, references)
    return follow(recipes.get(key), key, value, *call)


def _names(references: Tensor | None) -> ArgumentNames:
    return OPERATOR_NAMES if references is None else FUSED_NAMES


def follow(recipe: Recipe | None, key: tuple[Any, ...] | None, value: Tensor, *others: Any) -> Tensor:
    """The output by `recipe` where there is one that applies, else as :func:`first_forward`, whose arguments follow."""
    if recipe is not None:
        output = recipe.forward(value, *others[:4], *others[8:])
        if output is not None:
            return output
    return first_forward(key, value, *others)


def first_forward(
    key: tuple[Any, ...] | None,
    value: Tensor,
    shapes: Any,
    starts: Any,
    locations: Tensor,
    weights: Tensor | None,
    im2col_step: int,
    deterministic: bool | None,
    checked: bool,
    variant: Variant,
    references: Tensor | None = None,
) -> Tensor:
    """The general way, which leaves a recipe for `key` where one is possible."""
    arguments = Arguments(
        value, shapes, starts, references, locations, weights, im2col_step, variant, None, deterministic, checked,
        names=_names(references),
    )  # fmt: skip
    call = validate.read(arguments)
    output = api.forward(call)
    if key is not None and not checked and key not in recipes and _repeatable(call):
        if len(recipes) >= _MOST_RECIPES:
            recipes.clear()
        recipes[key] = Recipe(call.problem, value, deterministic)
    return output


def backward(
    grad_output: Tensor,
    value: Tensor,
    shapes: Any,
    starts: Any,
    locations: Tensor,
    weights: Tensor | None,
    im2col_step: int,
    deterministic: bool | None,
    variant: Variant,
    lengths: Tensor | None,
    wanted: Wanted,
    references: Tensor | None = None,
) -> Gradients:
    """The gradients that are wanted."""
    recipe = None
    if lengths is None:
        recipe = recipes.get(
            key_of(value, locations, weights, shapes, starts, im2col_step, deterministic, variant, references)
        )
    if recipe is not None and grad_output.dtype is value.dtype:
        repeat = recipe.backward(wanted)
        grads = repeat(grad_output, value, shapes, starts, locations, weights, references)
        if grads is not None:
            return grads
    arguments = Arguments(
        value, shapes, starts, references, locations, weights, im2col_step, variant, lengths, deterministic,
        names=_names(references),
    )  # fmt: skip
    return tuple(api.backward(validate.read(arguments, grad_output, wanted)))


def _repeatable(call: Call) -> bool:
    """Whether launches need no more than addresses: no empty problem, no metadata to convert, and no value to copy."""
    found, operands = call.problem, call.operands
    if found.device[0] != "cuda" or found.empty or found.L > plan.MAX_LEVELS_BY_VALUE:
        return False
    if not operands.value.contiguous and found.value_strides is None:
        return False
    return found.levels is not None or operands.shapes.dtype == operands.starts.dtype == "int64"
