"""What both directions of the NumPy path share: rows of channels, coordinates of samples, chunks and rounding."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from ..call import Problem, Variant


class Rows:
    """Rows of D channels of some heads of one image, as the accumulator dtype, by pixel (or query) and head.

    Copies the heads once when many rows will be taken (neighbouring rows then share cache lines and pages), and takes
    rows from the caller's array otherwise.
    """

    def __init__(self, array: np.ndarray, n: int, heads: slice, times: int, problem: Problem) -> None:
        """`array` [N, rows, M, D], whose rows will be taken about `times` times each."""
        self.dtype = np.dtype(problem.accumulator_dtype)
        self.bfloat16 = problem.value_dtype == "bfloat16"
        count, M, D = array.shape[1:]
        self.heads = heads.stop - heads.start
        if times >= 4 or not array[n].flags.c_contiguous:
            own = to_accumulator(array[n, :, heads], self.dtype, self.bfloat16)
            self.flat = np.ascontiguousarray(own.transpose(1, 0, 2)).reshape(-1, D)
            self.stride, self.first = 1, np.arange(self.heads) * count
        else:
            self.flat = array[n].reshape(count * M, D)
            self.stride, self.first = M, np.arange(heads.start, heads.stop)

    def take(self, rows: np.ndarray) -> np.ndarray:
        """The rows [..., D]; `rows` are ``stride * pixel + first[head]``."""
        taken = np.empty((*rows.shape, self.flat.shape[1]), self.flat.dtype)
        np.take(self.flat, rows, axis=0, out=taken, mode="clip")
        return to_accumulator(taken, self.dtype, self.bfloat16)


class Axis(NamedTuple):
    """One coordinate of some samples: the pixel before it (as a float), the fraction beyond, whether it counts.

    `slope` is how far the pixel moves when the location does; it varies from sample to sample where some are clamped.
    """

    before: np.ndarray
    fraction: np.ndarray
    counts: np.ndarray
    slope: np.ndarray


def locate(location: np.ndarray, size: np.ndarray, dtype: np.dtype, variant: Variant) -> Axis:
    """Where normalised coordinates lie in levels of `size` pixels; pixel coordinates are float64 meanwhile."""
    if variant.nearest:
        # In the dtype of the arithmetic: the pixel is then the one that the same numbers give in a framework.
        pixel = np.floor(location * size.astype(dtype) + dtype.type(0.5)).astype(np.float64)
        slope = np.zeros(size.shape)
    else:
        slope = (size - 1 if variant.align_corners else size).astype(np.float64)
        pixel = location * slope
        if not variant.align_corners:
            pixel -= 0.5
    if variant.clamped:
        counts = ~np.isnan(pixel)
        slope = slope * ((pixel > 0) & (pixel < size - 1))
        np.maximum(pixel, 0, out=pixel)
        np.minimum(pixel, size - 1, out=pixel)
        np.copyto(pixel, -2, where=~counts)
    else:
        counts = (pixel > -1) & (pixel < size)
        # What does not count gets two pixels outside; fmax turns NaN into a number, so that weights are finite.
        np.fmax(pixel, -2, out=pixel)
        np.minimum(pixel, size, out=pixel)
    before = np.floor(pixel)
    pixel -= before
    return Axis(before, pixel.astype(dtype), counts, slope.astype(dtype))


def chunks(count: int, step: int) -> Iterator[slice]:
    """Slices of `step` that cover `count`, the last one shorter."""
    for begin in range(0, count, step):
        yield slice(begin, min(begin + step, count))


def to_accumulator(array: np.ndarray, dtype: np.dtype, bfloat16: bool) -> np.ndarray:
    """`array` in the dtype of the arithmetic, itself where it has that already."""
    if bfloat16 and array.dtype == np.uint16:
        return (array.astype(np.uint32) << 16).view(np.float32)
    return array.astype(dtype, copy=False)


def from_accumulator(array: np.ndarray, storage: np.dtype, dtype: str) -> np.ndarray:
    """`array` rounded to `dtype`, to the nearest and ties to even."""
    if dtype != "bfloat16":
        return array.astype(storage)
    bits = np.ascontiguousarray(array, np.float32).view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(array), 0x7FC0, rounded).astype(np.uint16)


def store(target: np.ndarray, where: tuple, array: np.ndarray, dtype: str) -> None:
    """Round `array` into a part of `target`."""
    target[where] = from_accumulator(array, target.dtype, dtype)
