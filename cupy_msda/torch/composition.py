"""The operator on the CPU by torch's own functions, where the compiled tier is missing and they are faster than NumPy.

There are two ways: ``embedding_bag`` (:mod:`.bags`), and ``grid_sample``, which rounds coordinates in float32 and so
serves levels of moderate size. Both take NaN and infinity further than the contract does: what they give counts only
if it is finite, because all that they read was finite then.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..call import PLAIN, Arguments, Problem, Wanted
from . import bags, kinks
from .composition_costs import Way, sampled_elements
from .exportable import grid_sample_attention
from .reference import Gradients

# Pixels along an axis up to which float32 coordinates are within the tolerance.
_MOST_PIXELS = 168
# Most elements that grid_sample samples, which a call holds between forward and backward.
_MOST_ELEMENTS = 1 << 24
# Share of the samples that lie on a pixel, at most: with more, the queries are pixels, and NumPy is as fast.
_MOST_NEAR_A_PIXEL = 0.25
# Up to so many sampled elements all images are worked on at once (docs/performance/decisions.md#cpu-composition).
_CACHED_ELEMENTS = 1 << 22


class OnPixels(NamedTuple):
    """Samples whose gradient is computed anew, at their exact locations (:mod:`.kinks`)."""

    samples: Tensor
    locations: Tensor


class Recorded(NamedTuple):
    """An output and the inputs that it was computed from, whose gradients autograd recorded where they are wanted.

    `locations` and `weights` are those of the plain operator, which follow from the leaves.
    """

    output: Tensor
    leaves: tuple[Tensor | None, ...]
    locations: Tensor
    weights: Tensor
    on_pixels: OnPixels | None
    levels: tuple[kinks.Level, ...]


def ways(problem: Problem, wanted: Wanted | None) -> tuple[Way, ...]:
    """Those whose result is within the contract's tolerance and whose memory is bounded."""
    if problem.variant != PLAIN or problem.empty or problem.ragged or problem.levels is None:
        return ()
    exact = max(max(h, w) for h, w, _ in problem.levels) <= _MOST_PIXELS
    by_grid_sample: tuple[Way, ...] = ("grid_sample",) if exact and sampled_elements(problem) <= _MOST_ELEMENTS else ()
    by_bags: tuple[Way, ...] = ("bags",) if bags.can_run(problem, kept=wanted is not None) else ()
    return by_bags + by_grid_sample


def record(problem: Problem, arguments: Arguments, wanted: Wanted, way: Way) -> Recorded | None:
    """The output of a call by one of its :func:`ways`, in the accumulator dtype; None where the contract differs."""
    dtype = torch.float64 if problem.value_dtype == "float64" else torch.float32
    tensors = (arguments.value, arguments.locations, arguments.weights, arguments.reference_points)
    leaves = tuple(
        None if tensor is None else tensor.detach().to(dtype).requires_grad_(asked)
        for tensor, asked in zip(tensors, wanted, strict=True)
    )
    value, on_pixels = leaves[0], None
    assert problem.levels is not None
    assert value is not None
    with torch.enable_grad() if any(wanted) else torch.no_grad():
        locations, weights = _samples(problem, leaves)
        if way == "bags":
            if not math.isfinite(locations.detach().sum().item()):
                return None
            output = bags.attention(problem, value, locations, weights)
        else:
            if wanted.locations or wanted.references:
                near = kinks.samples_near_a_pixel(locations.detach(), problem.levels)
                if len(near) > _MOST_NEAR_A_PIXEL * weights.numel():
                    return None
                on_pixels = OnPixels(near, locations.detach()[tuple(near.unbind(1))]) if len(near) else None
            output = _by_grid_sample(problem, value, locations, weights)
    recorded = Recorded(output, leaves, locations, weights, on_pixels, problem.levels)
    return recorded if math.isfinite(output.detach().sum().item()) else None


def _by_grid_sample(problem: Problem, value: Tensor, locations: Tensor, weights: Tensor) -> Tensor:
    levels = problem.levels or ()
    sizes, starts, step = [(h, w) for h, w, _ in levels], [start for *_, start in levels], _images_at_a_time(problem)
    if step >= problem.N:
        return grid_sample_attention(value, sizes, locations, weights, starts)
    parts = zip(value.split(step), locations.split(step), weights.split(step), strict=True)
    return torch.cat([grid_sample_attention(a, sizes, b, c, starts) for a, b, c in parts])


def _samples(problem: Problem, leaves: Sequence[Tensor | None]) -> tuple[Tensor, Tensor]:
    """Locations [N, Q, M, L, P, 2] and weights [N, Q, M, L, P], rounded as the CPU path rounds them."""
    _, offsets, weights, references = leaves
    assert offsets is not None
    shape, K = (problem.N, problem.Q, problem.M, problem.L, problem.P), problem.K
    if weights is None:
        offsets, weights = offsets[..., : 2 * K], offsets[..., 2 * K :]
    offsets, weights = offsets.reshape(*shape, 2), weights.reshape(shape)
    if references is None:
        return offsets, weights
    points, scale = references[:, :, None, :, None], _per_offset(problem, references)
    if references.shape[-1] == 4:
        points, scale = points[..., :2], points[..., 2:] * scale
    return points + offsets * scale, weights.flatten(3).softmax(-1).view_as(weights)


def _per_offset(problem: Problem, references: Tensor) -> Tensor:
    """One over (W, H) of the level, or over two times the points of the level for a box."""
    sizes = [[(w, h)] for h, w, _ in problem.levels or ()]
    unit = sizes if references.shape[-1] == 2 else [2.0 * problem.P]
    return (1 / torch.tensor(unit, dtype=torch.float64, device="cpu")).to(references.dtype)


def _images_at_a_time(problem: Problem) -> int:
    """All images of a small call; of a large one, as many as keep what is sampled in the caches."""
    elements = sampled_elements(problem)
    if elements <= _CACHED_ELEMENTS:
        return problem.N
    return max(1, _CACHED_ELEMENTS // 4 * problem.N // elements)


def gradients(
    recorded: Recorded, arguments: Arguments, grad_output: Tensor, wanted: Wanted, kept: bool = False
) -> Gradients | None:
    """The gradients that are wanted; None where one of them, or that of the output, is not finite.

    `kept`: what is recorded serves another backward.
    """
    grad_output = grad_output.to(recorded.output.dtype)
    if not math.isfinite(grad_output.sum().item()):
        return None
    leaves = [leaf for leaf, asked in zip(recorded.leaves, wanted, strict=True) if asked and leaf is not None]
    of_leaves = _of_leaves(recorded, leaves, grad_output, kept)
    if not all(math.isfinite(gradient.sum().item()) for gradient in of_leaves):
        return None
    found = iter(of_leaves)
    given = (arguments.value, arguments.locations, arguments.weights, arguments.reference_points)
    of_value, of_locations, of_weights, of_references = (
        next(found).to(tensor.dtype).contiguous() if asked and tensor is not None else None
        for tensor, asked in zip(given, wanted, strict=True)
    )
    return of_value, of_locations, of_weights, of_references


def _of_leaves(recorded: Recorded, leaves: list[Tensor], grad_output: Tensor, kept: bool) -> Sequence[Tensor]:
    """Gradients of the leaves that are wanted. Those of samples on a pixel are replaced on the way."""
    if recorded.on_pixels is None:
        return torch.autograd.grad(recorded.output, leaves, grad_output, retain_graph=kept)
    value, locations, weights = recorded.leaves[0], recorded.locations, recorded.weights
    assert value is not None
    between = [tensor for tensor in (locations, weights) if tensor.requires_grad]
    of_values = [value] if value.requires_grad else []
    found = torch.autograd.grad(recorded.output, [*of_values, *between], grad_output, retain_graph=kept)
    of_value, passed = found[: len(of_values)], list(found[len(of_values) :])
    near, at_pixels = recorded.on_pixels
    exact = kinks.exact_gradient(value.detach(), at_pixels, weights.detach(), grad_output, recorded.levels, near)
    passed[0] = passed[0].index_put(tuple(near.unbind(1)), exact)
    others = [leaf for leaf in leaves if leaf is not value]
    return [*of_value, *torch.autograd.grad(between, others, passed, retain_graph=kept)]
