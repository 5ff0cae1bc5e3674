"""Samples of the NumPy path grouped by cell: the four pixels around a sample, which the cell's other samples share."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from .sampling import Axis

# Most samples of a piece.
LONGEST_PIECE = 256
# Cells that would need more pieces than this get longer ones: each piece of a cell is a turn of its own.
MOST_TURNS = 16
# Bit of a turn: cells on the edge of a level, not all of whose pixels exist.
EDGE = 4


class Cells(NamedTuple):
    """Cells that hold samples. Of each: the group of samples that it is from, row and column of its upper left pixel
    (which may lie one outside), its colour, and where its samples begin and end in `order`.
    """

    group: np.ndarray
    row: np.ndarray
    column: np.ndarray
    colour: np.ndarray
    begin: np.ndarray
    end: np.ndarray
    order: np.ndarray


class Pieces(NamedTuple):
    """Pieces of T samples: `samples` [pieces, T], `real` where not padding, and what their cells are. Pieces of one
    `turn` come together and share no pixel.
    """

    samples: np.ndarray
    real: np.ndarray
    group: np.ndarray
    row: np.ndarray
    column: np.ndarray
    turn: np.ndarray


def group(x: Axis, y: Axis, H: np.ndarray, W: np.ndarray) -> Cells:
    """The cells of the samples [groups, samples] that count, each group in levels of H x W [groups, 1].

    Cells of one colour share no pixel (there are four, by the parity of row and column, and four more for cells on the
    edge), and come together.
    """
    none = (H + 1) * (W + 1)  # the cells around the level included; one more for samples that do not count
    cell = np.where(x.counts & y.counts, (y.before + 1) * (W + 1) + (x.before + 1), none).astype(np.intp)
    order = _order(cell, int(none.max()))
    base = np.cumsum(none + 1) - (none[:, 0] + 1)
    keys = (np.take_along_axis(cell, order, 1) + base[:, None]).reshape(-1)
    order = (order + np.arange(len(cell))[:, None] * cell.shape[1]).reshape(-1)
    begin = np.flatnonzero(np.concatenate(([True], keys[1:] != keys[:-1])))
    end = np.append(begin[1:], len(keys))
    of = begin // cell.shape[1]
    place, width = keys[begin] - base[of], W[of, 0]
    row, column = np.divmod(place, width + 1)
    edge = (row == 0) | (row == H[of, 0]) | (column == 0) | (column == width)
    colour = ((row & 1) * 2 + (column & 1) + edge * EDGE).astype(np.uint8)
    chosen = np.argsort(colour, kind="stable")
    chosen = chosen[(place < none[of, 0])[chosen]]
    return Cells(of[chosen], row[chosen] - 1, column[chosen] - 1, colour[chosen], begin[chosen], end[chosen], order)


def pieces(cells: Cells, most: int) -> Iterator[Pieces]:
    """The cells in pieces of T, about `most` samples at a time.

    A cell's samples fill as many pieces as they need: T near the mean keeps padding and pieces few at once.
    """
    counts = cells.end - cells.begin
    if not len(counts):
        return
    T = min(LONGEST_PIECE, 1 << int(counts.mean()).bit_length())
    long = counts > MOST_TURNS * T
    for length, chosen in ((T, np.flatnonzero(~long)), (LONGEST_PIECE, np.flatnonzero(long))):
        parts = -(-counts[chosen] // length)
        for some in runs((np.cumsum(parts) - 1) // max(1, most // length)):
            these = Cells(*(a[chosen[some]] for a in cells[:-1]), cells.order)
            yield _pieces(these, parts[some], length)


def _pieces(cells: Cells, count: np.ndarray, T: int) -> Pieces:
    owner = np.repeat(np.arange(len(count)), count)
    nth = np.arange(len(owner)) - np.repeat(np.cumsum(count) - count, count)
    turn = cells.colour[owner] + 2 * EDGE * nth
    if len(owner) > len(count):
        by_turn = np.argsort(turn.astype(np.uint16) if turn.max() < 1 << 16 else turn, kind="stable")
        owner, nth, turn = owner[by_turn], nth[by_turn], turn[by_turn]
    position = (cells.begin[owner] + nth * T)[:, None] + np.arange(T)
    end = cells.end[owner][:, None]
    real = position < end
    samples = cells.order[np.minimum(position, end - 1)]
    return Pieces(samples, real, cells.group[owner], cells.row[owner], cells.column[owner], turn)


def runs(array: np.ndarray) -> Iterator[slice]:
    """Ranges of equal neighbours."""
    if not len(array):
        return
    edges = np.flatnonzero(np.concatenate(([True], array[1:] != array[:-1], [True]))).tolist()
    for begin, end in itertools.pairwise(edges):
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
