"""The operator out of torch's own functions: for export, for second derivatives, and to compare with."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..problem import packed_starts

Levels = Sequence[tuple[int, int]]


def grid_sample_composition(
    value: Tensor, levels: Levels, locations: Tensor, weights: Tensor, starts: Sequence[int] | None = None
) -> Tensor:
    """One ``grid_sample`` a level: what models without the operator use.

    value [N, S, M, D], levels of (H, W), locations [N, Q, M, L, P, 2], weights [N, Q, M, L, P] -> [N, Q, M*D], computed
    in value's dtype. `starts` are the first rows of the levels; None: they are packed.
    """
    N, _, M, D = value.shape
    _, Q, _, L, P, _ = locations.shape
    grid = (2 * locations - 1).to(value.dtype)
    sampled = []
    for level, ((h, w), start) in enumerate(
        zip(levels, packed_starts(levels) if starts is None else starts, strict=True)
    ):
        image = value[:, start : start + h * w].permute(0, 2, 3, 1).reshape(N * M, D, h, w)
        points = grid[:, :, :, level].transpose(1, 2).reshape(N * M, Q, P, 2)
        sampled.append(F.grid_sample(image, points, mode="bilinear", padding_mode="zeros", align_corners=False))
    attention = weights.to(value.dtype).transpose(1, 2).reshape(N * M, 1, Q, L * P)
    output = (torch.stack(sampled, -2).flatten(-2) * attention).sum(-1)
    return output.view(N, M * D, Q).transpose(1, 2).contiguous()


def gather_composition(
    value: Tensor, shapes: Tensor, starts: Tensor | None, locations: Tensor, weights: Tensor
) -> Tensor:
    """Four ``gather`` of rows: differentiable any number of times, which ``grid_sample`` is not.

    Arguments as for the operator, the metadata as tensors, which are not read; arithmetic in the dtype of the others.
    """
    N, _, M, D = value.shape
    _, Q, _, L, P, _ = locations.shape
    shapes = shapes.to(value.device)
    pixels = shapes.prod(1)
    starts = pixels.cumsum(0) - pixels if starts is None else starts.to(value.device)
    h, w, start = shapes[:, :1], shapes[:, 1:], starts[:, None]
    x, y = (locations * shapes.flip(1)[:, None] - 0.5).unbind(-1)
    counts = (x > -1) & (y > -1) & (x < w) & (y < h)
    x, y = torch.where(counts, x, 0), torch.where(counts, y, 0)
    x0, y0 = x.detach().floor(), y.detach().floor()
    ax, ay = x - x0, y - y0
    heads = value.transpose(1, 2)
    output = value.new_zeros(N, M, Q, D)
    for right in (0, 1):
        for below in (0, 1):
            column, row = x0.long() + right, y0.long() + below
            inside = counts & (column >= 0) & (column < w) & (row >= 0) & (row < h)
            index = torch.where(inside, start + row * w + column, 0).transpose(1, 2).flatten(2)
            rows = heads.gather(2, index[..., None].expand(N, M, Q * L * P, D)).view(N, M, Q, L * P, D)
            weight = (ax if right else 1 - ax) * (ay if below else 1 - ay) * weights
            weight = torch.where(inside, weight, 0).transpose(1, 2).flatten(3)
            output = output + (weight[..., None, :] @ rows).squeeze(-2)
    return output.transpose(1, 2).reshape(N, Q, M * D)
