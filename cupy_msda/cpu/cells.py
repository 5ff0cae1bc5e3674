"""Samples grouped by cell: the four pixels around a sample, which all samples of the cell share."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from .sampling import Coordinate

# Most samples of a group.
MAX_GROUP = 256
# A cell that would need more groups gets longer ones: each group of a cell takes a scatter pass of its own
# (docs/performance/decisions.md#cpu-crowded-cells).
MAX_PASSES = 16
# Bit of a colour, and of a scatter pass: cells on the edge of a level, not all of whose pixels exist.
EDGE = 4


class Cells(NamedTuple):
    """Cells that hold samples. A plane is a level of a head.

    `row` and `column` are those of the upper left pixel, which may lie one outside. The cell's samples stand in `order`
    from `begin` to `end`. Cells of one `colour` share no pixel.
    """

    plane: np.ndarray
    row: np.ndarray
    column: np.ndarray
    colour: np.ndarray
    begin: np.ndarray
    end: np.ndarray
    order: np.ndarray

    def take(self, chosen: np.ndarray) -> Cells:
        return Cells(
            plane=self.plane[chosen],
            row=self.row[chosen],
            column=self.column[chosen],
            colour=self.colour[chosen],
            begin=self.begin[chosen],
            end=self.end[chosen],
            order=self.order,
        )


class Groups(NamedTuple):
    """Groups of at most T samples of one cell: `samples` [groups, T], `real` where they are not padding.

    Groups of one `scatter_pass` are consecutive and share no pixel.
    """

    samples: np.ndarray
    real: np.ndarray
    plane: np.ndarray
    row: np.ndarray
    column: np.ndarray
    scatter_pass: np.ndarray


def find_cells(x: Coordinate, y: Coordinate, H: np.ndarray, W: np.ndarray) -> Cells:
    """The cells of the samples in bounds; `x` and `y` are [planes, samples], `H` and `W` [planes, 1].

    Cells of one colour are consecutive. There are four colours, by the parity of row and column, and four more for
    cells on the edge.
    """
    out_of_bounds = (H + 1) * (W + 1)  # the number of cells, those around the level included
    cell = (y.floor + 1) * (W + 1) + (x.floor + 1)
    cell = np.where(x.in_bounds & y.in_bounds, cell, out_of_bounds).astype(np.intp)
    order = _stable_order(cell, int(out_of_bounds.max()))
    first_key = np.cumsum(out_of_bounds + 1) - (out_of_bounds[:, 0] + 1)
    keys = (np.take_along_axis(cell, order, 1) + first_key[:, None]).reshape(-1)
    order = (order + np.arange(len(cell))[:, None] * cell.shape[1]).reshape(-1)
    begin = np.flatnonzero(np.concatenate(([True], keys[1:] != keys[:-1])))
    end = np.append(begin[1:], len(keys))
    plane = begin // cell.shape[1]
    number, width = keys[begin] - first_key[plane], W[plane, 0]
    row, column = np.divmod(number, width + 1)
    edge = (row == 0) | (row == H[plane, 0]) | (column == 0) | (column == width)
    colour = ((row & 1) * 2 + (column & 1) + edge * EDGE).astype(np.uint8)
    chosen = np.argsort(colour, kind="stable")
    chosen = chosen[(number < out_of_bounds[plane, 0])[chosen]]
    return Cells(plane, row - 1, column - 1, colour, begin, end, order).take(chosen)


def group_samples(cells: Cells, sample_count: int) -> Iterator[Groups]:
    """The samples of the cells in groups of T, about `sample_count` samples at a time.

    A cell takes as many groups as it needs. T near the mean keeps both padding and passes few.
    """
    counts = cells.end - cells.begin
    if not len(counts):
        return
    T = min(MAX_GROUP, 1 << int(counts.mean()).bit_length())
    crowded = counts > MAX_PASSES * T
    for length, chosen in ((T, np.flatnonzero(~crowded)), (MAX_GROUP, np.flatnonzero(crowded))):
        group_counts = -(-counts[chosen] // length)
        for part in equal_ranges((np.cumsum(group_counts) - 1) // max(1, sample_count // length)):
            yield _groups_of(cells.take(chosen[part]), group_counts[part], length)


def _groups_of(cells: Cells, group_counts: np.ndarray, T: int) -> Groups:
    cell = np.repeat(np.arange(len(group_counts)), group_counts)
    nth = np.arange(len(cell)) - np.repeat(np.cumsum(group_counts) - group_counts, group_counts)
    scatter_pass = cells.colour[cell] + 2 * EDGE * nth
    if len(cell) > len(group_counts):
        key = scatter_pass.astype(np.uint16) if scatter_pass.max() < 1 << 16 else scatter_pass
        by_pass = np.argsort(key, kind="stable")
        cell, nth, scatter_pass = cell[by_pass], nth[by_pass], scatter_pass[by_pass]
    position = (cells.begin[cell] + nth * T)[:, None] + np.arange(T)
    end = cells.end[cell][:, None]
    real = position < end
    samples = cells.order[np.minimum(position, end - 1)]
    return Groups(samples, real, cells.plane[cell], cells.row[cell], cells.column[cell], scatter_pass)


def equal_ranges(array: np.ndarray) -> Iterator[slice]:
    """The longest ranges in which all elements are equal."""
    if not len(array):
        return
    edges = np.flatnonzero(np.concatenate(([True], array[1:] != array[:-1], [True]))).tolist()
    for begin, end in itertools.pairwise(edges):
        yield slice(begin, end)


def _stable_order(cell: np.ndarray, largest: int) -> np.ndarray:
    """Stable order of each row of `cell`, integers from 0 to `largest`: a radix sort by digits of 16 bits.

    NumPy sorts 16-bit keys by radix, much faster than wider ones (docs/performance/decisions.md#cpu-radix-sort).
    """
    order = np.argsort((cell & 0xFFFF).astype(np.uint16), axis=1, kind="stable")
    shift = 16
    while largest >> shift:
        digit = (np.take_along_axis(cell, order, 1) >> shift & 0xFFFF).astype(np.uint16)
        order = np.take_along_axis(order, np.argsort(digit, axis=1, kind="stable"), 1)
        shift += 16
    return order
