"""Plain CUDA tensors, again: a call whose layout was seen before costs its hand-over, its outputs and its launches.

The first call of a layout (shapes, dtypes, devices, host metadata; everything contiguous) goes the general way, is
validated there, and leaves a recipe. Whatever validation looks at is part of the key, so the recipe is good for every
later call with that key. What has no key goes the general way every time.
"""

from __future__ import annotations

import ctypes
import functools
import struct
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import api, cuda, dlpack, interop, plan, problem
from ..launch import PreparedLaunch
from ..problem import SIXTEEN_BIT, Operands, Problem

# torch >= 2.10 has it; before, every call goes the general way, through capsules.
_read_tensor = dlpack.tensor_reader(Tensor)
# Of each DLTensor: its address; device, number of dimensions and dtype as they lie in memory; its byte offset.
_unpack = {count: struct.Struct("=" + "q16s16xq" * count).unpack_from for count in (3, 4, 5, 6)}
# What the vectors of the kernels want, and what torch's allocator gives.
_ALIGNMENT = 16
# A model comes back to few layouts; one that never does must not fill the memory.
_MOST_RECIPES = 4096

_Key = tuple[Any, ...]
_Addresses = tuple[int, ...]


class _Recipe(NamedTuple):
    """How to repeat a call. `levels` are the words of host metadata, () where it is on the device."""

    device: int
    levels: tuple[int, ...]
    sizes: tuple[int, int]
    launch: PreparedLaunch


class _BackwardRecipe(NamedTuple):
    """How to repeat a backward. The sums of grad_value need `total_dtype` where that is not value's own."""

    recipe: _Recipe
    total_dtype: torch.dtype | None
    round: PreparedLaunch | None


_forwards: dict[_Key, _Recipe] = {}
_backwards: dict[_Key, _BackwardRecipe] = {}


class _Tensors:
    """Memory for the DLTensors of one call."""

    def __init__(self) -> None:
        self.memory = ctypes.create_string_buffer(max(_unpack) * dlpack.TENSOR_BYTES)
        self.address = ctypes.addressof(self.memory)


# Taken from and put back: threads never share one.
_free: list[_Tensors] = []


def _hand_over(tensors: tuple[Tensor, ...], shapes: Any, starts: Any, *settings: Any) -> tuple[_Key, _Addresses] | None:
    """The key of a call, and the addresses of its tensors with those of the metadata last; None for the general way."""
    if (
        _read_tensor is None
        or not tensors[0].is_cuda
        or not all(type(setting) in (int, bool, type(None)) for setting in settings)
    ):
        return None
    levels = None
    if type(shapes) is Tensor and type(starts) is Tensor:
        tensors += (shapes, starts)
    else:
        levels = _host_levels(shapes, starts)
        if levels is None:
            return None
    for tensor in tensors:
        if not tensor.is_contiguous():
            return None
    found = _free.pop() if _free else _Tensors()
    place = found.address
    for tensor in tensors:
        _read_tensor(tensor, place)
        place += dlpack.TENSOR_BYTES
    words = _unpack[len(tensors)](found.memory)
    _free.append(found)
    addresses = words[::3]
    for address in addresses:
        if address % _ALIGNMENT:
            return None
    if any(words[2::3]):
        return None
    return (words[1::3], levels, settings, *[tensor.shape for tensor in tensors]), addresses


def _host_levels(shapes: Any, starts: Any) -> tuple[Any, ...] | None:
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
    """Output of the operator, recording no gradient; arguments and errors of :func:`cupy_msda.ms_deform_attn`."""
    handed = None
    if not validate:
        handed = _hand_over((value, locations, weights), shapes, starts, im2col_step, deterministic)
    if handed is not None:
        key, at = handed
        recipe = _forwards.get(key)
        if recipe is not None:
            N, Q = locations.shape[:2]
            output = value.new_empty((N, Q, value.shape[2] * value.shape[3]))
            with _Current(recipe.device) as stream:
                metadata = recipe.levels or at[3:]
                recipe.launch(stream, at[0], *metadata, at[1], at[2], output.data_ptr(), *recipe.sizes)
            return output
    found, operands = problem.read(
        value, shapes, starts, locations, weights, im2col_step, deterministic=deterministic, validate=validate
    )
    output = api.forward(found, operands)
    if handed is not None and _repeatable(found, operands):
        device = found.device[1]
        with _Current(device) as stream:
            launch = cuda.prepare_forward(found, _ALIGNMENT, stream)
        _remember(_forwards, key, _recipe(found, launch))
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
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of value, locations and weights, those that are wanted: the last two come together."""
    grad_output = grad_output.contiguous()
    settings = (im2col_step, deterministic, grad_value, grad_samples)
    handed = _hand_over((value, locations, weights, grad_output), shapes, starts, *settings)
    if handed is not None:
        key, at = handed
        found_recipe = _backwards.get(key)
        if found_recipe is not None:
            return _repeat_backward(found_recipe, at, value, locations, weights, grad_value, grad_samples)
    found, operands = problem.read(
        value, shapes, starts, locations, weights, im2col_step, grad_output, deterministic=deterministic
    )
    grads = api.backward(found, operands, grad_value=grad_value, grad_samples=grad_samples)
    if handed is not None and (grad_value or grad_samples) and _repeatable(found, operands):
        total_dtype = rounding = None
        with _Current(found.device[1]) as stream:
            launch = cuda.prepare_backward(found, _ALIGNMENT, stream, grad_value, grad_samples)
            if grad_value and found.value_dtype in SIXTEEN_BIT:
                total_dtype, rounding = torch.float32, cuda.prepare_rounding(found, stream)
        _remember(_backwards, key, _BackwardRecipe(_recipe(found, launch), total_dtype, rounding))
    return grads


def _repeat_backward(
    found: _BackwardRecipe,
    at: tuple[int, ...],
    value: Tensor,
    locations: Tensor,
    weights: Tensor,
    grad_value: bool,
    grad_samples: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    recipe = found.recipe
    of_value = total = of_locations = of_weights = None
    if grad_value:
        of_value = total = torch.empty_like(value)
        if found.total_dtype is not None:
            total = torch.empty_like(value, dtype=found.total_dtype)
    if grad_samples:
        of_locations, of_weights = torch.empty_like(locations), torch.empty_like(weights)
    with _Current(recipe.device) as stream:
        sums = 0
        if total is not None:
            sums = total.data_ptr()
            _cuda_runtime().memsetAsync(sums, 0, total.nbytes, stream)
        recipe.launch(
            stream,
            at[0],
            *(recipe.levels or at[4:]),
            *at[1:4],
            sums,
            of_locations.data_ptr() if grad_samples else 0,
            of_weights.data_ptr() if grad_samples else 0,
            *recipe.sizes,
        )
        if found.round is not None:
            found.round(stream, sums, of_value.data_ptr(), value.numel())
    return of_value, of_locations, of_weights


class _Current:
    """Makes a device current and gives the address of torch's current stream on it; see :func:`cuda.on_device`."""

    __slots__ = ("before", "device")

    def __init__(self, device: int) -> None:
        self.device = device

    def __enter__(self) -> int:
        runtime = _cuda_runtime()
        self.before = runtime.getDevice()
        runtime.setDevice(self.device)
        return torch._C._cuda_getCurrentRawStream(self.device)

    def __exit__(self, *exception: object) -> None:
        if self.before != self.device:
            _cuda_runtime().setDevice(self.before)


@functools.cache
def _cuda_runtime() -> ModuleType:
    return interop.require_cupy("a CUDA tensor").cuda.runtime


def _repeatable(found: Problem, operands: Operands) -> bool:
    """Whether the launch needs no more than addresses: no empty problem, no metadata to convert or to copy."""
    if found.device[0] != "cuda" or found.empty or found.L > plan.MAX_LEVELS_BY_VALUE:
        return False
    return found.levels is not None or operands.shapes.dtype == operands.starts.dtype == "int64"


def _recipe(found: Problem, launch: PreparedLaunch) -> _Recipe:
    levels = () if found.levels is None else cuda.levels_by_value(found.levels)
    return _Recipe(found.device[1], levels, (found.S, found.Q), launch)


def _remember(recipes: dict[_Key, Any], key: _Key, recipe: Any) -> None:
    if len(recipes) >= _MOST_RECIPES:
        recipes.clear()
    recipes[key] = recipe
