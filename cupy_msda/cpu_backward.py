"""The backward of a few heads of one image by NumPy: samples sorted by cell, summed by small matrix products."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from .cpu_rows import Axis, Rows, chunks, locate, store, to_accumulator
from .problem import Problem

# Bytes of rows that are gathered and summed at a time. Small enough for the caches and for 32 MiB a thread in all; but
# two threads that run short calls wait for each other at the interpreter's lock: encoder_800x1333 on 2 threads took
# 605 ms with 512 KB. Measurements are in benchmarks/NOTES.md.
SUMMED_BYTES = 6 << 20
# Samples that are sorted at once: half of this took 20 % longer.
SORTED_SAMPLES = 1 << 17
# Samples of a unit up to which all levels are worked on at once, because NumPy's calls cost more than their work (3,000
# queries took 55 ms with this, 66 with half).
JOINED_SAMPLES = 1 << 16
# Most samples of a cell that are summed by one matrix product.
LONGEST_PIECE = 256


def backward_unit(
    problem: Problem,
    value: np.ndarray,
    locations: np.ndarray,
    weights: np.ndarray,
    grad_output: np.ndarray,
    grads: tuple[np.ndarray, np.ndarray, np.ndarray],
    n: int,
    heads: slice,
) -> None:
    """Gradients of some heads, level by level, with the samples sorted by cell.

    All samples of a cell share its four pixels, so a cell's part of grad_value is one product
    [4, samples] @ [samples, D] and its dot products with value are another: each sample's row of grad_output
    is gathered once, each pixel a few times, and the scatter is left with distinct rows.
    """
    dtype, bits = np.dtype(problem.accumulator_dtype), problem.location_dtype == "bfloat16"
    Q, P, B = problem.Q, problem.P, heads.stop - heads.start
    values = Rows(value, n, heads, Q * problem.L * P * 4 // problem.S, problem)
    total = _Total(grads[0], n, heads, values, problem)
    levels = np.array(problem.levels)
    # Few samples: all levels at once, because NumPy's calls cost more than their work. Many: one by one, because the
    # number of samples of a cell differs from level to level.
    together = problem.L if Q * problem.L * P * B <= JOINED_SAMPLES and _disjoint(problem.levels) else 1
    limit = SUMMED_BYTES // (problem.D * dtype.itemsize)
    for part in chunks(problem.L, together):
        H, W, start = (np.tile(column, B)[:, None] for column in levels[part].T)
        for block in chunks(Q, max(1, SORTED_SAMPLES // (B * together * P))):
            # [heads * levels, queries * points]: each row is sorted by itself.
            where = to_accumulator(locations[n, block, heads, part], dtype, bits).transpose(4, 1, 2, 0, 3)
            x, y = (locate(where[i].reshape(len(W), -1), size, dtype) for i, size in ((0, W), (1, H)))
            attention = to_accumulator(weights[n, block, heads, part], dtype, bits).transpose(1, 2, 0, 3).reshape(-1)
            found = np.zeros((len(attention), 4), dtype)
            incoming = Rows(grad_output[:, block], n, heads, P, problem)
            # Row of grad_output of each sample.
            query = np.repeat(np.arange(block.stop - block.start) * incoming.stride, P)
            query = (np.repeat(incoming.first, len(levels[part]))[:, None] + query).reshape(-1)
            for cells in _cells(x, y, H, W, limit):
                at = cells.row_of_samples
                grid = _Grid(at // len(levels[part]), H[at, 0], W[at, 0], start[at, 0])
                _backward_cells(cells, grid, x, y, attention, values, (incoming, query), total, found)
            by_query = found.reshape(B, len(levels[part]), -1, P, 4).transpose(2, 0, 1, 3, 4)
            store(grads[1], (n, block, heads, part), by_query[..., :2], problem.location_dtype)
            store(grads[2], (n, block, heads, part), by_query[..., 2], problem.location_dtype)
    total.finish()


def _disjoint(levels: tuple[tuple[int, int, int], ...]) -> bool:
    """Whether no pixel belongs to two levels."""
    spans = sorted((start, start + h * w) for h, w, start in levels)
    return all(end <= begin for (_, end), (begin, _) in itertools.pairwise(spans))


class _Total:
    """The sums of grad_value of a unit: in place where few rows are touched and the dtype allows it, else apart."""

    def __init__(self, grad: np.ndarray, n: int, heads: slice, like: Rows, problem: Problem) -> None:
        self.grad, self.n, self.heads, self.dtype = grad, n, heads, problem.value_dtype
        in_place = like.stride != 1 and grad.dtype == like.dtype
        self.stride, self.first = (like.stride, like.first) if in_place else (1, np.arange(like.heads) * problem.S)
        if in_place:
            self.flat = grad[n].reshape(-1, problem.D)
        else:
            self.flat = np.zeros((like.heads * problem.S, problem.D), like.dtype)
        self.apart = not in_place
        self.items = _items(self.flat)

    def add(self, rows: np.ndarray, sums: np.ndarray) -> None:
        """Add `sums` [rows, D] to distinct rows."""
        old = np.take(self.flat, rows, axis=0, mode="clip")
        old += sums
        self.items[rows] = _items(old)

    def finish(self) -> None:
        """Round and store what was summed apart."""
        if self.apart:
            by_head = self.flat.reshape(self.heads.stop - self.heads.start, -1, self.flat.shape[1])
            store(self.grad, (self.n, slice(None), self.heads), by_head.transpose(1, 0, 2), self.dtype)


def _items(array: np.ndarray) -> np.ndarray:
    """The rows of a contiguous array as items: NumPy scatters one item in half the time of a row of numbers."""
    return array.view(np.dtype((np.void, array.shape[-1] * array.itemsize)))[..., 0]


class _Cells(NamedTuple):
    """Samples grouped by cell: `samples` [pieces, T], `real` where not padding; of each piece the row of samples that
    it is from, and the row and column of its cell's upper left pixel, which may lie one outside; of each cell its
    `first` piece and how many `pieces` it has.
    """

    samples: np.ndarray
    real: np.ndarray
    row_of_samples: np.ndarray
    row: np.ndarray
    column: np.ndarray
    first: np.ndarray
    pieces: np.ndarray


class _Grid(NamedTuple):
    """Where pieces lie: their head, and their level's size and first row."""

    head: np.ndarray
    H: np.ndarray
    W: np.ndarray
    start: np.ndarray


def _backward_cells(
    cells: _Cells,
    grid: _Grid,
    x: Axis,
    y: Axis,
    attention: np.ndarray,
    values: Rows,
    incoming: tuple[Rows, np.ndarray],
    total: _Total,
    found: np.ndarray,
) -> None:
    """The part of some cells in the sums of grad_value; in `found`, the gradients (x, y, weight) of samples."""
    samples, head, H, W = cells.samples, grid.head, grid.H, grid.W
    rows_in = incoming[0].take(np.take(incoming[1], samples))
    corner = grid.start + cells.row * W + cells.column
    pixel = np.stack((corner, corner + 1, corner + W, corner + W + 1))
    left, right = cells.column >= 0, cells.column < W - 1
    top, bottom = cells.row >= 0, cells.row < H - 1
    inside = np.stack((top & left, top & right, bottom & left, bottom & right))
    pixels = values.take((pixel * values.stride + values.first[head]).T)
    if not inside.all():
        pixels[~inside.T] = 0
    dots = np.ascontiguousarray(np.matmul(rows_in, pixels.transpose(0, 2, 1)).transpose(2, 0, 1))

    # Corner by corner, contiguous: strided by corner, each of these steps takes two to four times as long. Padding
    # repeats a sample, so that storing its gradient twice changes nothing, and gets no weight in the sums.
    ax, ay, strength = (np.take(a, samples) for a in (x.fraction, y.fraction, attention))
    left, top = 1 - ax, 1 - ay
    upper, lower = left * dots[0] + ax * dots[1], left * dots[2] + ax * dots[3]
    gradient = np.empty((*samples.shape, 4), dots.dtype)
    slope = top * (dots[1] - dots[0]) + ay * (dots[3] - dots[2])
    np.multiply(slope, strength * W[:, None], out=gradient[..., 0])
    np.multiply(lower - upper, strength * H[:, None], out=gradient[..., 1])
    np.add(top * upper, ay * lower, out=gradient[..., 2])
    _items(found)[samples] = _items(gradient)

    strength *= cells.real
    top *= strength
    ay *= strength
    scale = np.stack((top * left, top * ax, ay * left, ay * ax))
    sums = np.empty((4, len(samples), rows_in.shape[2]), dots.dtype)
    np.matmul(scale.transpose(1, 0, 2), rows_in, out=sums.transpose(1, 0, 2))
    first, later = cells.first, 1
    while len(more := np.flatnonzero(cells.pieces > later)):
        sums[:, first[more]] += sums[:, first[more] + later]
        later += 1
    rows = pixel * total.stride + total.first[head]
    for c in range(4):
        here = first[inside[c, first]]
        if len(here) == len(samples):
            total.add(rows[c], sums[c])
        else:
            total.add(rows[c, here], np.take(sums[c], here, axis=0))


def _cells(x: Axis, y: Axis, H: np.ndarray, W: np.ndarray, limit: int) -> Iterator[_Cells]:
    """The samples [rows, samples] that count, grouped by row and cell; H, W [rows, 1].

    In blocks of about `limit` rows of D: those of grad_output, four pixels and four sums a piece. A cell's samples
    fill as many pieces of T as they need: T near the mean keeps padding and pieces few at once.
    """
    none = (H + 1) * (W + 1)  # the cells around the level included; one more for samples that do not count
    cell = np.where(x.counts & y.counts, (y.before + 1) * (W + 1) + (x.before + 1), none).astype(np.intp)
    order = _order(cell, int(none.max()))
    base = np.cumsum(none + 1) - (none[:, 0] + 1)
    keys = (np.take_along_axis(cell, order, 1) + base[:, None]).reshape(-1)
    order = (order + np.arange(len(cell))[:, None] * cell.shape[1]).reshape(-1)
    starts = np.flatnonzero(np.concatenate(([True], keys[1:] != keys[:-1])))
    ends = np.append(starts[1:], len(keys))
    head = starts // cell.shape[1]
    place = keys[starts] - base[head]
    counting = place < none[head, 0]
    starts, ends, head, place = starts[counting], ends[counting], head[counting], place[counting]
    if not len(starts):
        return
    counts = ends - starts
    T = 1 << max(0, min(LONGEST_PIECE.bit_length() - 1, int(counts.mean()).bit_length()))
    pieces = -(-counts // T)
    for chunk in _whole_cells(pieces, max(1, limit // (T + 8))):
        count = pieces[chunk]
        first = np.cumsum(count) - count
        owner = np.repeat(np.arange(len(count)), count)
        begin = starts[chunk][owner] + (np.arange(len(owner)) - first[owner]) * T
        position = begin[:, None] + np.arange(T)
        last = ends[chunk][owner][:, None]
        real = position < last
        samples = order[np.minimum(position, last - 1)]
        at = head[chunk][owner]
        row, column = np.divmod(place[chunk][owner], W[at, 0] + 1)
        yield _Cells(samples, real, at, row - 1, column - 1, first, count)


def _whole_cells(pieces: np.ndarray, limit: int) -> Iterator[slice]:
    """Ranges of cells with about `limit` pieces together; a cell is never split."""
    block = (np.cumsum(pieces) - 1) // limit
    edges = np.flatnonzero(np.concatenate(([True], block[1:] != block[:-1], [True])))
    for begin, end in zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True):
        yield slice(begin, end)


def _order(cell: np.ndarray, most: int) -> np.ndarray:
    """Stable order of each row of `cell`, whole numbers from 0 to `most`.

    NumPy sorts 16-bit keys by radix, 6 times as fast as wider ones; wider ones go in turns of 16 bits.
    """
    order = np.argsort((cell & 0xFFFF).astype(np.uint16), axis=1, kind="stable")
    shift = 16
    while most >> shift:
        digit = (np.take_along_axis(cell, order, 1) >> shift & 0xFFFF).astype(np.uint16)
        order = np.take_along_axis(order, np.argsort(digit, axis=1, kind="stable"), 1)
        shift += 16
    return order
