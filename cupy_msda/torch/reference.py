"""Reference implementations of pure torch functions: for export, for second derivatives, and to compare with."""

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
    locations, weights = ignore_padding(locations, weights, arguments.query_lengths)
    # grid_sample promises nothing for NaN. What lies this far outside is the same as at infinity.
    invalid = locations.isnan().any(-1)
    locations = torch.where(invalid[..., None], -1, locations).clamp(-1, 2)
    weights = torch.where(invalid, 0, weights)
    return grid_sample_attention(value.to(dtype), levels, locations, weights, starts, variant).to(value.dtype)


def differentiable_attention(arguments: Arguments) -> Tensor:
    """The operator by ``gather``, differentiable any number of times. It does not read the metadata."""
    value, shapes, variant = arguments.value, arguments.spatial_shapes, arguments.variant
    locations, weights = arguments.locations, arguments.weights
    shapes = torch.as_tensor(shapes, device=value.device)
    if arguments.reference_points is not None:
        locations, weights = locations_and_weights(
            shapes, arguments.reference_points, locations, weights, variant=variant
        )
    locations, weights = ignore_padding(locations, weights, arguments.query_lengths)
    return gather_attention(value, shapes, arguments.level_start_index, locations, weights, variant)


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


def ignore_padding(locations: Tensor, weights: Tensor, lengths: Any) -> tuple[Tensor, Tensor]:
    """Locations and weights by which the queries of each image from its number in `lengths` on give zeros."""
    if lengths is None:
        return locations, weights
    query = torch.arange(locations.shape[1], device=locations.device)
    valid = query < torch.as_tensor(lengths, device=locations.device)[:, None]
    valid = valid.view(*valid.shape, *(1,) * (weights.ndim - 2))
    return torch.where(valid[..., None], locations, 0.5), torch.where(valid, weights, 0)


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


def gather_attention(
    value: Tensor,
    shapes: Tensor,
    starts: Tensor | None,
    locations: Tensor,
    weights: Tensor,
    variant: Variant = PLAIN,
) -> Tensor:
    """Four ``gather`` of value vectors: differentiable any number of times, which ``grid_sample`` is not.

    Arguments as for the operator, the metadata as tensors, which are not read; arithmetic in the dtype of the others.
    """
    N, _, M, D = value.shape
    Q = locations.shape[1]
    points = variant.num_points or (locations.shape[-2],) * shapes.shape[0]
    K = sum(points)
    shapes = shapes.to(value.device)
    pixels = shapes.prod(1)
    starts = pixels.cumsum(0) - pixels if starts is None else starts.to(value.device)
    level_of = torch.tensor([level for level, count in enumerate(points) for _ in range(count)], device=value.device)
    h, w, start = (numbers[level_of] for numbers in (shapes[:, 0], shapes[:, 1], starts))
    x, y = locations.reshape(N, Q, M, K, 2).unbind(-1)
    weights = weights.reshape(N, Q, M, K)
    if variant.nearest:
        x, y = ((c * size + 0.5).detach().floor() for c, size in ((x, w), (y, h)))
    elif variant.align_corners:
        x, y = x * (w - 1), y * (h - 1)
    else:
        x, y = x * w - 0.5, y * h - 0.5
    if variant.clamped:
        valid = ~(x.isnan() | y.isnan())
        x, y = (torch.minimum(c.clamp_min(0), (size - 1).to(c.dtype)) for c, size in ((x, w), (y, h)))
    else:
        valid = (x > -1) & (y > -1) & (x < w) & (y < h)
    x, y = torch.where(valid, x, 0), torch.where(valid, y, 0)
    x0, y0 = x.detach().floor(), y.detach().floor()
    ax, ay = x - x0, y - y0
    heads = value.transpose(1, 2)
    output = value.new_zeros(N, M, Q, D)
    for right in variant.neighbours:
        for below in variant.neighbours:
            column, row = x0.long() + right, y0.long() + below
            inside = valid & (column >= 0) & (column < w) & (row >= 0) & (row < h)
            index = torch.where(inside, start + row * w + column, 0).transpose(1, 2).flatten(2)
            vectors = heads.gather(2, index[..., None].expand(N, M, Q * K, D)).view(N, M, Q, K, D)
            weight = (ax if right else 1 - ax) * (ay if below else 1 - ay) * weights
            weight = torch.where(inside, weight, 0).transpose(1, 2)
            output = output + (weight[..., None, :] @ vectors).squeeze(-2)
    return output.transpose(1, 2).reshape(N, Q, M * D)
