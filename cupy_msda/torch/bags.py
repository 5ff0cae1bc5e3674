"""The operator on the CPU by ``embedding_bag``: value is a table, each query and head a bag of weighted rows.

A sample reads the four pixels of a cell that lies inside its level, whether or not the sample does: the weight of a
pixel is max(0, 1 - distance) along each axis, which is zero for those that the sample does not touch. So indices are
never out of bounds, and the pixels of a sample are at fixed steps from the first.

Sums and products are separate calls: fused, they would be rounded by the place of an element in a thread's part.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..call import Problem

# Samples that are worked on at a time, so that what is computed of them stays in the caches
# (docs/performance/decisions.md#cpu-composition).
_CACHED_SAMPLES = 1 << 16
# Rows of the table, whose numbers are int32.
_MOST_ROWS = (1 << 31) - 1
# Most samples of which a call holds some 40 bytes each between forward and backward.
_MOST_KEPT_SAMPLES = 1 << 22


class _Pixels(NamedTuple):
    """How pixels of the levels of a call are found; each tensor has the samples K of a query as its last dimension.

    `sizes` [2, 1, K] are (W, H) in float64, `last` the last cell that lies inside the level, `steps` [2, 1, K] the rows
    of the table from pixel to pixel along x and y, `corners` [4, K] those from the first pixel of a cell to each,
    `starts` [K] the row of each level. `thin` [2, 1, K] is zero along axes of one pixel, None where there are none.
    """

    sizes: Tensor
    last: Tensor
    steps: Tensor
    corners: Tensor
    starts: Tensor
    thin: Tensor | None


@functools.lru_cache(maxsize=256)
def _pixels(levels: tuple[tuple[int, int, int], ...], points: int, heads: int) -> _Pixels:
    def of_samples(rows: Sequence[Sequence[int]], dtype: torch.dtype) -> Tensor:
        return torch.tensor(rows, dtype=dtype, device="cpu").repeat_interleave(points, dim=1)

    with torch.inference_mode(False):
        sizes = of_samples([[w for _, w, _ in levels], [h for h, _, _ in levels]], torch.float64)[:, None]
        steps = of_samples([[heads] * len(levels), [w * heads for _, w, _ in levels]], torch.int32)[:, None]
        x, y = torch.where(sizes > 1, steps, 0)
        thin = (sizes > 1).float() if any(1 in level[:2] for level in levels) else None
        starts = of_samples([[start * heads for *_, start in levels]], torch.int32)[0]
        corners = torch.cat((torch.zeros_like(x), x, y, x + y))
        return _Pixels(sizes, (sizes - 2).clamp_min_(0), steps, corners, starts, thin)


def can_run(problem: Problem, kept: bool) -> bool:
    """Whether a call has few enough rows, and few enough samples if they are `kept` for the gradients."""
    samples = problem.N * problem.Q * problem.M * problem.K
    return problem.N * problem.S * problem.M <= _MOST_ROWS and (not kept or samples <= _MOST_KEPT_SAMPLES)


def attention(problem: Problem, value: Tensor, locations: Tensor, weights: Tensor) -> Tensor:
    """The output [N, Q, M * D], with its gradients.

    Tensors are in the dtype of the arithmetic: value [N, S, M, D], locations [N, Q, M, L, P, 2] and weights
    [N, Q, M, L, P]. Locations must not be NaN.
    """
    return _Attention.apply(problem, value, locations, weights)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, problem: Problem, value: Tensor, locations: Tensor, weights: Tensor) -> Tensor:
        kept = any(ctx.needs_input_grad)
        bags = _Bags(problem, value, weights)
        if kept:
            ctx.bags = bags
        return bags.sums(locations, kept)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Any:
        (grad_output,) = grad_outputs
        _, of_value, of_locations, of_weights = ctx.needs_input_grad
        bags: _Bags = ctx.bags
        samples = bags.of_samples(grad_output, of_locations, of_weights)
        return None, bags.of_value(grad_output) if of_value else None, *samples


class _Bags:
    """The bags of a call. Autograd records nothing."""

    def __init__(self, problem: Problem, value: Tensor, weights: Tensor) -> None:
        assert problem.levels is not None
        self._problem = problem
        self._pixels = _pixels(problem.levels, problem.P, problem.M)
        self._count = problem.N * problem.Q * problem.M
        self._table = value.detach().reshape(-1, problem.D)
        self._weights = weights.detach().reshape(self._count, problem.K)
        rows = max(1, _CACHED_SAMPLES // problem.K)
        self._parts = [slice(begin, begin + rows) for begin in range(0, self._count, rows)]
        longest = 4 * problem.K * min(rows, self._count)
        self._ends = torch.arange(0, longest + 1, 4 * problem.K, dtype=torch.int32, device="cpu")
        # Of each part: rows of the table [rows, 4, K], their weights [rows, 4, K], and distances from the first pixel
        # [2, rows, K].
        self._kept: list[tuple[Tensor, Tensor, Tensor]] = []

    def sums(self, locations: Tensor, kept: bool) -> Tensor:
        """The output [N, Q, M * D]. `kept`: for the gradients."""
        N, Q, M, D, K = self._problem.N, self._problem.Q, self._problem.M, self._problem.D, self._problem.K
        locations = locations.detach().reshape(self._count, K, 2)
        images = torch.arange(0, self._image_rows * N, self._image_rows, dtype=torch.int32, device="cpu")
        heads = torch.arange(M, dtype=torch.int32, device="cpu")
        firsts = (images[:, None, None] + heads).expand(-1, Q, -1).reshape(-1, 1)
        output = self._table.new_empty(self._count, D)
        for part in self._parts:
            indices, distances = self._located(locations[part], firsts[part])
            shares = self._shares(distances)
            found = torch.empty(*indices.shape, dtype=output.dtype, device="cpu")
            along_y = shares[:, 1] * self._weights[part]
            by_axes = found.view(-1, 2, 2, K)
            torch.mul(along_y.transpose(0, 1)[:, :, None], shares[:, 0].transpose(0, 1)[:, None], out=by_axes)
            output[part] = _sums(self._table, indices, found, self._ends[: len(indices) + 1])
            if kept:
                self._kept.append((indices, found, distances))
        return output.view(N, Q, M * D)

    @property
    def _image_rows(self) -> int:
        return self._problem.S * self._problem.M

    def _located(self, locations: Tensor, firsts: Tensor) -> tuple[Tensor, Tensor]:
        """Rows of the table [rows, 4, K], and distances [2, rows, K] from the first of them.

        Rounded, a distance has the floor of the exact one. Those that are out of bounds are -2 or less, or 2 or more.
        """
        sizes, last, steps, corners, starts, _ = self._pixels
        pixels = torch.empty(2, *locations.shape[:2], dtype=torch.float64, device="cpu")
        pixels.copy_(locations.permute(2, 0, 1)).mul_(sizes).sub_(0.5)
        torch.threshold_(pixels, -1, -2)
        floors = pixels.floor()
        cells = floors.clamp_min(0)
        torch.minimum(cells, last, out=cells)
        fractions = pixels.sub_(floors).clamp_max_(1 - torch.finfo(locations.dtype).eps)
        distances = fractions.add_(floors.sub_(cells)).to(locations.dtype)
        rows = cells.to(torch.int32).mul_(steps)
        first = rows[1].add_(rows[0]).add_(starts).add_(firsts)
        return first[:, None] + corners, distances

    def _shares(self, distances: Tensor) -> Tensor:
        """What the first and the second pixel along each axis count [2, 2, rows, K]: pixel, axis."""
        shares = distances.new_empty(2, *distances.shape)
        torch.abs(distances, out=shares[0])
        torch.sub(distances, 1, out=shares[1]).abs_()
        shares.neg_().add_(1).clamp_min_(0)
        if self._pixels.thin is not None:
            shares[1].mul_(self._pixels.thin)
        return shares

    def of_value(self, grad_output: Tensor) -> Tensor:
        """Gradient [N, S, M, D] of value: bags again, of what reads each row of the table."""
        N, Q, M, D, K = self._problem.N, self._problem.Q, self._problem.M, self._problem.D, self._problem.K
        images = max(1, 2 * _CACHED_SAMPLES // (Q * M * K))
        indices, weights = (torch.cat(kept).view(N, -1) for kept in list(zip(*self._kept, strict=True))[:2])
        by_bag, found = grad_output.reshape(N, Q * M, D), []
        for begin in range(0, N, images):
            part = slice(begin, begin + images)
            rows, order = torch.sort((indices[part] - begin * self._image_rows).view(-1), stable=True)
            length = self._image_rows * len(by_bag[part])
            ends = torch.zeros(length + 1, dtype=torch.int32, device="cpu")
            torch.cumsum(torch.bincount(rows, minlength=length), 0, dtype=torch.int32, out=ends[1:])
            bags = torch.div(order, 4 * K, rounding_mode="floor").to(torch.int32)
            of_order = weights[part].reshape(-1).index_select(0, order)
            found.append(_sums(by_bag[part].reshape(-1, D), bags, of_order, ends))
        return (found[0] if len(found) == 1 else torch.cat(found)).view(N, -1, M, D)

    def of_samples(self, grad_output: Tensor, locations: bool, weights: bool) -> tuple[Tensor | None, Tensor | None]:
        """Gradients [N, Q, M, L, P, 2] of locations and [N, Q, M, L, P] of weights, those that are wanted."""
        if not (locations or weights):
            return None, None
        K, by_bag = self._problem.K, grad_output.reshape(self._count, -1)
        shape = (self._problem.N, self._problem.Q, self._problem.M, self._problem.L, self._problem.P)
        of_locations = self._table.new_empty(self._count, K, 2) if locations else None
        of_weights = self._table.new_empty(self._count, K) if weights else None
        for part, (indices, _, distances) in zip(self._parts, self._kept, strict=True):
            ends = self._ends[: len(indices) + 1]
            products = _products(self._table, indices, ends, by_bag[part]).view(-1, 2, 2, K)
            shares = self._shares(distances)
            first, second = shares[:, 0], shares[:, 1]
            # Interpolated along x, for both rows of pixels [rows, 2, K]; along y, for both columns.
            rows = products[:, :, 0] * first[0][:, None]
            rows += products[:, :, 1] * first[1][:, None]
            if of_weights is not None:
                torch.mul(rows[:, 0], second[0], out=of_weights[part])
                of_weights[part] += rows[:, 1] * second[1]
            if of_locations is not None:
                columns = products[:, 0] * second[0][:, None]
                columns += products[:, 1] * second[1][:, None]
                nearer, farther = self._slopes(distances)
                for axis, pair in enumerate((columns, rows)):
                    slope = nearer[axis].mul_(pair[:, 0]).add_(farther[axis].mul_(pair[:, 1]))
                    slope.mul_(self._weights[part])
                    torch.mul(slope, self._pixels.sizes[axis].to(slope.dtype), out=of_locations[part][..., axis])
        return (
            None if of_locations is None else of_locations.view(*shape, 2),
            None if of_weights is None else of_weights.view(shape),
        )

    def _slopes(self, distances: Tensor) -> tuple[Tensor, Tensor]:
        """Derivatives [2, rows, K] of what the first and the second pixel along each axis count.

        A sample on a pixel is in the cell that begins there.
        """
        cell, inside = distances.floor(), torch.empty_like(distances)
        torch.eq(cell, 0, out=inside)
        # -1 is before the first pixel, 1 behind the last one.
        nearer = cell.eq(-1).to(cell.dtype).sub_(inside)
        farther = inside.sub_(cell.eq_(1))
        if self._pixels.thin is not None:
            farther.mul_(self._pixels.thin)
        return nearer, farther


def _sums(table: Tensor, indices: Tensor, weights: Tensor, ends: Tensor) -> Tensor:
    """Weighted sums of rows of the table, bag by bag."""
    return torch.embedding_bag(table, indices.view(-1), ends, False, 0, False, weights.view(-1), True)[0]


def _products(table: Tensor, indices: Tensor, ends: Tensor, by_bag: Tensor) -> Tensor:
    """The products of each row that a bag reads and the vector of the bag in `by_bag`."""
    per_bag = indices.numel() // len(by_bag)
    if len(table) < per_bag:
        # torch takes a matrix to have no more entries than places, and would write past its end.
        rows = table.index_select(0, indices.view(-1)).view(len(by_bag), per_bag, -1)
        return torch.bmm(rows, by_bag[..., None])
    _warn_of_sparse_tensors_once()
    size, products = (len(by_bag), len(table)), torch.zeros(indices.numel(), dtype=table.dtype, device="cpu")
    matrix = torch.sparse_csr_tensor(ends, indices.view(-1), products, size, check_invariants=False)
    return torch.sparse.sampled_addmm(matrix, by_bag, table.t(), beta=0, out=matrix).values()


@functools.lru_cache(maxsize=1)
def _warn_of_sparse_tensors_once() -> None:
    """Take what torch warns of once: that CSR tensors are in beta, and (2.11, 2.12) that invariants are not checked."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ends, row = (torch.tensor(numbers, dtype=torch.int32, device="cpu") for numbers in ([0, 1], [0]))
        torch.sparse_csr_tensor(ends, row, torch.ones(1, device="cpu"), (1, 1), check_invariants=False)
