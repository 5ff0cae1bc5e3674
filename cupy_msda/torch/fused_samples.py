"""Sampling locations and attention weights of a fused call in torch's own functions, and the gradients that they pass
on.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ..call import Variant


class FusedSamples(NamedTuple):
    """A fused call sample by sample; K counts the points of all levels.

    `points` are reference points [N, Q, 1, K, 2] or boxes [N, Q, 1, K, 4], `offsets` are [N, Q, M, K, 2] and `logits`
    [N, Q, M, K]. `level_of` is [K]. `unit` [K, 2] divides offsets from points: (W, H). From boxes it is [K, 1]: two
    times the points of the level.
    """

    points: Tensor
    offsets: Tensor
    logits: Tensor
    level_of: Tensor
    unit: Tensor

    def locations(self) -> Tensor:
        """[N, Q, M, K, 2], as the models compute them. What is not finite has no derivatives."""
        values = self._place(self.points.detach(), self.offsets.detach())
        finite = values.isfinite()
        return torch.where(finite, self._place(*self._finite(finite)), values)

    def weights(self) -> Tensor:
        """[N, Q, M, K]"""
        return self.logits.softmax(-1)

    def _place(self, points: Tensor, offsets: Tensor) -> Tensor:
        if points.shape[-1] == 2:
            return points + offsets / self.unit
        return points[..., :2] + offsets / self.unit * points[..., 2:]

    def _finite(self, finite: Tensor) -> tuple[Tensor, Tensor]:
        """Points and offsets of every sample, zeros where its location is not finite: zero times infinity is NaN."""
        per_number = torch.cat([finite] * (self.points.shape[-1] // 2), -1)
        return torch.where(per_number, self.points, 0), torch.where(finite, self.offsets, 0)

    def gradients(self, of_locations: Tensor, of_weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of points [N, Q, K, 2 or 4], offsets and logits from those of locations and weights."""
        points, offsets = self._finite(self.locations().detach().isfinite())
        of_points, of_offsets = of_locations, of_locations / self.unit
        if points.shape[-1] == 4:
            of_points = torch.cat((of_locations, of_offsets * offsets), -1)
            of_offsets = of_offsets * points[..., 2:]
        weights = self.weights()
        of_logits = weights * (of_weights - (weights * of_weights).sum(-1, keepdim=True))
        return of_points.sum(2), of_offsets, of_logits


def fused_samples(
    shapes: Tensor, references: Tensor, offsets: Tensor, logits: Tensor | None, variant: Variant
) -> FusedSamples:
    """The samples of a fused call; `logits` are None where `offsets` holds them too. `shapes` are on the device."""
    L = shapes.shape[0]
    if logits is None:
        K = offsets.shape[-1] // 3
        offsets, logits = offsets[..., : 2 * K], offsets[..., 2 * K :]
    N, Q, M = logits.shape[:3]
    K = math.prod(logits.shape[3:])
    counts = variant.num_points or (K // max(L, 1),) * L
    level_of = torch.tensor([level for level, n in enumerate(counts) for _ in range(n)], dtype=torch.int64)
    level_of = level_of.to(offsets.device)
    if references.shape[-1] == 2:
        unit = shapes.flip(-1).to(offsets.dtype).index_select(0, level_of)
    else:
        unit = torch.tensor([[2.0 * n] for n in counts for _ in range(n)], dtype=offsets.dtype).view(-1, 1)
        unit = unit.to(offsets.device)
    points = references.index_select(2, level_of if references.shape[2] > 1 else level_of * 0)[:, :, None]
    return FusedSamples(points, offsets.reshape(N, Q, M, K, 2), logits.reshape(N, Q, M, K), level_of, unit)
