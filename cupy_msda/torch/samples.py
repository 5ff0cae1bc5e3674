"""The samples of a call in torch's own functions: those of a fused call, of padding, and where they are in pixels."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..call import DIFFERENTIABLE, Arguments, Variant
from .metadata import tensor_of


class FusedSamples(NamedTuple):
    """A fused call sample by sample; K counts the points of all levels.

    `points` are reference points [N, Q, 1, K, 2] or boxes [N, Q, 1, K, 4], where K is 1 if all levels have the same;
    `offsets` are [N, Q, M, K, 2] and `logits` [N, Q, M, K]. `level_of` is [K]. `unit` [K, 2] divides offsets from
    points: (W, H). From boxes it is [K, 1]: two times the points of the level.
    """

    points: Tensor
    offsets: Tensor
    logits: Tensor
    level_of: Tensor
    unit: Tensor

    def locations(self) -> Tensor:
        """[N, Q, M, K, 2], as the models compute them. What is not finite has no derivatives."""
        if self.points.shape[-1] == 2:
            return self.points + self.offsets / self.unit
        values = self._in_boxes(self.points.detach(), self.offsets.detach())
        finite = values.isfinite()
        return torch.where(finite, self._in_boxes(*self._finite(finite)), values)

    def weights(self) -> Tensor:
        """[N, Q, M, K]"""
        return self.logits.softmax(-1)

    def _in_boxes(self, boxes: Tensor, offsets: Tensor) -> Tensor:
        return boxes[..., :2] + offsets / self.unit * boxes[..., 2:]

    def _finite(self, finite: Tensor) -> tuple[Tensor, Tensor]:
        """Boxes and offsets of every sample, zeros where its location is not finite: zero times infinity is NaN."""
        return torch.where(torch.cat((finite, finite), -1), self.points, 0), torch.where(finite, self.offsets, 0)

    def gradients(self, of_locations: Tensor, of_weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of points [N, Q, K, 2 or 4], offsets and logits from those of locations and weights."""
        of_points, of_offsets = of_locations, of_locations / self.unit
        if self.points.shape[-1] == 4:
            boxes, offsets = self._finite(self.locations().detach().isfinite())
            of_points = torch.cat((of_locations, of_offsets * offsets), -1)
            of_offsets = of_offsets * boxes[..., 2:]
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
    K = int(logits.shape[-1]) * (int(logits.shape[-2]) if logits.ndim == 5 else 1)
    counts = variant.num_points or (K // max(L, 1),) * L
    level_of = level_of_samples(counts, offsets.device)
    if references.shape[-1] == 2:
        unit = shapes.flip(-1).to(offsets.dtype).index_select(0, level_of)
    else:
        boxes = [[2.0 * n] for n in counts for _ in range(n)]
        unit = torch.tensor(boxes, dtype=offsets.dtype, device=offsets.device).view(-1, 1)
    points = references if references.shape[2] == 1 else references.index_select(2, level_of)
    return FusedSamples(points[:, :, None], offsets.reshape(N, Q, M, K, 2), logits.reshape(N, Q, M, K), level_of, unit)


def level_of_samples(counts: Iterable[int], device: torch.device) -> Tensor:
    """The level [K] of each point, from the number of points of each level."""
    levels = [level for level, count in enumerate(counts) for _ in range(count)]
    return torch.tensor(levels, dtype=torch.int64, device=device)


def to_pixels(locations: Tensor, sizes: Tensor, variant: Variant) -> Tensor:
    """Coordinates in pixels, before rounding down and clamping, in levels of `sizes` pixels along the same axis."""
    if variant.nearest:
        return locations * sizes + 0.5
    return locations * (sizes - 1) if variant.align_corners else locations * sizes - 0.5


def in_float(arguments: Arguments) -> Arguments:
    """The tensors in the dtype of the arithmetic: float64, or float32."""
    dtype = torch.float64 if arguments.value.dtype == torch.float64 else torch.float32
    tensors = {name: getattr(arguments, name) for name in DIFFERENTIABLE}
    return dataclasses.replace(
        arguments, **{name: tensor.to(dtype) for name, tensor in tensors.items() if tensor is not None}
    )


def plain_samples(arguments: Arguments) -> tuple[Arguments, Tensor, Tensor, FusedSamples | None]:
    """Arguments in which padding holds zeros, with locations and weights by which padding gives zeros."""
    valid = valid_queries(arguments)
    if valid is not None:
        arguments = dataclasses.replace(
            arguments,
            locations=masked(arguments.locations, valid),
            weights=masked(arguments.weights, valid),
            reference_points=masked(arguments.reference_points, valid),
        )
    locations, weights, fused = arguments.locations, arguments.weights, None
    if arguments.reference_points is not None:
        shapes = tensor_of(arguments.spatial_shapes, locations.device).reshape(-1, 2)
        fused = fused_samples(shapes, arguments.reference_points, locations, weights, arguments.variant)
        locations, weights = fused.locations(), fused.weights()
        if arguments.variant.num_points is None:
            N, Q, M, K = weights.shape
            L = shapes.shape[0]
            locations = locations.reshape(N, Q, M, L, K // max(L, 1), 2)
    if valid is not None:
        # A sample at NaN counts for nothing, whatever value holds.
        locations = masked(locations, valid, torch.nan)
        weights = masked(weights, valid)
    return arguments, locations, weights, fused


def valid_queries(arguments: Arguments) -> Tensor | None:
    """Which queries [N, Q] are not padding; None: all."""
    if arguments.query_lengths is None:
        return None
    lengths = tensor_of(arguments.query_lengths, arguments.value.device).to(torch.int64)
    return torch.arange(arguments.locations.shape[1], device=lengths.device) < lengths[:, None]


def masked(tensor: Any, valid: Tensor, fill: float = 0) -> Any:
    """`tensor` with `fill` in the queries that are not `valid`."""
    return None if tensor is None else tensor.masked_fill(~valid.view(*valid.shape, *(1,) * (tensor.ndim - 2)), fill)
