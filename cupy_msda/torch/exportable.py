"""The operator by ``grid_sample`` and other functions that every runtime knows: for export, and to compare with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..call import PLAIN, Arguments, Variant, contiguous_starts

Levels = Sequence[Sequence[int]]


def exportable_attention(arguments: Arguments) -> Tensor:
    """The operator by ``grid_sample``, with arithmetic in float32 or float64. The level sizes become constants."""
    value, shapes, variant = arguments.value, arguments.spatial_shapes, arguments.variant
    dtype = torch.float64 if value.dtype == torch.float64 else torch.float32
    levels = shapes.tolist() if hasattr(shapes, "tolist") else shapes
    starts = arguments.level_start_index
    if hasattr(starts, "tolist"):
        starts = starts.tolist()
    locations = arguments.locations.to(dtype)
    weights: Any = None if arguments.weights is None else arguments.weights.to(dtype)
    if arguments.reference_points is not None:
        sizes = torch.as_tensor(shapes, device=value.device)
        locations, weights = locations_and_weights(
            sizes, arguments.reference_points.to(dtype), locations, weights, variant=variant
        )
    # grid_sample promises nothing for NaN. What lies this far outside is the same as at infinity.
    invalid = locations.isnan().any(-1)
    valid = _valid_queries(arguments)
    if valid is not None:
        invalid = invalid | ~valid.view(*valid.shape, *(1,) * (weights.ndim - 2))
    locations = torch.where(invalid[..., None], -1, locations).clamp(-1, 2)
    weights = torch.where(invalid, 0, weights)
    output = grid_sample_attention(value.to(dtype), levels, locations, weights, starts, variant)
    if valid is not None:
        # Where locations are clamped, padding reads a pixel, which may be NaN.
        output = torch.where(valid[..., None], output, 0)
    return output.to(value.dtype)


def _valid_queries(arguments: Arguments) -> Tensor | None:
    """Which queries [N, Q] are not padding; None: all."""
    if arguments.query_lengths is None:
        return None
    lengths = torch.as_tensor(arguments.query_lengths, device=arguments.value.device)
    return torch.arange(arguments.locations.shape[1], device=lengths.device) < lengths[:, None]


def grid_sample_attention(
    value: Tensor,
    levels: Levels,
    locations: Tensor,
    weights: Tensor,
    starts: Sequence[int] | None = None,
    variant: Variant = PLAIN,
) -> Tensor:
    """One ``grid_sample`` per level: what models without the operator use.

    value [N, S, M, D], levels of (H, W), locations [N, Q, M, L, P, 2], weights [N, Q, M, L, P] -> [N, Q, M*D], computed
    in value's dtype. `starts` are the first pixels of the levels; None: each level follows the one before it. With
    `num_points` in `variant`, the points of all levels are one dimension.
    """
    N, _, M, D = value.shape
    Q = locations.shape[1]
    points = variant.num_points or [locations.shape[-2]] * len(levels)
    by_level = locations.to(value.dtype).reshape(N, Q, M, sum(points), 2).transpose(1, 2).split(list(points), dim=3)
    sampled = []
    for (h, w), start, where in zip(
        levels, contiguous_starts(levels) if starts is None else starts, by_level, strict=True
    ):
        image = value[:, start : start + h * w].permute(0, 2, 3, 1).reshape(N * M, D, h, w)
        if variant.nearest:
            size = where.new_tensor((w, h))
            pixel = torch.minimum((where * size + 0.5).floor().clamp_min(0), size - 1)
            where = (pixel + 0.5) / size
        sampled.append(
            F.grid_sample(
                image,
                (2 * where - 1).flatten(0, 1),
                mode=variant.interpolation,
                padding_mode=variant.padding_mode,
                align_corners=variant.align_corners,
            )
        )
    attention = weights.to(value.dtype).transpose(1, 2).reshape(N * M, 1, Q, sum(points))
    output = (torch.cat(sampled, -1) * attention).sum(-1)
    return output.view(N, M * D, Q).transpose(1, 2).contiguous()


def locations_and_weights(
    shapes: Tensor,
    references: Tensor,
    offsets: Tensor,
    logits: Tensor | None = None,
    *,
    variant: Variant = PLAIN,
) -> tuple[Tensor, Tensor]:
    """Sampling locations and attention weights of a fused call, as the models compute them."""
    L = shapes.shape[0]
    if logits is None:
        K = offsets.shape[-1] // 3
        offsets, logits = offsets[..., : 2 * K], offsets[..., 2 * K :]
    N, Q, M = logits.shape[:3]
    logits = logits.reshape(N, Q, M, -1)
    points = variant.num_points or (logits.shape[-1] // max(L, 1),) * L
    level_of = torch.tensor([level for level, n in enumerate(points) for _ in range(n)], device=offsets.device)
    point = references[:, :, level_of if references.shape[2] > 1 else level_of * 0][:, :, None]
    offsets = offsets.reshape(N, Q, M, -1, 2)
    if references.shape[-1] == 2:
        locations = point + offsets / shapes.to(offsets.device).flip(-1).to(offsets.dtype)[level_of]
    else:
        counts = torch.tensor(points, device=offsets.device, dtype=offsets.dtype)[level_of, None]
        locations = point[..., :2] + offsets / counts * point[..., 2:] * 0.5
    weights = logits.softmax(-1)
    if variant.num_points is None:
        return locations.view(N, Q, M, L, -1, 2), weights.view(N, Q, M, L, -1)
    return locations, weights
