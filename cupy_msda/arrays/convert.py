"""A :class:`View` as a NumPy or CuPy array over the same memory."""

from __future__ import annotations

from typing import Any

import numpy as np

from .cupy_module import require_cupy
from .views import View


def to_numpy(source: View) -> np.ndarray:
    """The array itself on the CPU, without a copy; bfloat16 as its uint16 bits. A CUDA array is copied to the host."""
    if source.device[0] == "cuda":
        # The caller's stream may still have to write it. CuPy copies on its own current stream.
        runtime = require_cupy("an array on a CUDA device").cuda.runtime
        runtime.streamSynchronize(source.framework.stream(source.device))
        return to_cupy(source).get()
    if isinstance(source.array, np.ndarray):
        return source.array.view(np.uint16) if source.dtype == "bfloat16" else source.array
    dtype = storage_dtype(source.dtype)
    if 0 in source.shape:
        return np.empty(source.shape, dtype)
    return np.asarray(_ArrayInterface(source, dtype))


def to_cupy(source: View) -> Any:
    """A CuPy array over the same device memory, without a copy; bfloat16 as its uint16 bits."""
    cupy = require_cupy("an array on a CUDA device")
    dtype = storage_dtype(source.dtype)
    if isinstance(source.array, cupy.ndarray):
        return source.array.view(dtype) if source.dtype == "bfloat16" else source.array
    if 0 in source.shape:
        return cupy.empty(source.shape, dtype)
    elements = sum((n - 1) * stride for n, stride in zip(source.shape, source.strides, strict=True)) + 1
    memory = cupy.cuda.UnownedMemory(source.data, elements * dtype.itemsize, source.array, source.device[1])
    strides = tuple(stride * dtype.itemsize for stride in source.strides)
    return cupy.ndarray(source.shape, dtype, cupy.cuda.MemoryPointer(memory, 0), strides)


def storage_dtype(dtype: str) -> np.dtype:
    """The NumPy dtype that holds the bits of `dtype`."""
    return np.dtype(np.uint16 if dtype == "bfloat16" else dtype)


class _ArrayInterface:
    """What ``np.asarray`` needs to read the memory of another library; keeps its owner alive."""

    def __init__(self, source: View, dtype: np.dtype) -> None:
        self.source = source
        self.__array_interface__ = {
            "version": 3,
            "shape": source.shape,
            "typestr": dtype.str,
            "data": (source.data, False),
            "strides": tuple(stride * dtype.itemsize for stride in source.strides),
        }
