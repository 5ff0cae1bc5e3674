"""Kernels as numba compiles them: one signature per dtype, on first use, cached on disk."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numba
from numba import types

from . import front_end, kernels

_INDEX, _FLAG = types.int64, types.boolean
_STRIDES, _OPTIONS = types.UniTuple(_INDEX, 4), types.UniTuple(_FLAG, 3)
# float16 and bfloat16 come as their bits, which the type of the integer tells apart.
_STORED = {"float64": types.float64, "float32": types.float32, "bfloat16": types.uint16, "float16": types.int16}


@functools.cache
def forward(value_dtype: str) -> Callable[..., None]:
    """:func:`.kernels.forward` for a value of this dtype."""
    value, levels, read, write = _arrays(value_dtype)
    return _compiled(kernels.forward, value, _STRIDES, levels, types.Tuple((read, read)), _OPTIONS, write)


@functools.cache
def backward(value_dtype: str) -> Callable[..., None]:
    """:func:`.kernels.backward` for a value of this dtype."""
    value, levels, read, write = _arrays(value_dtype)
    sums = types.Tuple((types.Array(read.dtype, 1, "C"), _STRIDES, _FLAG))
    gradients = types.Tuple((write, write, _FLAG))
    samples = types.Tuple((read, read, read))
    return _compiled(kernels.backward, value, _STRIDES, levels, samples, _OPTIONS, sums, gradients)


@functools.cache
def materialise(accumulator_dtype: str) -> Callable[..., None]:
    """:func:`.front_end.materialise` in this dtype."""
    _, levels, read, write = _arrays(accumulator_dtype)
    return _compiled(front_end.materialise, read, read, read, levels, write, write)


@functools.cache
def backward_of_logits(accumulator_dtype: str) -> Callable[..., None]:
    """:func:`.front_end.backward_of_logits` in this dtype."""
    _, _, read, write = _arrays(accumulator_dtype)
    return _compiled(front_end.backward_of_logits, read, write)


@functools.cache
def backward_of_offsets(accumulator_dtype: str) -> Callable[..., None]:
    """:func:`.front_end.backward_of_offsets` in this dtype."""
    _, levels, read, write = _arrays(accumulator_dtype)
    return _compiled(front_end.backward_of_offsets, read, read, levels, write, write)


@functools.cache
def widen(dtype: str) -> Callable[..., None]:
    """:func:`.kernels.widen_all` from a dtype of 16 bits."""
    return _compiled(kernels.widen_all, _readable(_STORED[dtype], 1), types.Array(types.float32, 1, "C"))


@functools.cache
def narrow(dtype: str) -> Callable[..., None]:
    """The cast from float32 to a dtype of 16 bits."""
    function = kernels.to_bfloat16 if dtype == "bfloat16" else kernels.to_float16
    return _compiled(function, _readable(types.uint32, 1), types.Array(types.uint16, 1, "C"))


def _arrays(value_dtype: str) -> tuple[types.Array, types.Array, types.Array, types.Array]:
    """Types of value, of the levels, and of other arrays that a kernel reads and writes."""
    number = types.float64 if value_dtype == "float64" else types.float32
    return (
        _readable(_STORED[value_dtype], 1), _readable(_INDEX, 2), _readable(number, 4), types.Array(number, 4, "A")
    )  # fmt: skip


def _readable(number: Any, dimensions: int) -> types.Array:
    """A contiguous array that may be read-only."""
    return types.Array(number, dimensions, "C", readonly=True)


def _compiled(function: Callable[..., None], *parameters: types.Type) -> Any:
    signature = types.void(*parameters)
    try:
        return numba.njit(signature, nogil=True, cache=True)(function)
    except (OSError, RuntimeError):  # no folder can be written, or the disk is full
        return numba.njit(signature, nogil=True)(function)
