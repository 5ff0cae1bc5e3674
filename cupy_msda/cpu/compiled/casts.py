"""Casts between storage and accumulator dtype, by compiled loops where one of them has 16 bits."""

from __future__ import annotations

import numpy as np

from . import build


def widened(array: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """`array` in the accumulator dtype, contiguous and aligned; itself where it is so. uint16 holds bfloat16."""
    if not (array.flags.c_contiguous and array.flags.aligned):
        array = array.copy()
    if array.itemsize != 2:
        return array.astype(dtype, copy=False)
    found = np.empty(array.shape, np.float32)
    bits = array.reshape(-1)
    if array.dtype == np.float16:
        build.widen("float16")(bits.view(np.int16), found.reshape(-1))
    else:
        build.widen("bfloat16")(bits, found.reshape(-1))
    return found


def narrowed(array: np.ndarray, storage: np.dtype, dtype: str) -> np.ndarray:
    """`array` cast to `dtype`, to nearest with ties to even; `storage` is uint16 for bfloat16."""
    if storage.itemsize != 2:
        return array.astype(storage, copy=False)
    found = np.empty(array.shape, storage)
    bits = np.ascontiguousarray(array, np.float32).reshape(-1).view(np.uint32)
    build.narrow(dtype)(bits, found.reshape(-1).view(np.uint16))
    return found
