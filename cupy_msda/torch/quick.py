"""Plain CUDA tensors, again: a call whose layout was seen before costs its outputs, its launches and little more.

The first call of a layout (shapes, dtypes, devices, host metadata; everything contiguous) goes the general way: its
tensors are handed over by DLPack and validated, its kernel is planned and compiled. It leaves a :class:`Recipe`.
Whatever validation looks at is part of the recipe's key, so a later call with that key needs only the addresses. Those
come from ``Tensor.data_ptr``: reading five ``DLTensor`` through DLPack's C functions took 10 us a call, ``data_ptr``
takes 0.5 (on the host of an H100; benchmarks/NOTES.md). What has no key goes the general way every time.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import api, cuda, interop, plan, problem
from ..problem import SIXTEEN_BIT, Operands, Problem

# What the vectors of the kernels want, and what torch's allocator gives.
_ALIGNMENT = 16
# A model comes back to few layouts; one that never does must not fill the memory.
_MOST_RECIPES = 4096

Gradients = tuple[Tensor | None, Tensor | None, Tensor | None]


class _Backward(NamedTuple):
    """The launches of a backward; `total_dtype` is that of the sums of grad_value where it is not value's own."""

    run: Callable[..., None]
    total_dtype: torch.dtype | None
    round: Callable[..., None] | None


class Recipe:
    """How to repeat the calls of one layout."""

    __slots__ = ("backwards", "device", "levels", "like_output", "problem", "run", "runtime", "sizes")

    def __init__(self, found: Problem, value: Tensor) -> None:
        self.problem = found
        self.device = found.device[1]
        self.runtime = interop.require_cupy("a CUDA tensor").cuda.runtime
        self.sizes = (found.S, found.Q)
        # The words of metadata that came from the host.
        self.levels = () if found.levels is None else cuda.levels_by_value(found.levels)
        # One element, seen as an output: `empty_like` of it is 1 us cheaper than `new_empty`.
        self.like_output = value.detach().new_empty(()).expand(found.output_shape)
        self.backwards: dict[tuple[bool, bool], _Backward] = {}
        with cuda.on_device(self.device):
            self.run = cuda.prepare_forward(found, _ALIGNMENT, self._stream()).run

    def forward(self, value: Tensor, shapes: Any, starts: Any, locations: Tensor, weights: Tensor) -> Tensor | None:
        """The output, or None where an address is not aligned."""
        at_value, at_locations, at_weights = value.data_ptr(), locations.data_ptr(), weights.data_ptr()
        if (at_value | at_locations | at_weights) % _ALIGNMENT:
            return None
        output = torch.empty_like(self.like_output)
        metadata = self.levels or (shapes.data_ptr(), starts.data_ptr())
        runtime, device = self.runtime, self.device
        # Also gives a thread that has never used CUDA its context, which a launch by the driver does not.
        before = runtime.getDevice()
        runtime.setDevice(device)
        try:
            self.run(
                torch._C._cuda_getCurrentRawStream(device),
                at_value, *metadata, at_locations, at_weights, output.data_ptr(), *self.sizes,
            )  # fmt: skip
        finally:
            if before != device:
                runtime.setDevice(before)
        return output

    def backward(
        self, grad_output: Tensor, value: Tensor, shapes: Any, starts: Any, locations: Tensor, weights: Tensor,
        grad_value: bool, grad_samples: bool,
    ) -> Gradients | None:  # fmt: skip
        """The gradients that are wanted, or None where a saved tensor came back with strides, or is not aligned."""
        if not (value.is_contiguous() and locations.is_contiguous() and weights.is_contiguous()):
            return None
        grad_output = grad_output.contiguous()
        at_value, at_locations, at_weights = value.data_ptr(), locations.data_ptr(), weights.data_ptr()
        at_grad_output = grad_output.data_ptr()
        if (at_value | at_locations | at_weights | at_grad_output) % _ALIGNMENT:
            return None
        how = self.backwards.get((grad_value, grad_samples))
        if how is None:
            how = self._plan_backward(grad_value, grad_samples)
        of_value = total = of_locations = of_weights = None
        sums = at_grad_locations = at_grad_weights = 0
        if grad_value:
            of_value = total = torch.empty_like(value)
            if how.total_dtype is not None:
                total = torch.empty_like(value, dtype=how.total_dtype)
            sums = total.data_ptr()
        if grad_samples:
            of_locations, of_weights = torch.empty_like(locations), torch.empty_like(weights)
            at_grad_locations, at_grad_weights = of_locations.data_ptr(), of_weights.data_ptr()
        metadata = self.levels or (shapes.data_ptr(), starts.data_ptr())
        runtime, device = self.runtime, self.device
        before = runtime.getDevice()
        runtime.setDevice(device)
        try:
            stream = torch._C._cuda_getCurrentRawStream(device)
            if total is not None:
                runtime.memsetAsync(sums, 0, total.nbytes, stream)
            how.run(
                stream, at_value, *metadata, at_locations, at_weights, at_grad_output, sums, at_grad_locations,
                at_grad_weights, *self.sizes,
            )  # fmt: skip
            if how.round is not None:
                how.round(stream, sums, of_value.data_ptr(), total.numel())
        finally:
            if before != device:
                runtime.setDevice(before)
        return of_value, of_locations, of_weights

    def _plan_backward(self, grad_value: bool, grad_samples: bool) -> _Backward:
        total_dtype = rounding = None
        with cuda.on_device(self.device):
            stream = self._stream()
            launch = cuda.prepare_backward(self.problem, _ALIGNMENT, stream, grad_value, grad_samples)
            if grad_value and self.problem.value_dtype in SIXTEEN_BIT:
                total_dtype, rounding = torch.float32, cuda.prepare_rounding(self.problem, stream).run
        how = self.backwards[grad_value, grad_samples] = _Backward(launch.run, total_dtype, rounding)
        return how

    def _stream(self) -> int:
        return torch._C._cuda_getCurrentRawStream(self.device)


# All recipes by key, and what was called last, newest first: (matches, recipe, im2col_step, deterministic, whether an
# input requires a gradient). `matches` is one C call of torch's compiler, which compares types, dispatch keys, dtypes,
# devices, sizes and strides: a third of the time of a key, which decides wherever nothing here matches.
recipes: dict[tuple[Any, ...] | None, Recipe] = {}
recent: tuple[tuple[Any, ...], ...] = ()
# The layers of a model come back to about as many layouts.
_MOST_RECENT = 4


def recall(
    key: tuple[Any, ...] | None,
    value: Tensor,
    locations: Tensor,
    weights: Tensor,
    shapes: Any,
    starts: Any,
    im2col_step: int,
    deterministic: bool | None,
) -> Recipe | None:
    """The recipe of `key` if a call has left one; it is among the recent ones from then on."""
    global recent
    recipe = recipes.get(key)
    if recipe is not None and not recipe.levels and _TensorGuards is not None:
        tensors = (value, locations, weights, shapes, starts)
        guards = _TensorGuards(*tensors, dynamic_dims_sizes=None, dynamic_dims_strides=None)
        differentiable = any(tensor.requires_grad for tensor in tensors)
        entry = (guards.check, recipe, im2col_step, deterministic, differentiable)
        recent = (entry, *recent[: _MOST_RECENT - 1])
    return recipe


_TensorGuards = getattr(getattr(torch._C._dynamo, "guards", None), "TensorGuards", None)


def key_of(
    value: Tensor, locations: Tensor, weights: Tensor, shapes: Any, starts: Any, im2col_step: Any, deterministic: Any
) -> tuple[Any, ...] | None:
    """What a recipe for this call depends on; None where there can be none."""
    if not (value.is_contiguous() and locations.is_contiguous() and weights.is_contiguous()):
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
        value.shape, value.dtype, value.get_device(),
        locations.shape, locations.dtype, locations.get_device(),
        weights.shape, weights.dtype, weights.get_device(),
        metadata, im2col_step, deterministic,
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
    weights: Tensor,
    im2col_step: int = 64,
    deterministic: bool | None = None,
    validate: bool = False,
) -> Tensor:
    """The output, recording no gradient; arguments and errors of :func:`cupy_msda.ms_deform_attn`."""
    key = key_of(value, locations, weights, shapes, starts, im2col_step, deterministic)
    recipe = None if validate else recipes.get(key)
    if recipe is not None:
        output = recipe.forward(value, shapes, starts, locations, weights)
        if output is not None:
            return output
    return first_forward(key, value, shapes, starts, locations, weights, im2col_step, deterministic, validate)


def first_forward(
    key: tuple[Any, ...] | None,
    value: Tensor,
    shapes: Any,
    starts: Any,
    locations: Tensor,
    weights: Tensor,
    im2col_step: int,
    deterministic: bool | None,
    validate: bool,
) -> Tensor:
    """The general way, which leaves a recipe for `key` where one is possible."""
    found, operands = problem.read(
        value, shapes, starts, locations, weights, im2col_step, deterministic=deterministic, validate=validate
    )
    output = api.forward(found, operands)
    if key is not None and not validate and key not in recipes and _repeatable(found, operands):
        if len(recipes) >= _MOST_RECIPES:
            recipes.clear()
        recipes[key] = Recipe(found, value)
    return output


def backward(
    grad_output: Tensor,
    value: Tensor,
    shapes: Any,
    starts: Any,
    locations: Tensor,
    weights: Tensor,
    im2col_step: int,
    deterministic: bool | None,
    grad_value: bool,
    grad_samples: bool,
) -> Gradients:
    """Gradients of value, locations and weights, those that are wanted: the last two come together."""
    recipe = recipes.get(key_of(value, locations, weights, shapes, starts, im2col_step, deterministic))
    if recipe is not None and not deterministic and grad_output.dtype is value.dtype:
        grads = recipe.backward(grad_output, value, shapes, starts, locations, weights, grad_value, grad_samples)
        if grads is not None:
            return grads
    found, operands = problem.read(
        value, shapes, starts, locations, weights, im2col_step, grad_output, deterministic=deterministic
    )
    return api.backward(found, operands, grad_value=grad_value, grad_samples=grad_samples)


def _repeatable(found: Problem, operands: Operands) -> bool:
    """Whether launches need no more than addresses: no empty problem, no metadata to convert or to copy."""
    if found.device[0] != "cuda" or found.empty or found.L > plan.MAX_LEVELS_BY_VALUE:
        return False
    return found.levels is not None or operands.shapes.dtype == operands.starts.dtype == "int64"
