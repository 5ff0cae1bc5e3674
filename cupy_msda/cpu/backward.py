"""The backward of a few heads of one image by NumPy: samples grouped by cell, summed by small matrix products."""

from __future__ import annotations

import itertools
from typing import NamedTuple

import numpy as np

from ..call import Problem
from .sampling import Axis, Rows, chunks, locate, store, to_accumulator
from .scatter import EDGE, Pieces, group, pieces, runs

# Bytes of rows that are gathered and summed at a time. Small enough for the caches and for 32 MiB a thread in all; but
# two threads that run short calls wait for each other at the interpreter's lock: rtdetr_640 (N = 2) took 13.8 ms with
# half of this, 12.1 with this. Measurements are in benchmarks/NOTES.md.
SUMMED_BYTES = 4 << 20
# Samples that are sorted at once: half of this took 20 % longer.
SORTED_SAMPLES = 1 << 17
# Samples whose indices and weights are worked out at once: many short calls less (13.0 ms with half of it).
# Twice as many where all levels are: there is memory left then, and a unit is one block.
PLACED_SAMPLES = 1 << 16
# Samples of a unit up to which all levels are worked on at once, because NumPy's calls cost more than their work (3,000
# queries took 55 ms with this, 66 with half).
JOINED_SAMPLES = 1 << 16


# Of value, locations and weights; None for what is not wanted.
Gradients = tuple[np.ndarray | None, np.ndarray | None, np.ndarray | None]


def backward_unit(
    problem: Problem,
    value: np.ndarray,
    locations: np.ndarray,
    weights: np.ndarray,
    grad_output: np.ndarray,
    grads: Gradients,
    n: int,
    heads: slice,
) -> None:
    """Gradients of some heads, level by level, with the samples grouped by cell; those of `grads` that are not None.

    All samples of a cell share its four pixels, so a cell's part of grad_value is one product
    [4, samples] @ [samples, D] and its dot products with value are another: each sample's row of grad_output
    is gathered once, each pixel a few times, and the scatter is left with distinct rows.
    """
    dtype, bits = np.dtype(problem.accumulator_dtype), problem.location_dtype == "bfloat16"
    Q, B = problem.Q, heads.stop - heads.start
    values = Rows(value, n, heads, Q * problem.K * 4 // problem.S, problem)
    total = None if grads[0] is None else _Total(grads[0], n, heads, values, problem)
    levels, ends = np.array(problem.levels), [0, *itertools.accumulate(problem.points)]
    # Few samples: all levels at once, because NumPy's calls cost more than their work. Many: one by one, because the
    # number of samples of a cell differs from level to level.
    few = Q * problem.K * B <= JOINED_SAMPLES and problem.variant.num_points is None and _disjoint(problem.levels)
    for part in chunks(problem.L, problem.L if few else 1):
        H, W, start = (np.tile(column, B)[:, None] for column in levels[part].T)
        together, P = part.stop - part.start, problem.points[part.start]
        # Place of these levels' points: by level, or in the one dimension of all points.
        points = part if weights.ndim == 5 else slice(ends[part.start], ends[part.stop])
        for block in chunks(Q, max(1, SORTED_SAMPLES // (B * together * P))):
            here = (n, block, heads, points)
            # [heads * levels, queries * points]: each row is grouped by itself.
            where = to_accumulator(locations[here], dtype, bits).reshape(-1, B, together, P, 2).transpose(4, 1, 2, 0, 3)
            x, y = (locate(where[i].reshape(len(W), -1), size, dtype, problem.variant) for i, size in ((0, W), (1, H)))
            attention = to_accumulator(weights[here], dtype, bits).reshape(-1, B, together, P)
            attention = attention.transpose(1, 2, 0, 3).reshape(-1)
            found = None if grads[1] is grads[2] is None else np.zeros((len(attention), 4), dtype)
            incoming = Rows(grad_output[:, block], n, heads, P, problem)
            # Row of grad_output of each sample.
            query = np.repeat(np.arange(block.stop - block.start) * incoming.stride, P)
            query = (np.repeat(incoming.first, together)[:, None] + query).reshape(-1)
            if total:
                total.block += 1
            for some in pieces(group(x, y, H, W), PLACED_SAMPLES * (2 if few else 1)):
                at = some.group
                level = _Level(at // together, H[at, 0], W[at, 0], start[at, 0])
                _backward_pieces(some, level, (x, y, attention), values, (incoming, query), total, found, problem)
            if found is not None:
                by_query = found.reshape(B, together, -1, P, 4).transpose(2, 0, 1, 3, 4)
                shape = weights[here].shape
                if grads[1] is not None:
                    store(grads[1], here, by_query[..., :2].reshape(*shape, 2), problem.location_dtype)
                if grads[2] is not None:
                    store(grads[2], here, by_query[..., 2].reshape(shape), problem.location_dtype)
    if total:
        total.finish()


def _disjoint(levels: tuple[tuple[int, int, int], ...]) -> bool:
    """Whether no pixel belongs to two levels."""
    spans = sorted((start, start + h * w) for h, w, start in levels)
    return all(end <= begin for (_, end), (begin, _) in itertools.pairwise(spans))


class _Total:
    """The sums of grad_value of a unit: in place where few rows are touched and the dtype allows it, else apart."""

    def __init__(self, grad: np.ndarray, n: int, heads: slice, like: Rows, problem: Problem) -> None:
        self.grad, self.n, self.heads, self.dtype = grad, n, heads, problem.value_dtype
        self.apart = like.stride == 1 or grad.dtype != like.dtype
        if self.apart:
            self.stride, self.first = 1, np.arange(like.heads) * problem.S
            self.flat = np.zeros((like.heads * problem.S, problem.D), like.dtype)
        else:
            self.stride, self.first = like.stride, like.first
            self.flat = grad[n].reshape(-1, problem.D)
        self.items = _items(self.flat)
        self.block = 0
        self.fresh: tuple[int, int] | None = None

    def add(self, rows: np.ndarray, sums: np.ndarray, turn: int) -> None:
        """Add `sums` [rows, D], which it changes, to rows; all of one block and turn differ."""
        # The first turn of all meets zeros only; it is over once another one came.
        if (self.block, turn) != self.fresh:
            self.fresh = (self.block, turn) if self.fresh is None else (0, 0)
        if self.fresh == (0, 0):
            sums += np.take(self.flat, rows, axis=0, mode="clip")
        self.items[rows] = _items(sums)

    def finish(self) -> None:
        """Round and store what was summed apart."""
        if self.apart:
            by_head = self.flat.reshape(self.heads.stop - self.heads.start, -1, self.flat.shape[1])
            store(self.grad, (self.n, slice(None), self.heads), by_head.transpose(1, 0, 2), self.dtype)


def _items(array: np.ndarray) -> np.ndarray:
    """The rows of a contiguous array as items: NumPy scatters one item in half the time of a row of numbers."""
    return array.view(np.dtype((np.void, array.shape[-1] * array.itemsize)))[..., 0]


class _Level(NamedTuple):
    """Where pieces lie: their head, and their level's size and first row."""

    head: np.ndarray
    H: np.ndarray
    W: np.ndarray
    start: np.ndarray


def _corner_rows(pixel: np.ndarray, level: _Level, stride: int, first: np.ndarray) -> np.ndarray:
    """Rows [pieces, 4] of the pixels around cells; column by column, because NumPy is slow along short dimensions."""
    rows = np.empty((len(pixel), 4), np.intp)
    rows[:, 0] = pixel * stride + first[level.head]
    rows[:, 1] = rows[:, 0] + stride
    rows[:, 2] = rows[:, 0] + level.W * stride
    rows[:, 3] = rows[:, 2] + stride
    return rows


def _slope(axis: Axis, some: Pieces) -> np.ndarray:
    """Pixels a unit of the location: of each piece, or of each sample where some are clamped."""
    return axis.slope[some.group] if axis.slope.shape[1] == 1 else np.take(axis.slope.reshape(-1), some.samples)


def _backward_pieces(
    some: Pieces,
    level: _Level,
    of_samples: tuple[Axis, Axis, np.ndarray],
    values: Rows,
    incoming: tuple[Rows, np.ndarray],
    total: _Total | None,
    found: np.ndarray | None,
    problem: Problem,
) -> None:
    """The part of some cells in the sums of grad_value; in `found`, the gradients (x, y, weight) of samples; each
    where it is wanted.

    What is one number a sample or a corner is worked out for all pieces at once; rows of D, SUMMED_BYTES at a time.
    """
    x, y, attention = of_samples
    nearest = problem.variant.nearest
    left, right = some.column >= 0, (some.column < level.W - 1) & (not nearest)
    top, bottom = some.row >= 0, (some.row < level.H - 1) & (not nearest)
    inside = np.stack((top & left, top & right, bottom & left, bottom & right), axis=1)
    pixel = level.start + some.row * level.W + some.column
    rows_in, rows_value = np.take(incoming[1], some.samples), _corner_rows(pixel, level, values.stride, values.first)

    # Corner by corner, contiguous: strided by corner, each of these steps takes two to four times as long. Padding
    # repeats a sample, so that storing its gradient twice changes nothing, and gets no weight in the sums.
    ax, ay, strength = (np.take(a.reshape(-1), some.samples) for a in (x.fraction, y.fraction, attention))
    left, top = 1 - ax, 1 - ay
    D, T, dtype = incoming[0].flat.shape[1], ax.shape[1], ax.dtype
    if total is not None:
        rows_total = _corner_rows(pixel, level, total.stride, total.first) if total.apart else rows_value
        scale, real = np.empty((4, *ax.shape), dtype), strength * some.real
        for c, (vertical, horizontal) in enumerate(itertools.product((top, ay), (left, ax))):
            np.multiply(vertical, horizontal, out=scale[c])
            scale[c] *= real
    dots = np.empty((len(ax), 4, T), dtype)
    for part in chunks(len(ax), max(1, SUMMED_BYTES // ((T + 16) * D * dtype.itemsize))):
        rows = incoming[0].take(rows_in[part])
        if found is not None:
            pixels = values.take(rows_value[part])
            if not inside[part].all():
                pixels[~inside[part]] = 0
            np.matmul(pixels, rows.transpose(0, 2, 1), out=dots[part])
        if total is not None:
            sums = np.matmul(scale[:, part].transpose(1, 0, 2), rows)
            for same in runs(some.turn[part]):
                at = slice(part.start + same.start, part.start + same.stop)
                turn, here, these = int(some.turn[at.start]), rows_total[at].reshape(-1), sums[same].reshape(-1, D)
                if turn & EDGE or nearest:
                    pick = np.flatnonzero(inside[at])
                    here, these = np.take(here, pick), np.take(these, pick, axis=0)
                total.add(here, these, turn)

    if found is not None:
        dots = np.ascontiguousarray(dots.transpose(1, 0, 2))
        upper, lower = left * dots[0] + ax * dots[1], left * dots[2] + ax * dots[3]
        gradient = np.empty((*ax.shape, 4), dtype)
        across, down = top * (dots[1] - dots[0]) + ay * (dots[3] - dots[2]), lower - upper
        for i, (axis, step) in enumerate(((x, across), (y, down))):
            slope = _slope(axis, some)
            np.multiply(step, strength * slope, out=gradient[..., i])
            if problem.variant.clamped:
                np.copyto(gradient[..., i], 0, where=slope == 0)  # whatever the pixels are
        np.add(top * upper, ay * lower, out=gradient[..., 2])
        _items(found)[some.samples] = _items(gradient)
