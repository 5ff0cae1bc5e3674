"""The forward by NumPy: gather the four neighbours of every sample, and one matrix product per query and head."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from . import threads
from .sampling import ChannelVectors, Coordinate, from_accumulator, to_accumulator, to_pixels
from .tasks import Inputs, Task, divide, ranges

# Bytes of value vectors that are gathered at a time: few enough for the caches, and enough that threads seldom wait at
# the interpreter's lock (docs/performance/decisions.md#cpu-gathered-bytes).
GATHERED_BYTES = 2 << 20
# Samples whose neighbours are located at once, for many gathers: for one gather, NumPy's calls would cost more than the
# arithmetic (docs/performance/decisions.md#cpu-located-samples).
LOCATED_SAMPLES = 1 << 15


def plain_forward(inputs: Inputs) -> np.ndarray:
    """Output [N, Q, M*D] in the storage dtype of value."""
    problem = inputs.problem
    output = np.zeros((problem.N, problem.Q, problem.M, problem.D), inputs.value.dtype)
    if not problem.empty:
        tasks = divide(problem, inputs.lengths)
        threads.run_tasks(tasks, lambda task: forward_task(task, inputs, output), inputs.threads)
    return output.reshape(problem.output_shape)


def forward_task(task: Task, inputs: Inputs, output: np.ndarray) -> None:
    """Fill the part of `output` [N, Q, M, D] that belongs to this task."""
    problem = task.problem
    K, D, dtype = problem.K, problem.D, np.dtype(problem.accumulator_dtype)
    value = ChannelVectors(inputs.value, task, uses=problem.Q * K * 4 // problem.S)
    levels = _levels_of_samples(task, value)
    corner_count = len(problem.variant.neighbours) ** 2
    step = max(1, GATHERED_BYTES // (K * corner_count * D * dtype.itemsize))
    for queries in ranges(problem.Q, max(1, LOCATED_SAMPLES // (task.head_count * K))):
        corners = _locate_corners(task, inputs, queries, levels)
        result = np.empty((len(corners.indices), 1, D), dtype)
        for part in ranges(len(result), step):
            np.matmul(corners.weights[part], value.gather(corners.indices[part]), out=result[part])
        if not np.isfinite(result.sum()):
            _exclude_absent_corners(result, value, corners, step)
        cast = from_accumulator(result, output.dtype, problem.value_dtype)
        task.write(output, cast.reshape(-1, task.head_count, D), queries)


class _Levels(NamedTuple):
    """The level of each sample of a query [heads * K]: its size, and the indices of its vectors.

    Arrays are [queries, heads * K], because NumPy is slow along short dimensions.
    """

    H: np.ndarray
    W: np.ndarray
    first: np.ndarray
    pixel_stride: int


def _levels_of_samples(task: Task, value: ChannelVectors) -> _Levels:
    problem = task.problem
    assert problem.levels is not None
    per_level = np.array(problem.levels).T
    H, W, start = (np.tile(np.repeat(column, problem.points), task.head_count) for column in per_level)
    first = start * value.pixel_stride + np.repeat(value.head_offset, problem.K)
    return _Levels(H, W, first, value.pixel_stride)


class _Corners(NamedTuple):
    """The neighbours of the samples of some queries, for one matrix product per query and head.

    `indices` [queries * heads, corners * K] are those of value vectors, `weights` has the shape [.., 1, corners * K]. A
    corner outside the level has weight 0 and the index of a pixel inside.
    """

    indices: np.ndarray
    weights: np.ndarray
    rows: list[_Neighbour]
    columns: list[_Neighbour]
    in_bounds: np.ndarray

    def absent(self) -> np.ndarray:
        """Which corners are outside their level, or of a sample out of bounds; the shape of `indices`."""
        masks = [row.inside & column.inside & self.in_bounds for row in self.rows for column in self.columns]
        K = self.indices.shape[1] // len(masks)
        return ~np.stack([mask.reshape(-1, K) for mask in masks], axis=1).reshape(self.indices.shape)


def _locate_corners(task: Task, inputs: Inputs, queries: slice, levels: _Levels) -> _Corners:
    problem = task.problem
    assert inputs.weights is not None
    K, dtype, bfloat16 = problem.K, np.dtype(problem.accumulator_dtype), problem.location_dtype == "bfloat16"
    samples = task.head_count * K
    locations = to_accumulator(task.read(inputs.locations, queries), dtype, bfloat16)
    weights = to_accumulator(task.read(inputs.weights, queries), dtype, bfloat16).reshape(-1, samples)
    x, y = (
        to_pixels(locations[..., axis].reshape(-1, samples), size, dtype, problem.variant)
        for axis, size in ((0, levels.W), (1, levels.H))
    )
    offsets = problem.variant.neighbours
    columns = [_neighbour(x, levels.W, offset) for offset in offsets]
    rows = [_neighbour(y, levels.H, offset) for offset in offsets]
    count, corner_count = weights.size // K, len(offsets) ** 2
    corner_weights = np.empty((count, corner_count, K), dtype)
    indices = np.empty((count, corner_count, K), np.intp)
    for j, row in enumerate(rows):
        row_index = row.pixel * (levels.W * levels.pixel_stride) + levels.first
        row_weight = row.weight * weights
        for i, column in enumerate(columns):
            corner = len(offsets) * j + i
            np.multiply(row_weight.reshape(-1, K), column.weight.reshape(-1, K), out=corner_weights[:, corner])
            index = (row_index + column.pixel * levels.pixel_stride).reshape(-1, K)
            np.copyto(indices[:, corner], index, casting="unsafe")
    shape = (count, corner_count * K)
    in_bounds = x.in_bounds & y.in_bounds
    return _Corners(indices.reshape(shape), corner_weights.reshape(count, 1, -1), rows, columns, in_bounds)


def _exclude_absent_corners(result: np.ndarray, value: ChannelVectors, corners: _Corners, step: int) -> None:
    """Compute the results that are not finite again, without corners outside the level.

    An absent corner reads a pixel inside with weight 0. That adds nothing, unless NaN or infinity is there.
    """
    not_finite = np.flatnonzero(~np.isfinite(result).all((1, 2)))
    absent = corners.absent()
    for part in ranges(len(not_finite), step):
        chosen = not_finite[part]
        vectors, weights = value.gather(corners.indices[chosen]), corners.weights[chosen]
        vectors[absent[chosen]] = 0
        weights[absent[chosen][:, None]] = 0
        result[chosen] = np.matmul(weights, vectors)


class _Neighbour(NamedTuple):
    """One of the two pixels around a coordinate, clamped into the level (a float), its weight, whether it is inside."""

    pixel: np.ndarray
    weight: np.ndarray
    inside: np.ndarray


def _neighbour(axis: Coordinate, size: np.ndarray, offset: int) -> _Neighbour:
    pixel = axis.floor + offset
    inside = (pixel >= 0) & (pixel < size)
    weight = (axis.fraction if offset else 1 - axis.fraction) * inside
    np.maximum(pixel, 0, out=pixel)
    return _Neighbour(np.minimum(pixel, size - 1, out=pixel), weight, inside)
