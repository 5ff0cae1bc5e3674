"""What both directions of the NumPy path share: channel vectors, pixel coordinates of samples and dtype casts.

Arithmetic is float32, or float64 for float64. Pixel coordinates are float64, because x * W - 0.5 loses log2(W) bits of
the fraction in float32.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from ..call import Variant
from .tasks import Task

# Where each vector is gathered at least this many times, a copy of the heads pays.
USES_FOR_COPY = 4


class ChannelVectors:
    """The D channels of each pixel (or query) of a task's images and heads, gathered by index in the accumulator dtype.

    Where vectors are used often, the heads are copied first: neighbours then share cache lines and pages. Otherwise
    vectors are read from the caller's array.
    """

    def __init__(self, array: np.ndarray, task: Task, uses: int) -> None:
        """`array` is [N, pixels or queries, M, D]; each of its vectors is gathered about `uses` times."""
        self.dtype = np.dtype(task.problem.accumulator_dtype)
        self.bfloat16 = task.problem.value_dtype == "bfloat16"
        of_images = array[task.images]
        N, count, M, D = of_images.shape
        self.copied = uses >= USES_FOR_COPY or not of_images.flags.c_contiguous
        if self.copied:
            heads = to_accumulator(of_images[:, :, task.heads], self.dtype, self.bfloat16)
            self.flat = np.ascontiguousarray(heads.transpose(0, 2, 1, 3)).reshape(-1, D)
            self.pixel_stride, self.head_offset = 1, np.arange(task.head_count) * count
        else:
            self.flat = of_images.reshape(-1, D)
            first = np.arange(N)[:, None] * (count * M)
            self.pixel_stride, self.head_offset = M, (first + np.arange(M)[task.heads]).reshape(-1)

    def gather(self, indices: np.ndarray) -> np.ndarray:
        """Vectors [..., D] at `indices`, which are ``pixel * pixel_stride + head_offset[head]``."""
        vectors = np.empty((*indices.shape, self.flat.shape[1]), self.flat.dtype)
        np.take(self.flat, indices, axis=0, out=vectors, mode="clip")
        return to_accumulator(vectors, self.dtype, self.bfloat16)


class Coordinate(NamedTuple):
    """One pixel coordinate of some samples: floor (a float), fraction, and whether the sample is in bounds.

    `slope` is the derivative of the pixel coordinate with respect to the location. It is one number per level, or per
    sample where some are clamped.
    """

    floor: np.ndarray
    fraction: np.ndarray
    in_bounds: np.ndarray
    slope: np.ndarray


def to_pixels(location: np.ndarray, size: np.ndarray, dtype: np.dtype, variant: Variant) -> Coordinate:
    """Pixel coordinates of normalised ones, in levels of `size` pixels along this axis."""
    if variant.nearest:
        # In the accumulator dtype, so that frameworks find the same pixel for the same numbers.
        pixel = np.floor(location * size.astype(dtype) + dtype.type(0.5)).astype(np.float64)
        slope = np.zeros(size.shape)
    else:
        slope = (size - 1 if variant.align_corners else size).astype(np.float64)
        if variant.clamped:
            np.maximum(slope, 1, out=slope)  # on one pixel: 0 times infinity is no coordinate to clamp
        pixel = location * slope
        if not variant.align_corners:
            pixel -= 0.5
    if variant.clamped:
        in_bounds = ~np.isnan(pixel)
        slope = slope * ((pixel > 0) & (pixel < size - 1))
        np.maximum(pixel, 0, out=pixel)
        np.minimum(pixel, size - 1, out=pixel)
        np.copyto(pixel, -2, where=~in_bounds)
    else:
        in_bounds = (pixel > -1) & (pixel < size)
        # Other samples move to two pixels outside. fmax replaces NaN by a number, so that weights are finite.
        np.fmax(pixel, -2, out=pixel)
        np.minimum(pixel, size, out=pixel)
    floor = np.floor(pixel)
    pixel -= floor
    return Coordinate(floor, pixel.astype(dtype), in_bounds, slope.astype(dtype))


def to_accumulator(array: np.ndarray, dtype: np.dtype, bfloat16: bool) -> np.ndarray:
    """`array` in the accumulator dtype, without a copy where it has that already."""
    if bfloat16 and array.dtype == np.uint16:
        return (array.astype(np.uint32) << 16).view(np.float32)
    return array.astype(dtype, copy=False)


def from_accumulator(array: np.ndarray, storage: np.dtype, dtype: str) -> np.ndarray:
    """`array` cast to `dtype`, to nearest with ties to even; `storage` is uint16 for bfloat16."""
    if dtype != "bfloat16":
        return array.astype(storage)
    bits = np.ascontiguousarray(array, np.float32).view(np.uint32)
    nearest = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(array), 0x7FC0, nearest).astype(np.uint16)
