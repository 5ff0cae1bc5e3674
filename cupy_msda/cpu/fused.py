"""The front end by NumPy: offsets and logits to locations and weights, and the gradients of these back to those."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from ..call import Problem, Wanted
from . import threads
from .sampling import from_accumulator, to_accumulator

Gradients = tuple[np.ndarray | None, np.ndarray | None, np.ndarray | None, np.ndarray | None]


class Samples(NamedTuple):
    """[N, Q, M, K] of each sample, in the dtype of the arithmetic."""

    locations: np.ndarray  # [N, Q, M, K, 2]
    weights: np.ndarray
    offsets: np.ndarray  # [N, Q, M, K, 2]
    reach: np.ndarray  # [N, Q, 1, K, 2] or [K, 2]: how far an offset of 1 moves a location
    spread: np.ndarray  # [K, 1]: reach a width or height of the reference box


def forward(
    problem: Problem,
    value: np.ndarray,
    references: np.ndarray,
    offsets: np.ndarray,
    logits: np.ndarray | None,
    lengths: Sequence[int] | None = None,
) -> np.ndarray:
    """Output as of :func:`cupy_msda.cpu.forward`; `logits` is None where `offsets` holds them too."""
    if problem.empty:
        return np.zeros(problem.output_shape, value.dtype)
    samples = _expand(problem, references, offsets, logits)
    return threads.forward(_plain(problem), value, *_as_plain(problem, samples), lengths)


def backward(
    problem: Problem,
    value: np.ndarray,
    references: np.ndarray,
    offsets: np.ndarray,
    logits: np.ndarray | None,
    grad_output: np.ndarray,
    lengths: Sequence[int] | None,
    wanted: Wanted,
) -> Gradients:
    """Gradients of value, offsets, logits and references, each in its input's storage dtype; None if not wanted.

    Where offsets and logits are one array, so are their gradients, in the place of that of the offsets.
    """
    front, wanted = problem.fused, problem.computed(wanted)
    assert front is not None
    if problem.empty:
        inputs = zip((value, offsets, logits, references), wanted, strict=True)
        return tuple(np.zeros_like(array) if asked and array is not None else None for array, asked in inputs)
    samples = _expand(problem, references, offsets, logits)
    plain = wanted._replace(references=False)
    grad_value, of_locations, of_weights = threads.backward(
        _plain(problem), value, *_as_plain(problem, samples), grad_output, lengths, plain
    )
    grad_offsets = grad_logits = grad_references = None
    if of_weights is not None:
        of_weights = of_weights.reshape(samples.weights.shape)
        inner = np.einsum("nqmk,nqmk->nqm", samples.weights, of_weights)
        grad_logits = _padding_to_zero(samples.weights * (of_weights - inner[..., None]), lengths)
    if of_locations is not None:
        of_locations = of_locations.reshape(samples.locations.shape)
        grad_offsets = _padding_to_zero(of_locations * samples.reach, lengths)
    if wanted.references:
        parts = [of_locations]
        if front.coordinates == 4:
            parts.append(_padding_to_zero(of_locations * samples.offsets * samples.spread, lengths))
        grad_references = _sum_of_levels(problem, np.concatenate(parts, -1).sum(2)).reshape(references.shape)
    dtype = problem.location_dtype
    if front.packed and grad_offsets is not None and grad_logits is not None:
        flat = grad_offsets.reshape(*grad_logits.shape[:3], -1)
        grad_offsets, grad_logits = np.concatenate((flat, grad_logits), -1), None
    stored = [
        None if grad is None else from_accumulator(grad, like.dtype, dtype_of).reshape(like.shape)
        for grad, like, dtype_of in (
            (grad_offsets, offsets, dtype),
            (grad_logits, logits, dtype),
            (grad_references, references, front.dtype),
        )
    ]
    return grad_value, *stored


def _plain(problem: Problem) -> Problem:
    return replace(problem, fused=None, location_dtype=problem.accumulator_dtype)


def _as_plain(problem: Problem, samples: Samples) -> tuple[np.ndarray, np.ndarray]:
    """Locations and weights in the shapes of the contract."""
    N, Q, M, _ = samples.weights.shape
    shape = (N, Q, M, *((problem.K,) if problem.variant.num_points else (problem.L, problem.P)))
    return samples.locations.reshape(*shape, 2), samples.weights.reshape(shape)


def _expand(problem: Problem, references: np.ndarray, offsets: np.ndarray, logits: np.ndarray | None) -> Samples:
    front, dtype = problem.fused, np.dtype(problem.accumulator_dtype)
    assert front is not None
    assert problem.levels is not None
    N, Q, M, K = problem.N, problem.Q, problem.M, problem.K
    bits = problem.location_dtype == "bfloat16"
    numbers = to_accumulator(offsets, dtype, bits)
    if logits is None:
        numbers, of_logits = numbers[..., : 2 * K], numbers[..., 2 * K :]
    else:
        of_logits = to_accumulator(logits, dtype, bits)
    numbers, of_logits = numbers.reshape(N, Q, M, K, 2), of_logits.reshape(N, Q, M, K)
    points = np.array(problem.points, np.intp)
    level_of = np.repeat(np.arange(problem.L), points)
    reference = to_accumulator(references, dtype, front.dtype == "bfloat16")
    reference = reference[:, :, level_of if front.levels > 1 else np.zeros(K, np.intp)][:, :, None]
    spread = (0.5 / np.repeat(points, points)).astype(dtype)[:, None]
    if front.coordinates == 4:
        reach = reference[..., 2:] * spread
    else:
        reach = (1 / np.array(problem.levels, np.float64).reshape(-1, 3)[level_of, 1::-1]).astype(dtype)
    with np.errstate(invalid="ignore", over="ignore"):  # NaN and infinity are the caller's business
        weights = np.exp(of_logits - of_logits.max(-1, initial=-np.inf, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        locations = reference[..., :2] + numbers * reach
    return Samples(locations, weights, numbers, reach, spread)


def _padding_to_zero(grad: np.ndarray, lengths: Sequence[int] | None) -> np.ndarray:
    """Zeros for the queries that do not count, whatever their inputs were."""
    for n, length in enumerate(lengths or ()):
        grad[n, length:] = 0
    return grad


def _sum_of_levels(problem: Problem, grad: np.ndarray) -> np.ndarray:
    """[N, Q, levels, coordinates] from [N, Q, K, coordinates]."""
    assert problem.fused is not None
    if problem.fused.levels == 1:
        return grad.sum(2, keepdims=True)
    firsts = np.concatenate(([0], np.cumsum(problem.points)[:-1]))
    return np.add.reduceat(grad, firsts, axis=2)
