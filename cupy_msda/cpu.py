"""The NumPy path: forward and backward, one head of one image at a time, in chunks of bounded size.

Heads are independent, so threads share them out and the result does not depend on how many there are.
Arithmetic is float32, or float64 for float64; pixel coordinates are float64, a chunk at a time, because
x * W - 0.5 loses log2(W) bits of the fraction in float32. bfloat16 arrays come as their uint16 bits.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from .problem import Problem

# Bytes of gathered rows at a time: they are written once and read once, so they should stay in the cache
# next to the core. Forward of encoder_800x1333, N = 1, 2 threads: see benchmarks/NOTES.md.
CHUNK_BYTES = 1 << 19
LOCATED_SAMPLES = 1 << 15
SORTED_SAMPLES = 1 << 17


def num_threads() -> int:
    """Threads that the NumPy path uses: ``CUPY_MSDA_NUM_THREADS``, or the cores this process may use."""
    setting = os.environ.get("CUPY_MSDA_NUM_THREADS")
    if setting is None:
        return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if not setting.isdigit() or int(setting) == 0:
        raise ValueError(f"CUPY_MSDA_NUM_THREADS: expected a positive int, got {setting!r}")
    return int(setting)


def forward(problem: Problem, value: np.ndarray, locations: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Output [N, Q, M*D] in value's storage dtype (uint16 bits for bfloat16)."""
    output = np.zeros((problem.N, problem.Q, problem.M, problem.D), value.dtype)
    if not problem.empty:
        _each_head(problem, lambda n, m: _forward_head(problem, value, locations, weights, output, n, m))
    return output.reshape(problem.output_shape)


def backward(
    problem: Problem, value: np.ndarray, locations: np.ndarray, weights: np.ndarray, grad_output: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Gradients of value, locations and weights, each in its input's storage dtype."""
    grads = (
        np.zeros(value.shape, value.dtype),
        np.zeros(locations.shape, locations.dtype),
        np.zeros(weights.shape, weights.dtype),
    )
    if not problem.empty:
        grad_output = grad_output.reshape(problem.N, problem.Q, problem.M, problem.D)
        _each_head(problem, lambda n, m: _backward_head(problem, value, locations, weights, grad_output, grads, n, m))
    return grads


def _each_head(problem: Problem, work: Callable[[int, int], None]) -> None:
    heads = [(n, m) for n in range(problem.N) for m in range(problem.M)]
    threads = min(num_threads(), len(heads))

    def quietly(head: tuple[int, int]) -> None:
        with np.errstate(invalid="ignore", over="ignore"):  # NaN and infinity are the caller's business
            work(*head)

    if threads == 1:
        for head in heads:
            quietly(head)
        return
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(quietly, heads))


@dataclass(frozen=True)
class _Corners:
    """Bilinear cells of some samples. Corner order: (y0, x0), (y0, x1), (y1, x0), (y1, x1).

    `cell` numbers them, the ring of cells around the level included; `rows` [..., 4] are pixels of the level,
    valid where `inside`; `ax`, `ay` the fractions; `counts` says which samples touch the level at all.
    """

    cell: np.ndarray
    rows: np.ndarray
    inside: np.ndarray
    ax: np.ndarray
    ay: np.ndarray
    counts: np.ndarray

    def weights(self) -> np.ndarray:
        """Bilinear weights [..., 4], 0 outside the level."""
        wx = np.stack((1 - self.ax, self.ax), -1)[..., None, :]
        wy = np.stack((1 - self.ay, self.ay), -1)[..., :, None]
        return np.where(self.inside, (wy * wx).reshape(self.inside.shape), 0)


def _corners(locations: np.ndarray, H: np.ndarray | int, W: np.ndarray | int, dtype: np.dtype) -> _Corners:
    """Cells of `locations` [..., 2]; H and W broadcast against the leading dimensions."""
    px, py = locations[..., 0] * np.float64(W) - 0.5, locations[..., 1] * np.float64(H) - 0.5
    counts = (px > -1) & (py > -1) & (px < W) & (py < H)
    px, py = np.where(counts, px, 0), np.where(counts, py, 0)
    x0, y0 = np.floor(px), np.floor(py)
    ax, ay = (px - x0).astype(dtype), (py - y0).astype(dtype)
    x0, y0 = x0.astype(np.intp), y0.astype(np.intp)
    left, right = counts & (x0 >= 0), counts & (x0 + 1 < W)
    top, bottom = y0 >= 0, y0 + 1 < H
    inside = np.stack((top & left, top & right, bottom & left, bottom & right), -1)
    first = y0 * W + x0
    rows = np.stack((first, first + 1, first + W, first + W + 1), -1)
    return _Corners((y0 + 1) * (W + 1) + x0 + 1, rows, inside, ax, ay, counts)


class _HeadRows:
    """Rows of D channels of one head of one image, as the accumulator dtype.

    Copies the head once when many rows will be taken (neighbouring rows then share cache lines and pages),
    and takes rows from the caller's array otherwise.
    """

    def __init__(self, array: np.ndarray, n: int, m: int, rows_taken: int, problem: Problem) -> None:
        self.dtype = np.dtype(problem.accumulator_dtype)
        self.bfloat16 = problem.value_dtype == "bfloat16"
        count, M, D = array.shape[1:]
        self.zero_row = count
        self.flat = None
        if rows_taken > count or not array[n].flags.c_contiguous:
            self.head = np.zeros((count + 1, D), self.dtype)
            self.head[:count] = _to_accumulator(array[n, :, m], self.dtype, self.bfloat16)
        else:
            self.flat, self.M, self.m = array[n].reshape(count * M, D), M, m

    def take(self, rows: np.ndarray) -> np.ndarray:
        """The rows [..., D]; `zero_row` gives zeros."""
        if self.flat is None:
            return np.take(self.head, rows, axis=0)
        missing = rows == self.zero_row
        taken = np.take(self.flat, np.where(missing, 0, rows * self.M + self.m), axis=0)
        taken = _to_accumulator(taken, self.dtype, self.bfloat16)
        taken[missing] = 0
        return taken


def _forward_head(
    problem: Problem, value: np.ndarray, locations: np.ndarray, weights: np.ndarray, output: np.ndarray, n: int, m: int
) -> None:
    dtype = np.dtype(problem.accumulator_dtype)
    L, P, D = problem.L, problem.P, problem.D
    H, W, start = (np.array(column)[:, None] for column in zip(*problem.levels, strict=True))
    source = _HeadRows(value, n, m, problem.Q * L * P * 4, problem)
    step = max(1, CHUNK_BYTES // (L * P * 4 * D * dtype.itemsize))
    # Cells are located for many chunks at once: at one chunk the calls cost more than the arithmetic.
    for block in _chunks(problem.Q, max(step, LOCATED_SAMPLES // (L * P))):
        where = _to_accumulator(locations[n, block, m], dtype, problem.location_dtype == "bfloat16")
        attention = _to_accumulator(weights[n, block, m], dtype, problem.location_dtype == "bfloat16")
        cells = _corners(where, H, W, dtype)
        scale = cells.weights() * np.where(cells.counts, attention, 0)[..., None]
        rows = np.where(cells.inside, cells.rows + start[..., None], source.zero_row).reshape(-1, L * P * 4)
        scale = scale.reshape(-1, 1, L * P * 4)
        result = np.empty((len(rows), 1, D), dtype)
        for chunk in _chunks(len(rows), step):
            np.matmul(scale[chunk], source.take(rows[chunk]), out=result[chunk])
        output[n, block, m] = _from_accumulator(result[:, 0], output.dtype, problem.value_dtype)


def _backward_head(
    problem: Problem,
    value: np.ndarray,
    locations: np.ndarray,
    weights: np.ndarray,
    grad_output: np.ndarray,
    grads: tuple[np.ndarray, np.ndarray, np.ndarray],
    n: int,
    m: int,
) -> None:
    """Gradients of one head, level by level, with the samples sorted by cell.

    All samples of a cell share its four pixels, so a cell's part of grad_value is one product
    [4, samples] @ [samples, D] and its dot products with value are another: each sample's row of grad_output
    is gathered once, each pixel a few times, and the scatter is left with distinct rows.
    """
    dtype = np.dtype(problem.accumulator_dtype)
    bits = problem.location_dtype == "bfloat16"
    Q, P = problem.Q, problem.P
    values = _HeadRows(value, n, m, Q * P * 4, problem)
    incoming = _HeadRows(grad_output, n, m, Q * P, problem)
    grad_head = np.zeros((problem.S, problem.D), dtype)
    for level, (H, W, start) in enumerate(problem.levels):
        for block in _chunks(Q, max(1, SORTED_SAMPLES // P)):
            where = _to_accumulator(locations[n, block, m, level], dtype, bits).reshape(-1, 2)
            attention = _to_accumulator(weights[n, block, m, level], dtype, bits).reshape(-1)
            cells = _corners(where, H, W, dtype)
            scale = cells.weights()
            dots = np.zeros(scale.shape, dtype)
            for samples, sample_rows, first in _pieces(cells, max(1, CHUNK_BYTES // (problem.D * dtype.itemsize))):
                padding = samples < 0
                queries = np.where(padding, incoming.zero_row, samples // P + block.start)
                incoming_rows = incoming.take(queries)
                inside = cells.inside[sample_rows]
                rows = cells.rows[sample_rows] + start
                value_rows = values.take(np.where(inside, rows, values.zero_row))
                part = np.where(padding, 0, attention[samples])[..., None] * scale[samples]
                products = np.matmul(incoming_rows, value_rows.transpose(0, 2, 1))
                dots[samples[~padding]] = products[~padding]
                sums = np.matmul(part.transpose(0, 2, 1), incoming_rows)
                if len(first) < len(sums):
                    sums, rows, inside = np.add.reduceat(sums, first, axis=0), rows[first], inside[first]
                for corner in range(4):
                    here = inside[:, corner]
                    grad_head[rows[here, corner]] += sums[here, corner]
            grad_where, grad_attention = _location_and_weight_gradients(cells, scale, dots, attention, H, W)
            block_index = (n, block, m, level)
            _store(grads[1], block_index, grad_where.reshape(-1, P, 2), problem.location_dtype)
            _store(grads[2], block_index, grad_attention.reshape(-1, P), problem.location_dtype)
    _store(grads[0], (n, slice(None), m), grad_head, problem.value_dtype)


def _location_and_weight_gradients(
    cells: _Corners, scale: np.ndarray, dots: np.ndarray, attention: np.ndarray, H: int, W: int
) -> tuple[np.ndarray, np.ndarray]:
    """From `dots` [samples, 4], the products of grad_output with the four corners."""
    dots = np.where(cells.inside, dots, 0)
    upper, lower = dots[:, 1] - dots[:, 0], dots[:, 3] - dots[:, 2]
    left, right = dots[:, 2] - dots[:, 0], dots[:, 3] - dots[:, 1]
    grad_x = ((1 - cells.ay) * upper + cells.ay * lower) * W
    grad_y = ((1 - cells.ax) * left + cells.ax * right) * H
    grad_where = np.stack((grad_x, grad_y), -1) * attention[:, None]
    grad_where[~cells.counts] = 0
    return grad_where, (scale * dots).sum(-1)


def _pieces(cells: _Corners, entries: int) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Samples grouped by cell, in blocks of about `entries`.

    Yields (samples [pieces, T] padded with -1, one sample of each piece, first piece of each cell): a cell's
    samples fill as many pieces of T as they need. T near the mean keeps padding and pieces few at once.
    """
    found = np.flatnonzero(cells.counts)
    if not len(found):
        return
    cell = cells.cell[found]
    order = np.argsort(cell, kind="stable")
    cell, found = cell[order], found[order]
    begins = np.flatnonzero(np.concatenate(([True], cell[1:] != cell[:-1])))
    counts = np.diff(np.append(begins, len(cell)))
    T = 1 << max(1, min(6, int(counts.mean()).bit_length()))
    per_cell = -(-counts // T)
    first_piece = np.cumsum(per_cell) - per_cell
    piece_cell = np.repeat(np.arange(len(begins)), per_cell)
    offset = (np.arange(len(piece_cell)) - first_piece[piece_cell]) * T
    piece_begin = begins[piece_cell] + offset
    piece_count = np.minimum(counts[piece_cell] - offset, T)
    for chunk in _chunks(len(piece_cell), max(1, entries // T)):
        lanes = np.arange(T)
        position = piece_begin[chunk, None] + np.where(lanes < piece_count[chunk, None], lanes, 0)
        samples = np.where(lanes < piece_count[chunk, None], found[position], -1)
        owner = piece_cell[chunk]
        yield samples, samples[:, 0], np.flatnonzero(np.concatenate(([True], owner[1:] != owner[:-1])))


def _chunks(count: int, step: int) -> Iterator[slice]:
    for begin in range(0, count, step):
        yield slice(begin, min(begin + step, count))


def _to_accumulator(array: np.ndarray, dtype: np.dtype, bfloat16: bool) -> np.ndarray:
    if bfloat16 and array.dtype == np.uint16:
        return (array.astype(np.uint32) << 16).view(np.float32)
    return array.astype(dtype, copy=False)


def _from_accumulator(array: np.ndarray, storage: np.dtype, dtype: str) -> np.ndarray:
    """`array` rounded to `dtype`, to the nearest and ties to even."""
    if dtype != "bfloat16":
        return array.astype(storage)
    bits = np.ascontiguousarray(array, np.float32).view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(array), 0x7FC0, rounded).astype(np.uint16)


def _store(target: np.ndarray, where: tuple, array: np.ndarray, dtype: str) -> None:
    target[where] = _from_accumulator(array, target.dtype, dtype)
