"""The backward by NumPy: samples are grouped by cell, and summed by small matrix products.

All samples of a cell share its four pixels. So a cell's part of grad_value is one product [4, samples] @ [samples, D],
and its dot products with value are another. Each vector of grad_output is gathered once per sample and each pixel a few
times, and the scatter is left with distinct pixels.
"""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from ..call import Variant, Wanted
from . import threads
from .cells import EDGE, Groups, equal_ranges, find_cells, group_samples
from .sampling import ChannelVectors, Coordinate, from_accumulator, to_accumulator, to_pixels
from .scatter import ValueGradient, as_items
from .tasks import Gradients, Inputs, Task, divide, ranges

# Bytes of vectors that are gathered and summed at a time: few enough for the caches and for 32 MiB per thread in all,
# and enough that threads seldom wait at the interpreter's lock (docs/performance/decisions.md#cpu-summed-bytes).
SUMMED_BYTES = 4 << 20
# Samples that are sorted at once (docs/performance/decisions.md#cpu-sorted-samples).
SORTED_SAMPLES = 1 << 17
# Samples whose indices and weights are computed at once (docs/performance/decisions.md#cpu-placed-samples). Twice as
# many where all levels are: a task is one block then, and there is memory left.
PLACED_SAMPLES = 1 << 16
# Samples of a task up to which all levels are worked on at once: NumPy's calls cost more than the arithmetic of fewer
# (docs/performance/decisions.md#cpu-all-levels-at-once).
ALL_LEVELS_SAMPLES = 1 << 16


def plain_backward(inputs: Inputs, wanted: Wanted) -> Gradients:
    """Gradients of value, locations and weights, each in the storage dtype of its input."""
    problem = inputs.problem
    assert inputs.weights is not None
    assert inputs.grad_output is not None
    gradients = Gradients(
        value=np.zeros(inputs.value.shape, inputs.value.dtype) if wanted.value else None,
        locations=np.zeros(inputs.locations.shape, inputs.locations.dtype) if wanted.locations else None,
        weights=np.zeros(inputs.weights.shape, inputs.weights.dtype) if wanted.weights else None,
    )
    if not problem.empty and any(wanted):
        by_head = inputs.grad_output.reshape(problem.N, problem.Q, problem.M, problem.D)
        inputs = replace(inputs, grad_output=by_head)
        tasks = divide(problem, inputs.lengths)
        threads.run_tasks(tasks, lambda task: backward_task(task, inputs, gradients), inputs.threads)
    return gradients


def backward_task(task: Task, inputs: Inputs, gradients: Gradients) -> None:
    """Fill the parts of the gradients that belong to this task; those that are None are not computed.

    `grad_output` of `inputs` is [N, Q, M, D].
    """
    problem = task.problem
    assert problem.levels is not None
    Q, B = problem.Q, task.head_count
    value = ChannelVectors(inputs.value, task, uses=Q * problem.K * 4 // problem.S)
    grad_value = None if gradients.value is None else ValueGradient(gradients.value, task, value)
    # The number of samples per cell differs between levels, so that many samples are grouped level by level.
    all_levels = (
        Q * problem.K * B <= ALL_LEVELS_SAMPLES and problem.variant.num_points is None and _disjoint(problem.levels)
    )
    placed = PLACED_SAMPLES * (2 if all_levels else 1)
    for levels in ranges(problem.L, problem.L if all_levels else 1):
        planes = _planes_of(task, levels, levels_apart=inputs.locations.ndim == 6)
        step = max(1, SORTED_SAMPLES // (B * (levels.stop - levels.start) * problem.points[levels.start]))
        for queries in ranges(Q, step):
            block = _read_block(task, inputs, planes, queries)
            wants_samples = not (gradients.locations is None and gradients.weights is None)
            sample_gradients = np.zeros((len(block.weights), 4), value.dtype) if wants_samples else None
            sums = _Sums(value, grad_value, sample_gradients)
            if grad_value is not None:
                grad_value.next_block()
            for groups in group_samples(find_cells(block.x, block.y, planes.H, planes.W), placed):
                _backward_groups(groups, block, sums)
            if sample_gradients is not None:
                _store_sample_gradients(sample_gradients, block, gradients, task)
    if grad_value is not None:
        grad_value.finish()


def _disjoint(levels: tuple[tuple[int, int, int], ...]) -> bool:
    """Whether no pixel belongs to two levels."""
    spans = sorted((start, start + h * w) for h, w, start in levels)
    return all(end <= begin for (_, end), (begin, _) in itertools.pairwise(spans))


class _Planes(NamedTuple):
    """Some levels of each head of a task: [planes, 1] each. `points` is where their samples are in the inputs."""

    levels: slice
    points: slice
    head: np.ndarray
    H: np.ndarray
    W: np.ndarray
    start: np.ndarray

    @property
    def level_count(self) -> int:
        return self.levels.stop - self.levels.start


def _planes_of(task: Task, levels: slice, levels_apart: bool) -> _Planes:
    """The planes of some levels; `levels_apart`: the inputs have a dimension of levels, and not of all points."""
    problem = task.problem
    count = levels.stop - levels.start
    H, W, start = (np.tile(column, task.head_count)[:, None] for column in np.array(problem.levels)[levels].T)
    head = np.repeat(np.arange(task.head_count), count)[:, None]
    ends = [0, *itertools.accumulate(problem.points)]
    points = levels if levels_apart else slice(ends[levels.start], ends[levels.stop])
    return _Planes(levels, points, head, H, W, start)


class _Block(NamedTuple):
    """The samples of some queries and planes, which are sorted at once.

    `x` and `y` are [planes, queries * P]; the others are flat in that order. `grad_output_index` is the index of each
    sample's vector of grad_output.
    """

    planes: _Planes
    queries: slice
    variant: Variant
    x: Coordinate
    y: Coordinate
    weights: np.ndarray
    grad_output: ChannelVectors
    grad_output_index: np.ndarray


def _read_block(task: Task, inputs: Inputs, planes: _Planes, queries: slice) -> _Block:
    problem = task.problem
    assert inputs.weights is not None
    assert inputs.grad_output is not None
    dtype, bfloat16 = np.dtype(problem.accumulator_dtype), problem.location_dtype == "bfloat16"
    B, levels, P = task.head_count, planes.level_count, problem.points[planes.levels.start]
    locations = to_accumulator(task.read(inputs.locations, queries, planes.points), dtype, bfloat16)
    by_plane = locations.reshape(-1, B, levels, P, 2).transpose(4, 1, 2, 0, 3)
    x, y = (
        to_pixels(by_plane[axis].reshape(B * levels, -1), size, dtype, problem.variant)
        for axis, size in ((0, planes.W), (1, planes.H))
    )
    weights = to_accumulator(task.read(inputs.weights, queries, planes.points), dtype, bfloat16)
    vectors = ChannelVectors(inputs.grad_output[:, queries], task, uses=P)
    of_query = np.repeat(np.arange(queries.stop - queries.start) * vectors.pixel_stride, P)
    of_plane = np.repeat(vectors.head_offset, levels)
    return _Block(
        planes=planes,
        queries=queries,
        variant=problem.variant,
        x=x,
        y=y,
        weights=weights.reshape(-1, B, levels, P).transpose(1, 2, 0, 3).reshape(-1),
        grad_output=vectors,
        grad_output_index=(of_plane[:, None] + of_query).reshape(-1),
    )


def _store_sample_gradients(sample_gradients: np.ndarray, block: _Block, gradients: Gradients, task: Task) -> None:
    """Cast the gradients (x, y, weight, unused) of a block's samples into those of locations and weights."""
    levels, P = block.planes.level_count, task.problem.points[block.planes.levels.start]
    by_query = sample_gradients.reshape(task.head_count, levels, -1, P, 4).transpose(2, 0, 1, 3, 4)
    dtype = task.problem.location_dtype
    for grad, part in ((gradients.locations, by_query[..., :2]), (gradients.weights, by_query[..., 2])):
        if grad is not None:
            task.write(grad, from_accumulator(part, grad.dtype, dtype), block.queries, block.planes.points)


class _Sums(NamedTuple):
    """What the groups of a block are multiplied with and added to; None for gradients that are not wanted."""

    value: ChannelVectors
    grad_value: ValueGradient | None
    sample_gradients: np.ndarray | None


class _Corners(NamedTuple):
    """The four pixels of each group [groups, 4]: in `inside` where they exist, and their indices."""

    inside: np.ndarray
    value_index: np.ndarray
    grad_value_index: np.ndarray


def _corners_of(groups: Groups, block: _Block, sums: _Sums) -> _Corners:
    planes, at = block.planes, groups.plane
    head, H, W, start = planes.head[at, 0], planes.H[at, 0], planes.W[at, 0], planes.start[at, 0]
    left, right = groups.column >= 0, (groups.column < W - 1) & (not block.variant.nearest)
    top, bottom = groups.row >= 0, (groups.row < H - 1) & (not block.variant.nearest)
    inside = np.stack((top & left, top & right, bottom & left, bottom & right), axis=1)
    pixel = start + groups.row * W + groups.column

    def indices(vectors: ChannelVectors | ValueGradient) -> np.ndarray:
        # Column by column, because NumPy is slow along short dimensions.
        stride = vectors.pixel_stride
        result = np.empty((len(pixel), 4), np.intp)
        result[:, 0] = pixel * stride + vectors.head_offset[head]
        result[:, 1] = result[:, 0] + stride
        result[:, 2] = result[:, 0] + W * stride
        result[:, 3] = result[:, 2] + stride
        return result

    value_index = grad_value_index = indices(sums.value)
    if sums.grad_value is not None and sums.grad_value.buffered:
        grad_value_index = indices(sums.grad_value)
    return _Corners(inside, value_index, grad_value_index)


class _GroupSamples(NamedTuple):
    """The fractions and the weight of each sample of some groups [groups, T]."""

    ax: np.ndarray
    ay: np.ndarray
    weight: np.ndarray


def _backward_groups(groups: Groups, block: _Block, sums: _Sums) -> None:
    """Add the part of some cells to the sums of grad_value, and fill in the gradients of their samples.

    Numbers per sample or corner are computed for all groups at once; vectors of D, SUMMED_BYTES at a time.
    """
    corners = _corners_of(groups, block, sums)
    fractions = (block.x.fraction, block.y.fraction, block.weights)
    samples = _GroupSamples(*(np.take(array.reshape(-1), groups.samples) for array in fractions))
    vector_index = np.take(block.grad_output_index, groups.samples)
    D, T, dtype = sums.value.flat.shape[1], samples.ax.shape[1], samples.ax.dtype
    corner_weights = None if sums.grad_value is None else _corner_weights(samples, groups)
    dots = None if sums.sample_gradients is None else np.empty((len(vector_index), 4, T), dtype)
    for part in ranges(len(vector_index), max(1, SUMMED_BYTES // ((T + 16) * D * dtype.itemsize))):
        vectors = block.grad_output.gather(vector_index[part])
        if dots is not None:
            pixels = sums.value.gather(corners.value_index[part])
            inside = corners.inside[part]
            if not inside.all():
                pixels[~inside] = 0
            np.matmul(pixels, vectors.transpose(0, 2, 1), out=dots[part])
        if sums.grad_value is not None and corner_weights is not None:
            factors = corner_weights[:, part].transpose(1, 0, 2)
            products = np.matmul(factors, vectors)
            if not np.isfinite(products.sum()):
                vectors[~groups.real[part]] = 0  # padding: its factor 0 times infinity is NaN
                np.matmul(factors, vectors, out=products)
            for same in equal_ranges(groups.scatter_pass[part]):
                at = slice(part.start + same.start, part.start + same.stop)
                scatter_pass, indices = int(groups.scatter_pass[at.start]), corners.grad_value_index[at].reshape(-1)
                added = products[same].reshape(-1, D)
                if scatter_pass & EDGE or block.variant.nearest:
                    exist = np.flatnonzero(corners.inside[at])
                    indices, added = np.take(indices, exist), np.take(added, exist, axis=0)
                sums.grad_value.add(indices, added, scatter_pass)
    if sums.sample_gradients is not None and dots is not None:
        as_items(sums.sample_gradients)[groups.samples] = as_items(_gradients_of(dots, samples, groups, block))


def _corner_weights(samples: _GroupSamples, groups: Groups) -> np.ndarray:
    """Factor of each sample's vector in the sum of each corner [4, groups, T]; 0 for padding.

    Contiguous per corner: strided, each step takes longer (docs/performance/decisions.md#cpu-corner-arrays).
    """
    left, top = 1 - samples.ax, 1 - samples.ay
    result, real = np.empty((4, *samples.ax.shape), samples.ax.dtype), np.where(groups.real, samples.weight, 0)
    for corner, (vertical, horizontal) in enumerate(itertools.product((top, samples.ay), (left, samples.ax))):
        np.multiply(vertical, horizontal, out=result[corner])
        result[corner] *= real
    return result


def _gradients_of(dots: np.ndarray, samples: _GroupSamples, groups: Groups, block: _Block) -> np.ndarray:
    """Gradients (x, y, weight, unused) of each sample [groups, T, 4], from the products with the four pixels.

    Padding repeats a sample, so that it stores the same gradient twice.
    """
    ax, ay, weight = samples
    left, top = 1 - ax, 1 - ay
    dots = np.ascontiguousarray(dots.transpose(1, 0, 2))
    upper, lower = left * dots[0] + ax * dots[1], left * dots[2] + ax * dots[3]
    result = np.empty((*ax.shape, 4), ax.dtype)
    by_x, by_y = top * (dots[1] - dots[0]) + ay * (dots[3] - dots[2]), lower - upper
    for i, (coordinate, derivative) in enumerate(((block.x, by_x), (block.y, by_y))):
        slope = _slope_of(coordinate, groups)
        np.multiply(derivative, weight * slope, out=result[..., i])
        if block.variant.clamped:
            np.copyto(result[..., i], 0, where=slope == 0)  # also where the pixels or the weight are NaN
    np.add(top * upper, ay * lower, out=result[..., 2])
    return result


def _slope_of(coordinate: Coordinate, groups: Groups) -> np.ndarray:
    """The slope of each group, or of each sample where some are clamped."""
    if coordinate.slope.shape[1] == 1:
        return coordinate.slope[groups.plane]
    return np.take(coordinate.slope.reshape(-1), groups.samples)
