"""The operator by ``gather``: differentiable any number of times, for second derivatives."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..call import PLAIN, Arguments, Variant
from .exportable import locations_and_weights


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


def ignore_padding(locations: Tensor, weights: Tensor, lengths: Any) -> tuple[Tensor, Tensor]:
    """Locations and weights by which the queries of each image from its number in `lengths` on give zeros."""
    if lengths is None:
        return locations, weights
    query = torch.arange(locations.shape[1], device=locations.device)
    valid = query < torch.as_tensor(lengths, device=locations.device)[:, None]
    valid = valid.view(*valid.shape, *(1,) * (weights.ndim - 2))
    return torch.where(valid[..., None], locations, 0.5), torch.where(valid, weights, 0)


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
