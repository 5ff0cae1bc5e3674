"""The operator by ``grid_sample`` and other functions that every runtime knows.

For export, for the forward on devices without kernels, and to compare with.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..call import PLAIN, Arguments, Variant, contiguous_starts
from ..options import is_sequence
from . import compat
from .metadata import tensor_of
from .reference import differentiable_attention
from .samples import in_float, level_of_samples, plain_samples, to_pixels

# (H, W) of each level: numbers, symbols, or tensors without dimensions in a trace.
Levels = Sequence[Sequence[Any]]


def exportable_attention(arguments: Arguments) -> Tensor:
    """The operator by ``grid_sample``, with arithmetic in float32 or float64.

    Level sizes that are numbers become constants of what is exported, those that are symbols or traced stay so. Where
    they are data, which no size of an exported tensor can depend on, it is a composition of ``gather``.
    """
    dtype = arguments.value.dtype
    arguments = in_float(arguments)
    levels = _rows_of(arguments.spatial_shapes)
    starts = _rows_of(arguments.level_start_index)
    if levels is None or (starts is None and arguments.level_start_index is not None) or _is_empty(arguments):
        return differentiable_attention(arguments).to(dtype)
    value, variant = arguments.value, arguments.variant
    arguments, locations, weights, _ = plain_samples(arguments)
    N, Q, M = locations.shape[:3]
    sizes = tensor_of(arguments.spatial_shapes, value.device).flip(-1)
    points = variant.num_points or [int(locations.shape[-2])] * len(levels)
    sizes = sizes.to(locations.dtype).index_select(0, level_of_samples(points, value.device))
    locations, weights = locations.reshape(N, Q, M, sum(points), 2), weights.reshape(N, Q, M, sum(points))
    locations, counts = _for_grid_sample(locations, sizes, variant)
    weights = torch.where(counts, weights, 0)
    sampled = _samples(value, levels, locations, starts, variant._replace(num_points=tuple(points)))
    if variant.clamped or variant.align_corners:
        # What does not count reads a pixel here, which may be NaN.
        sampled = torch.where(counts.transpose(1, 2).flatten(0, 1)[:, None], sampled, 0)
    return _weighted(sampled, weights).to(dtype)


def _is_empty(arguments: Arguments) -> bool:
    """Whether there is no sample, or no channel, for ``grid_sample`` to take."""
    if compat.tracing():
        return False
    return 0 in arguments.value.shape or 0 in arguments.locations.shape


def _for_grid_sample(locations: Tensor, sizes: Tensor, variant: Variant) -> tuple[Tensor, Tensor]:
    """Locations [N, Q, M, K, 2] that are finite, and which samples count. `sizes` [K, 2] are (W, H)."""
    known = (locations == locations).all(-1) if variant.clamped else (locations.abs() < torch.inf).all(-1)
    # What lies this far outside is the same as at infinity.
    locations = locations.clamp(-1, 2)
    pixels = to_pixels(locations.detach(), sizes, variant)
    if variant.nearest:
        locations = (torch.minimum(pixels.floor().clamp_min(0), sizes - 1) + 0.5) / sizes
    elif variant.clamped:
        free = (pixels > 0) & (pixels < sizes - 1)
        locations = torch.where(free, locations, locations.detach())
    else:
        known = known & ((pixels > -1) & (pixels < sizes)).all(-1)
    return torch.where(known[..., None], locations, -1), known


def _rows_of(metadata: Any) -> list[Any] | None:
    """Metadata as a list of rows or numbers, which may be symbols or traced; None where it is missing, or data."""
    if metadata is None or is_sequence(metadata):
        return None if metadata is None else list(metadata)
    if not isinstance(metadata, Tensor):
        return metadata.tolist()
    if compat.tracing():
        # H * W may not fit the dtype of H and W.
        return [row.unbind() if row.ndim else row for row in metadata.to(torch.int64).unbind()]
    if torch.compiler.is_compiling() or not compat.has_elements(metadata):
        return None
    return metadata.tolist()


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
    return _weighted(_samples(value, levels, locations.to(value.dtype), starts, variant), weights.to(value.dtype))


def _samples(
    value: Tensor, levels: Levels, locations: Tensor, starts: Sequence[Any] | None, variant: Variant
) -> Tensor:
    """What each sample reads [N*M, D, Q, K]; K counts the points of all levels."""
    N, _, M, D = value.shape
    Q = locations.shape[1]
    points = variant.num_points or [locations.shape[-2]] * len(levels)
    by_level = locations.reshape(N, Q, M, sum(points), 2).transpose(1, 2).split(list(points), dim=3)
    sampled = []
    for (h, w), start, where in zip(
        levels, contiguous_starts(levels) if starts is None else starts, by_level, strict=True
    ):
        image = value[:, start : start + h * w].permute(0, 2, 3, 1).reshape(N * M, D, h, w)
        sampled.append(
            F.grid_sample(
                image,
                (2 * where - 1).flatten(0, 1),
                mode=variant.interpolation,
                padding_mode=variant.padding_mode,
                align_corners=variant.align_corners,
            )
        )
    return torch.cat(sampled, -1)


def _weighted(sampled: Tensor, weights: Tensor) -> Tensor:
    """The sums [N, Q, M*D] of what the samples read times the weights [N, Q, M, ...]."""
    N, Q, M = weights.shape[:3]
    attention = weights.transpose(1, 2).reshape(N * M, 1, Q, sampled.shape[-1])
    return (sampled * attention).sum(-1).view(N, -1, Q).transpose(1, 2).contiguous()
