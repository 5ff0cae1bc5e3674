"""The operator and its gradients by ``gather`` and other functions of torch, differentiable any number of times.

For second derivatives, forward mode, and gradients on devices without kernels. What counts for nothing (a sample out of
its level, a query that is padding) has derivatives of zero, whatever the inputs hold there. Metadata is not read.
Arithmetic is in the dtype of the inputs. Each call holds the value vectors of the neighbours of all samples,
N * Q * M * L * P * D numbers per neighbour.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..call import PLAIN, Arguments, Variant
from .metadata import tensor_of
from .samples import FusedSamples, level_of_samples, masked, plain_samples, to_pixels, valid_queries

# Of value, locations, weights and reference points, the order of `Wanted`. In a fused call, locations are offsets and
# weights are logits; weights are None where one array holds both, and each where it is not wanted.
Gradients = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]


class _Samples(NamedTuple):
    """Samples [N, Q, M, K] in pixels: floor and fraction of x and y, their slopes, and which samples count.

    A slope is the derivative with respect to the location. `height`, `width` and `start` [K] are those of the level.
    """

    x: Tensor
    y: Tensor
    right: Tensor
    below: Tensor
    slope_x: Tensor
    slope_y: Tensor
    valid: Tensor
    height: Tensor
    width: Tensor
    start: Tensor


class _Neighbour(NamedTuple):
    """One pixel per sample: its row of value [N, M, Q*K], whether it is in the level, and its bilinear weights.

    A weight is `across` times `along`. `sign_x` and `sign_y` are the derivatives of the two.
    """

    rows: Tensor
    inside: Tensor
    across: Tensor
    along: Tensor
    sign_x: int
    sign_y: int


def differentiable_attention(arguments: Arguments) -> Tensor:
    """The output [N, Q, M*D]."""
    factor = nan_of_wrong_metadata(arguments)
    arguments, locations, weights, _ = plain_samples(arguments)
    shapes, starts = _levels(arguments)
    return gather_attention(arguments.value, shapes, starts, locations, weights, arguments.variant) * factor


def gather_attention(
    value: Tensor,
    shapes: Tensor,
    starts: Tensor | None,
    locations: Tensor,
    weights: Tensor,
    variant: Variant = PLAIN,
) -> Tensor:
    """The output of a plain call; `shapes` [L, 2] and `starts` [L] are int64."""
    N, S, M, D = value.shape
    samples = _samples(shapes, starts, locations, variant)
    Q, K = samples.valid.shape[1], samples.valid.shape[3]
    weights = weights.reshape(N, Q, M, K)
    rows = _rows(value)
    output = value.new_zeros(N, M, Q, D)
    for neighbour in _neighbours(samples, S, variant):
        vectors = _gather(rows, neighbour, Q)
        weight = neighbour.across * neighbour.along * torch.where(neighbour.inside, weights, 0)
        output = output + (weight.transpose(1, 2)[..., None, :] @ vectors).squeeze(-2)
    return output.transpose(1, 2).reshape(N, Q, M * D)


def differentiable_gradients(arguments: Arguments, grad_output: Tensor) -> Gradients:
    """Gradients of value, locations (or offsets), weights (or logits) and reference points, None where there are none.

    They are those of an implementation by loops over samples, written out: a transform of torch.func cannot be entered
    where a derivative of the operator is being computed.
    """
    given, valid, factor = arguments, valid_queries(arguments), nan_of_wrong_metadata(arguments)
    arguments, locations, weights, fused = plain_samples(arguments)
    shapes, starts = _levels(arguments)
    value, variant = arguments.value, arguments.variant
    N, S, M, D = value.shape
    samples = _samples(shapes, starts, locations, variant)
    Q, K = samples.valid.shape[1], samples.valid.shape[3]
    weights = weights.reshape(N, Q, M, K)
    of_output = grad_output.reshape(N, Q, M, D).transpose(1, 2)
    if valid is not None:
        of_output = of_output.masked_fill(~valid[:, None, :, None], 0)
    rows, of_rows = _rows(value), value.new_zeros(N, M, S + 1, D)
    of_weights, of_x, of_y = (torch.zeros_like(weights) for _ in range(3))
    for neighbour in _neighbours(samples, S, variant):
        inside = neighbour.inside
        dots = (_gather(rows, neighbour, Q) @ of_output[..., None]).squeeze(-1).transpose(1, 2)
        dots = torch.where(inside, dots, 0)
        known = torch.where(inside, weights, 0)
        of_weights = of_weights + neighbour.across * neighbour.along * dots
        of_x = of_x + neighbour.sign_x * neighbour.along * known * dots
        of_y = of_y + neighbour.sign_y * neighbour.across * known * dots
        weight = (neighbour.across * neighbour.along * known).transpose(1, 2)
        parts = (weight[..., None] * of_output[..., None, :]).flatten(2, 3)
        of_rows = of_rows.scatter_add(2, neighbour.rows[..., None].expand_as(parts), parts)
    of_value = of_rows[:, :, :S].transpose(1, 2)
    of_locations = torch.stack((of_x * samples.slope_x, of_y * samples.slope_y), -1)
    if variant.clamped:
        # Of a clamped coordinate it is zero, also where the pixels hold NaN.
        free = torch.stack((samples.slope_x, samples.slope_y), -1) != 0
        of_locations = torch.where(free, of_locations, 0)
    if fused is None:
        of_locations, of_weights = of_locations.reshape(locations.shape), of_weights.reshape(given.weights.shape)
        return of_value * factor, of_locations * factor, of_weights * factor, None
    of_offsets, of_logits, of_references = _fused_gradients(given, fused, of_locations, of_weights)
    of_logits = None if of_logits is None else of_logits * factor
    return of_value * factor, of_offsets * factor, of_logits, of_references * factor


def _fused_gradients(
    arguments: Arguments, fused: FusedSamples, of_locations: Tensor, of_weights: Tensor
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Gradients of offsets, logits and reference points; of packed offsets and logits in one array."""
    of_points, of_offsets, of_logits = fused.gradients(of_locations, of_weights)
    references = arguments.reference_points
    if references.shape[2] == 1:
        of_references = of_points.sum(2, keepdim=True)
    else:
        of_references = torch.zeros_like(references).index_add(2, fused.level_of, of_points)
    valid = valid_queries(arguments)
    if valid is not None:
        of_offsets, of_logits, of_references = (masked(part, valid) for part in (of_offsets, of_logits, of_references))
    if arguments.packed:
        return torch.cat((of_offsets.flatten(3), of_logits), -1), None, of_references
    return of_offsets.reshape(arguments.locations.shape), of_logits.reshape(arguments.weights.shape), of_references


def _levels(arguments: Arguments) -> tuple[Tensor, Tensor | None]:
    """Shapes and starts as int64 on value's device."""
    device, starts = arguments.value.device, arguments.level_start_index
    shapes = tensor_of(arguments.spatial_shapes, device).to(torch.int64).reshape(-1, 2)
    return shapes, None if starts is None else tensor_of(starts, device).to(torch.int64)


def _first_pixels(shapes: Tensor, starts: Tensor | None) -> Tensor:
    pixels = shapes.prod(1)
    return pixels.cumsum(0) - pixels if starts is None else starts


def _samples(shapes: Tensor, starts: Tensor | None, locations: Tensor, variant: Variant) -> _Samples:
    N, Q, M = locations.shape[:3]
    points = variant.num_points or (locations.shape[-2],) * shapes.shape[0]
    level_of = level_of_samples(points, locations.device)
    numbers = (*shapes.unbind(1), _first_pixels(shapes, starts))
    height, width, start = (number.index_select(0, level_of) for number in numbers)
    locations = locations.reshape(N, Q, M, sum(points), 2)
    valid = ~locations.isnan().any(-1) if variant.clamped else locations.isfinite().all(-1)
    # What lies this far outside is the same as at infinity, and has no gradient.
    x, y = locations.masked_fill(~valid[..., None], 0).clamp(-1, 2).unbind(-1)
    (x, slope_x), (y, slope_y) = _to_pixels(x, width, variant), _to_pixels(y, height, variant)
    if not variant.clamped:
        valid = valid & (x > -1) & (y > -1) & (x < width) & (y < height)
    x, y, slope_x, slope_y = (number.masked_fill(~valid, 0) for number in (x, y, slope_x, slope_y))
    floor_x, floor_y = x.detach().floor(), y.detach().floor()
    column, row = floor_x.long(), floor_y.long()
    if variant.clamped:  # the number of the last pixel may be rounded up
        column, row = torch.minimum(column, width - 1), torch.minimum(row, height - 1)
    return _Samples(column, row, x - floor_x, y - floor_y, slope_x, slope_y, valid, height, width, start)


def _to_pixels(location: Tensor, size: Tensor, variant: Variant) -> tuple[Tensor, Tensor]:
    """Coordinates in pixels along one axis, and their slopes."""
    pixel = to_pixels(location, size, variant)
    slope = torch.ones_like(location) * (size - 1 if variant.align_corners else size)
    if variant.nearest:
        pixel, slope = pixel.detach().floor(), torch.zeros_like(slope)
    if not variant.clamped:
        return pixel, slope
    free = (pixel > 0) & (pixel < size - 1)
    clamped = torch.minimum(pixel.detach().clamp_min(0), (size - 1).to(pixel.dtype))
    return torch.where(free, pixel, clamped), torch.where(free, slope, 0)


def _neighbours(samples: _Samples, S: int, variant: Variant) -> Iterator[_Neighbour]:
    for right in variant.neighbours:
        for below in variant.neighbours:
            column, row = samples.x + right, samples.y + below
            inside = samples.valid & (column >= 0) & (column < samples.width) & (row >= 0) & (row < samples.height)
            index = torch.where(inside, samples.start + row * samples.width + column, S).clamp(0, S)
            yield _Neighbour(
                index.transpose(1, 2).flatten(2),
                inside,
                samples.right if right else 1 - samples.right,
                samples.below if below else 1 - samples.below,
                1 if right else -1,
                1 if below else -1,
            )


def _rows(value: Tensor) -> Tensor:
    """Value vectors [N, M, S + 1, D]. The last ones are zeros, and serve the neighbours outside a level."""
    return F.pad(value, (0, 0, 0, 0, 0, 1)).transpose(1, 2)


def _gather(rows: Tensor, neighbour: _Neighbour, Q: int) -> Tensor:
    """The value vectors [N, M, Q, K, D] of a neighbour."""
    N, M, _, D = rows.shape
    vectors = rows.gather(2, neighbour.rows[..., None].expand(N, M, neighbour.rows.shape[2], D))
    return vectors.view(N, M, Q, neighbour.inside.shape[3], D)


def nan_of_wrong_metadata(arguments: Arguments) -> Tensor:
    """[1]: 1, or NaN where a level does not lie in the S pixels or a length is out of range, in value's dtype.

    A factor reaches derivatives too, which lose a summand. On a GPU, the kernels take a wrong length for 0 or Q, and so
    does this.
    """
    value = arguments.value
    shapes, starts = _levels(arguments)
    S = value.shape[1]
    height, width = shapes.unbind(1)
    start = _first_pixels(shapes, starts)
    bad = (height < 1) | (width < 1) | (height > S) | (width > S) | (start < 0) | (start > S - height * width)
    wrong = bad.any(0, keepdim=True)  # [1]: a vmap of no samples refuses scalars
    if arguments.query_lengths is not None and value.device.type != "cuda":
        lengths = tensor_of(arguments.query_lengths, value.device)
        wrong = wrong | ((lengths < 0) | (lengths > arguments.locations.shape[1])).any(0, keepdim=True)
    return torch.where(wrong, torch.nan, 1.0).to(value.dtype)
