"""The operator as loops over samples, forward and backward, for numba.

numba's cache looks at the file of a kernel alone, so that a kernel calls no function of another file. Only dot products
may be summed in another order than written: a rule of infinity and NaN depends on no such sum.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numba
import numpy as np
from numba import types
from numba.extending import overload

# Bits of the neighbours of a sample that are inside its level.
UPPER_LEFT, UPPER_RIGHT, LOWER_LEFT, LOWER_RIGHT, ALL_FOUR = 1, 2, 4, 8, 15
# Columns of the array of levels.
HEIGHT, WIDTH, START, POINTS = range(4)

_function = numba.njit(nogil=True, forceinline=True)
_sums = numba.njit(nogil=True, forceinline=True, fastmath={"contract"})
_dot_products = numba.njit(nogil=True, forceinline=True, fastmath={"contract", "reassoc", "nsz"})


class Sample(NamedTuple):
    """Pixel of the upper left neighbour, which neighbours are inside the level, fractions, slopes; all of one sample.

    A slope is the derivative of the pixel coordinate; it is 0 where that is clamped.
    """

    pixel: Any
    neighbours: Any
    x: Any
    y: Any
    slope_x: Any
    slope_y: Any


def widen(number: Any) -> Any:
    """An element of value in the accumulator dtype; uint16 and int16 are the bits of bfloat16 and float16."""
    raise NotImplementedError  # numba compiles one of the functions below


@overload(widen, jit_options={"forceinline": True})
def _widen(number: Any) -> Any:
    if isinstance(number, types.Float):
        return _unchanged
    return _from_bfloat16 if number == types.uint16 else _from_float16


def _unchanged(number: Any) -> Any:
    return number


def _from_bfloat16(number: Any) -> Any:
    return np.uint32(np.uint32(number) << np.uint32(16)).view(np.float32)


def _from_float16(number: Any) -> Any:
    bits = np.uint32(number) & np.uint32(0x7FFF)
    # The exponent moves from 15 to 127, or from that of infinity to that of infinity.
    bias = np.uint32(224 << 23) if bits >= np.uint32(0x7C00) else np.uint32(112 << 23)
    normal = np.uint32((bits << np.uint32(13)) + bias).view(np.float32)
    found = normal if bits >= np.uint32(0x0400) else np.float32(np.int32(bits)) * np.float32(2.0**-24)
    return -found if number < 0 else found


def widen_all(stored: np.ndarray, found: np.ndarray) -> None:
    """Fill `found` with `stored` in the accumulator dtype."""
    for i in range(np.uintp(stored.shape[0])):
        found[i] = widen(stored[i])


def to_bfloat16(bits: np.ndarray, found: np.ndarray) -> None:
    """Cast float32 numbers, given by their bits, to nearest with ties to even."""
    for i in range(np.uintp(bits.shape[0])):
        number = bits[i]
        odd = (number >> np.uint32(16)) & np.uint32(1)
        nearest = np.uint32(number + np.uint32(0x7FFF) + odd) >> np.uint32(16)
        is_nan = (number & np.uint32(0x7FFFFFFF)) > np.uint32(0x7F800000)
        found[i] = np.uint16(0x7FC0) if is_nan else np.uint16(nearest)


def to_float16(bits: np.ndarray, found: np.ndarray) -> None:
    """Cast float32 numbers, given by their bits, to the bits of float16: to nearest with ties to even."""
    for i in range(np.uintp(bits.shape[0])):
        number = np.uint32(bits[i] & np.uint32(0x7FFFFFFF))
        odd = (number >> np.uint32(13)) & np.uint32(1)
        nearest = np.uint32(number - np.uint32(112 << 23) + np.uint32(0xFFF) + odd) >> np.uint32(13)
        if number < np.uint32(113 << 23):
            # The last places of a half and a subnormal float16 are the bits of that, rounded.
            subnormal = np.float32(number.view(np.float32) + np.float32(0.5)).view(np.uint32)
            nearest = np.uint32(subnormal - np.uint32(126 << 23))
        if number >= np.uint32(143 << 23):
            nearest = np.uint32(0x7E00) if number > np.uint32(0x7F800000) else np.uint32(0x7C00)
        found[i] = np.uint16(nearest | ((bits[i] >> np.uint32(16)) & np.uint32(0x8000)))


@_function
def _in_pixels(location: Any, size: int, options: tuple[bool, bool, bool]) -> Any:
    """Pixel coordinate, slope and whether it is in bounds, in a level of `size` pixels along the axis."""
    nearest, border, align_corners = options
    pixel: Any
    in_bounds: Any
    if nearest:
        # In the accumulator dtype, so that frameworks find the same pixel for the same numbers.
        pixel = np.float64(np.floor(location * type(location)(size) + type(location)(0.5)))
        slope = 0.0
    else:
        slope = float(size - 1 if align_corners else size)
        if border:
            slope = max(slope, 1.0)  # on one pixel: 0 times infinity is no coordinate to clamp
        pixel = np.float64(location) * slope
        if not align_corners:
            pixel -= 0.5
    if nearest or border:
        in_bounds = not np.isnan(pixel)
        if not (pixel > 0 and pixel < size - 1):
            slope = 0.0
        pixel = min(max(pixel, 0.0), size - 1.0) if in_bounds else 0.0
    else:
        in_bounds = pixel > -1 and pixel < size
        pixel = pixel if in_bounds else 0.0
    return pixel, slope, in_bounds


@_function
def _locate(x_location: Any, y_location: Any, height: int, width: int, options: tuple[bool, bool, bool]) -> Sample:
    """The sample at a location, in a level whose first pixel is 0."""
    x, slope_x, x_in_bounds = _in_pixels(x_location, width, options)
    y, slope_y, y_in_bounds = _in_pixels(y_location, height, options)
    left, top, number = np.floor(x), np.floor(y), type(x_location)
    column, row = np.int64(left), np.int64(top)
    columns = np.int64(column >= 0) + 2 * np.int64(column < width - 1 and not options[0])
    rows = np.int64(row >= 0) + 4 * np.int64(row < height - 1 and not options[0])
    neighbours = columns * rows if x_in_bounds and y_in_bounds else 0
    return Sample(
        row * width + column, neighbours, number(x - left), number(y - top), number(slope_x), number(slope_y)
    )  # fmt: skip


@_function
def _factors(sample: Sample, weight: Any) -> Any:
    """The factors of the four neighbours in the output."""
    one = type(weight)(1)
    top, bottom = (one - sample.y) * weight, sample.y * weight
    return (one - sample.x) * top, sample.x * top, (one - sample.x) * bottom, sample.x * bottom


@_function
def _addresses(first: int, step: int, width: int) -> Any:
    """Where the vectors of the four neighbours begin; `first` is that of the upper left, `step` from pixel to pixel.

    Unsigned, so that numba does not ask of each index whether it counts from the end.
    """
    at, to_right, below = np.uintp(first), np.uintp(step), np.uintp(width * step)
    return at, at + to_right, at + below, at + below + to_right


@_sums
def _gather_four(total: np.ndarray, value: np.ndarray, at: Any, factors: Any) -> None:
    for j in range(np.uintp(total.shape[0])):
        upper = factors[0] * widen(value[at[0] + j]) + factors[1] * widen(value[at[1] + j])
        total[j] += upper + (factors[2] * widen(value[at[2] + j]) + factors[3] * widen(value[at[3] + j]))


@_sums
def _gather(total: np.ndarray, value: np.ndarray, at: Any, factor: Any) -> None:
    for j in range(np.uintp(total.shape[0])):
        total[j] += factor * widen(value[at + j])


@_sums
def _scatter_one(value: np.ndarray, at: Any, factor: Any, vector: np.ndarray) -> None:
    for j in range(np.uintp(vector.shape[0])):
        value[at + j] += factor * vector[j]


@_function
def _scatter(value: np.ndarray, at: Any, factors: Any, neighbours: int, vector: np.ndarray) -> None:
    if neighbours & UPPER_LEFT:
        _scatter_one(value, at[0], factors[0], vector)
    if neighbours & UPPER_RIGHT:
        _scatter_one(value, at[1], factors[1], vector)
    if neighbours & LOWER_LEFT:
        _scatter_one(value, at[2], factors[2], vector)
    if neighbours & LOWER_RIGHT:
        _scatter_one(value, at[3], factors[3], vector)


@_dot_products
def _dot_four(vector: np.ndarray, value: np.ndarray, at: Any) -> Any:
    zero = type(vector[0])(0)
    of_a, of_b, of_c, of_d = zero, zero, zero, zero
    for j in range(np.uintp(vector.shape[0])):
        of_a += vector[j] * widen(value[at[0] + j])
        of_b += vector[j] * widen(value[at[1] + j])
        of_c += vector[j] * widen(value[at[2] + j])
        of_d += vector[j] * widen(value[at[3] + j])
    return of_a, of_b, of_c, of_d


@_dot_products
def _dot(vector: np.ndarray, value: np.ndarray, at: Any) -> Any:
    total = type(vector[0])(0)
    for j in range(np.uintp(vector.shape[0])):
        total += vector[j] * widen(value[at + j])
    return total


def forward(
    value: np.ndarray,
    strides: tuple[int, int, int, int],
    levels: np.ndarray,
    samples: tuple[np.ndarray, np.ndarray],
    options: tuple[bool, bool, bool],
    output: np.ndarray,
) -> None:
    """Fill `output` [images, queries, heads, D] of a block.

    `strides` are the index of the block's first vector in `value` and the steps from one image, pixel and head to the
    next. `samples` are locations [images, queries, heads, 2 * K] and weights [images, queries, heads, K].
    """
    locations, weights = samples
    images, queries, heads, _ = weights.shape
    channels, step = np.uintp(output.shape[3]), strides[2]
    total = np.empty(channels, weights.dtype)
    for image in range(images):
        for query in range(queries):
            for head in range(heads):
                for j in range(channels):
                    total[j] = 0
                first = 0
                for level in range(levels.shape[0]):
                    height, width = levels[level, HEIGHT], levels[level, WIDTH]
                    origin = strides[0] + image * strides[1] + head * strides[3] + levels[level, START] * step
                    for k in range(first, first + levels[level, POINTS]):
                        x, y = locations[image, query, head, 2 * k], locations[image, query, head, 2 * k + 1]
                        sample = _locate(x, y, height, width, options)
                        neighbours = sample.neighbours
                        if neighbours == 0:
                            continue
                        factors = _factors(sample, weights[image, query, head, k])
                        at = _addresses(origin + sample.pixel * step, step, width)
                        if neighbours == ALL_FOUR:
                            _gather_four(total, value, at, factors)
                            continue
                        if neighbours & UPPER_LEFT:
                            _gather(total, value, at[0], factors[0])
                        if neighbours & UPPER_RIGHT:
                            _gather(total, value, at[1], factors[1])
                        if neighbours & LOWER_LEFT:
                            _gather(total, value, at[2], factors[2])
                        if neighbours & LOWER_RIGHT:
                            _gather(total, value, at[3], factors[3])
                    first += levels[level, POINTS]
                for j in range(channels):
                    output[image, query, head, j] = total[j]


@_function
def _products(vector: np.ndarray, value: np.ndarray, at: Any, neighbours: int) -> Any:
    """Dot products of the gradient of the output with the four neighbours; 0 for one outside the level."""
    if neighbours == ALL_FOUR:
        return _dot_four(vector, value, at)
    zero = type(vector[0])(0)
    return (
        _dot(vector, value, at[0]) if neighbours & UPPER_LEFT else zero,
        _dot(vector, value, at[1]) if neighbours & UPPER_RIGHT else zero,
        _dot(vector, value, at[2]) if neighbours & LOWER_LEFT else zero,
        _dot(vector, value, at[3]) if neighbours & LOWER_RIGHT else zero,
    )


@_function
def _derivatives(sample: Sample, products: Any) -> Any:
    """Derivatives by the pixel coordinates, without the weight, and by the weight."""
    x, y, one = sample.x, sample.y, type(products[0])(1)
    upper, lower = (one - x) * products[0] + x * products[1], (one - x) * products[2] + x * products[3]
    by_x = (one - y) * (products[1] - products[0]) + y * (products[3] - products[2])
    return by_x, lower - upper, (one - y) * upper + y * lower


@_function
def _gradients(sample: Sample, weight: Any, products: Any, options: tuple[bool, bool, bool]) -> Any:
    """Gradients of a sample's location, x and y, and of its weight."""
    zero, clamped = type(weight)(0), options[0] or options[1]
    if sample.neighbours == 0:
        return zero, zero, zero
    by_x, by_y, by_weight = _derivatives(sample, products)
    # Of a clamped coordinate it is 0, also where the pixels or the weight are NaN.
    by_x = zero if clamped and sample.slope_x == 0 else by_x * (weight * sample.slope_x)
    by_y = zero if clamped and sample.slope_y == 0 else by_y * (weight * sample.slope_y)
    return by_x, by_y, by_weight


def backward(
    value: np.ndarray,
    strides: tuple[int, int, int, int],
    levels: np.ndarray,
    samples: tuple[np.ndarray, np.ndarray, np.ndarray],
    options: tuple[bool, bool, bool],
    sums: tuple[np.ndarray, tuple[int, int, int, int], bool],
    gradients: tuple[np.ndarray, np.ndarray, bool],
) -> None:
    """Add to the gradient of value, and fill in those of locations and weights, of a block.

    As in :func:`forward`; `samples` also hold the gradient of the output [images, queries, heads, D]. `sums` are the
    gradient of value, its strides and whether it is wanted. `gradients` are those of locations and weights in the
    shapes of these, and whether they are wanted.
    """
    locations, weights, grad_output = samples
    grad_value, steps, wants_value = sums
    grad_locations, grad_weights, wants_samples = gradients
    images, queries, heads, _ = weights.shape
    channels, vector = np.uintp(grad_output.shape[3]), np.empty(grad_output.shape[3], weights.dtype)
    for image in range(images):
        for head in range(heads):
            origin = strides[0] + image * strides[1] + head * strides[3]
            target = steps[0] + image * steps[1] + head * steps[3]
            for query in range(queries):
                for j in range(channels):
                    vector[j] = grad_output[image, query, head, j]
                first = 0
                for level in range(levels.shape[0]):
                    height, width, start = levels[level, HEIGHT], levels[level, WIDTH], levels[level, START]
                    for k in range(first, first + levels[level, POINTS]):
                        x, y = locations[image, query, head, 2 * k], locations[image, query, head, 2 * k + 1]
                        sample = _locate(x, y, height, width, options)
                        weight, pixel = weights[image, query, head, k], start + sample.pixel
                        if wants_value and sample.neighbours:
                            at = _addresses(target + pixel * steps[2], steps[2], width)
                            _scatter(grad_value, at, _factors(sample, weight), sample.neighbours, vector)
                        if wants_samples:
                            at = _addresses(origin + pixel * strides[2], strides[2], width)
                            found = _gradients(sample, weight, _products(vector, value, at, sample.neighbours), options)
                            grad_locations[image, query, head, 2 * k] = found[0]
                            grad_locations[image, query, head, 2 * k + 1] = found[1]
                            grad_weights[image, query, head, k] = found[2]
                    first += levels[level, POINTS]
