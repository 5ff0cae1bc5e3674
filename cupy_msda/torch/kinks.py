"""Gradients of locations on a pixel, where `grid_sample` may take another cell than the contract.

`grid_sample` rounds coordinates in the dtype of the samples; the contract takes the cell of floor() of the exact one.
On both sides of a pixel the output is the same, but its derivatives are not.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

# (H, W, start) of a level.
Level = tuple[int, int, int]


def samples_near_a_pixel(locations: Tensor, levels: Sequence[Level]) -> Tensor:
    """Indices [samples, 5] of those of `locations` [N, Q, M, L, P, 2] that rounding may move to another cell.

    Rounding here may move them as far, so that a few more count.
    """
    sizes = torch.tensor([[(w, h)] for h, w, _ in levels], dtype=locations.dtype, device="cpu")
    pixels = (locations * sizes).sub_(0.5)
    distance = pixels.sub_(pixels.round()).abs_()
    near = distance <= 4 * torch.finfo(locations.dtype).eps * sizes
    # Both coordinates are one number: torch is slow along short dimensions.
    return near.contiguous().view(torch.int16).squeeze(-1).nonzero()


def exact_gradient(
    value: Tensor, locations: Tensor, weights: Tensor, grad_output: Tensor, levels: Sequence[Level], samples: Tensor
) -> Tensor:
    """Gradient [samples, 2] of the `locations` [samples, 2] of these samples, by the contract.

    `value` is [N, S, M, D], `weights` [N, Q, M, L, P] and `grad_output` [N, Q, M * D], all in float32 or float64.
    """
    image, query, head, level, _ = samples.unbind(1)
    table = torch.tensor(levels, device="cpu")[level]
    height, width, start = table.unbind(1)
    sizes = torch.stack((width, height), 1)
    pixels = locations.double() * sizes - 0.5
    counts = ((pixels > -1) & (pixels < sizes)).all(1)
    cell = torch.where(counts[:, None], pixels, 0).floor()
    x, y = (pixels - cell).to(value.dtype).unbind(1)
    column, row = (cell[:, axis, None] + torch.arange(2, device="cpu") for axis in (0, 1))
    inside = ((row >= 0) & (row < height[:, None]))[:, :, None] & ((column >= 0) & (column < width[:, None]))[:, None]
    pixel = start[:, None, None] + row.long()[:, :, None] * width[:, None, None] + column.long()[:, None]
    vectors = value[image[:, None, None], torch.where(inside, pixel, 0), head[:, None, None]]
    of_head = grad_output.reshape(*weights.shape[:3], -1)[image, query, head]
    products = torch.where(inside, torch.einsum("nyxd,nd->nyx", vectors, of_head), 0)
    by_x = (1 - y) * (products[:, 0, 1] - products[:, 0, 0]) + y * (products[:, 1, 1] - products[:, 1, 0])
    by_y = (1 - x) * (products[:, 1, 0] - products[:, 0, 0]) + x * (products[:, 1, 1] - products[:, 0, 1])
    gradient = torch.stack((by_x, by_y), 1) * sizes * weights[tuple(samples.unbind(1))][:, None]
    return torch.where(counts[:, None], gradient, 0)
