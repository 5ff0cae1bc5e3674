"""The forward of a few heads of one image by NumPy: four rows of every sample, and one matrix product a corner."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from ..call import Problem
from .sampling import Axis, Rows, chunks, from_accumulator, locate, to_accumulator

# Bytes of rows that are gathered at a time: small enough for the caches, and large enough that threads seldom wait for
# each other at the interpreter's lock (benchmarks/NOTES.md).
GATHERED_BYTES = 2 << 20
# Samples whose cells are worked out at once.
LOCATED_SAMPLES = 1 << 15


def forward_unit(
    problem: Problem,
    value: np.ndarray,
    locations: np.ndarray,
    weights: np.ndarray,
    output: np.ndarray,
    n: int,
    heads: slice,
) -> None:
    """Fill the part of `output` [N, Q, M, D] that belongs to image `n` and `heads`."""
    dtype, bits = np.dtype(problem.accumulator_dtype), problem.location_dtype == "bfloat16"
    K, D, B = problem.K, problem.D, heads.stop - heads.start
    source = Rows(value, n, heads, problem.Q * K * 4 // problem.S, problem)
    # Of each sample of a query, so that arrays are [queries, samples]: NumPy is slow along short dimensions.
    H, W, start = (np.tile(np.repeat(column, problem.points), B) for column in zip(*problem.levels, strict=True))
    first = start * source.stride + np.repeat(source.first, K)
    near = problem.variant.neighbours
    C = len(near) ** 2
    step = max(1, GATHERED_BYTES // (K * C * D * dtype.itemsize))
    # Cells are located for many chunks at once: at one chunk the calls cost more than the arithmetic.
    for block in chunks(problem.Q, max(1, LOCATED_SAMPLES // (B * K))):
        where = to_accumulator(locations[n, block, heads], dtype, bits)
        attention = to_accumulator(weights[n, block, heads], dtype, bits).reshape(-1, B * K)
        x, y = (locate(where[..., i].reshape(-1, B * K), size, dtype, problem.variant) for i, size in ((0, W), (1, H)))
        columns, lines = ([_corner(axis, size, after) for after in near] for axis, size in ((x, W), (y, H)))
        # [queries * heads, C corners, samples]: one matrix product a query and head.
        count = attention.size // K
        scale, rows = np.empty((count, C, K), dtype), np.empty((count, C, K), np.intp)
        for below, line in enumerate(lines):
            base, strength = line.pixel * (W * source.stride) + first, line.weight * attention
            for right, column in enumerate(columns):
                corner = len(near) * below + right
                np.multiply(strength.reshape(-1, K), column.weight.reshape(-1, K), out=scale[:, corner])
                index = (base + column.pixel * source.stride).reshape(-1, K)
                np.copyto(rows[:, corner], index, casting="unsafe")
        scale, rows = scale.reshape(-1, 1, C * K), rows.reshape(-1, C * K)
        result = np.empty((count, 1, D), dtype)
        for chunk in chunks(count, step):
            np.matmul(scale[chunk], source.take(rows[chunk]), out=result[chunk])
        if not np.isfinite(result.sum()):
            odd = np.flatnonzero(~np.isfinite(result).all((1, 2)))
            # Absent corners stood for the pixel next to them, with weight 0: nothing, unless NaN or infinity is there.
            counts = x.counts & y.counts
            inside = [(line.inside & column.inside & counts).reshape(-1, K) for line in lines for column in columns]
            absent = ~np.stack(inside, axis=1).reshape(-1, C * K)
            for chunk in chunks(len(odd), step):
                pick = odd[chunk]
                taken, strength = source.take(rows[pick]), scale[pick]
                taken[absent[pick]] = 0
                strength[absent[pick][:, None]] = 0
                result[pick] = np.matmul(strength, taken)
        output[n, block, heads] = from_accumulator(result, output.dtype, problem.value_dtype).reshape(-1, B, D)


class _Corner(NamedTuple):
    """One of the two pixels around a coordinate: the nearest that exists (as a float), its weight, whether it is it."""

    pixel: np.ndarray
    weight: np.ndarray
    inside: np.ndarray


def _corner(axis: Axis, size: np.ndarray, after: int) -> _Corner:
    pixel = axis.before + after
    inside = (pixel >= 0) & (pixel < size)
    weight = (axis.fraction if after else 1 - axis.fraction) * inside
    np.maximum(pixel, 0, out=pixel)
    return _Corner(np.minimum(pixel, size - 1, out=pixel), weight, inside)
