"""The fused front end by NumPy: locations and weights from offsets and logits, and their gradients back to these."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from ..call import Problem, Wanted
from .backward import plain_backward
from .forward import plain_forward
from .sampling import from_accumulator, to_accumulator
from .tasks import Gradients, Inputs


class Samples(NamedTuple):
    """Of each sample, in the accumulator dtype.

    `location_per_offset` is how far an offset of 1 moves the location. `box_fraction` is that distance per width or
    height of the reference box.
    """

    locations: np.ndarray  # [N, Q, M, K, 2]
    weights: np.ndarray  # [N, Q, M, K]
    offsets: np.ndarray  # [N, Q, M, K, 2]
    location_per_offset: np.ndarray  # [N, Q, 1, K, 2] or [K, 2]
    box_fraction: np.ndarray  # [K, 1]


def fused_forward(inputs: Inputs) -> np.ndarray:
    """Output [N, Q, M*D] in the storage dtype of value."""
    if inputs.problem.empty:
        return np.zeros(inputs.problem.output_shape, inputs.value.dtype)
    return plain_forward(_plain_inputs(inputs, materialise(inputs)))


def fused_backward(inputs: Inputs, wanted: Wanted) -> Gradients:
    """Gradients of value, offsets, logits and references, each in the storage dtype of its input.

    Where offsets and logits are one array, so are their gradients, in the place of that of the offsets.
    """
    problem, wanted = inputs.problem, inputs.problem.computed(wanted)
    if problem.empty:
        arrays = zip((inputs.value, inputs.locations, inputs.weights, inputs.references), wanted, strict=True)
        return Gradients(
            *(np.zeros(array.shape, array.dtype) if asked and array is not None else None for array, asked in arrays)
        )
    samples = materialise(inputs)
    plain = plain_backward(_plain_inputs(inputs, samples), wanted._replace(references=False))
    gradients = Gradients(value=plain.value)
    if plain.weights is not None:
        grad_weights = plain.weights.reshape(samples.weights.shape)
        inner = np.einsum("nqmk,nqmk->nqm", samples.weights, grad_weights)
        grad_logits = samples.weights * (grad_weights - inner[..., None])
        gradients = gradients._replace(weights=_clear_ragged(grad_logits, inputs.lengths))
    if plain.locations is not None:
        grad_locations = plain.locations.reshape(samples.locations.shape)
        grad_offsets = _product(grad_locations, samples.location_per_offset)
        gradients = gradients._replace(locations=grad_offsets)
        if wanted.references:
            gradients = gradients._replace(references=_reference_gradient(inputs, samples, grad_locations))
    return _stored(gradients, inputs)


def materialise(inputs: Inputs) -> Samples:
    """Locations and weights of a fused call that is not empty."""
    problem = inputs.problem
    fused, dtype = problem.fused, np.dtype(problem.accumulator_dtype)
    assert fused is not None
    assert problem.levels is not None
    assert inputs.references is not None
    N, Q, M, K = problem.N, problem.Q, problem.M, problem.K
    bfloat16 = problem.location_dtype == "bfloat16"
    offsets = to_accumulator(inputs.locations, dtype, bfloat16)
    if inputs.weights is None:
        offsets, logits = offsets[..., : 2 * K], offsets[..., 2 * K :]
    else:
        logits = to_accumulator(inputs.weights, dtype, bfloat16)
    offsets, logits = offsets.reshape(N, Q, M, K, 2), logits.reshape(N, Q, M, K)
    points = np.array(problem.points, np.intp)
    level_of_sample = np.repeat(np.arange(problem.L), points)
    references = to_accumulator(inputs.references, dtype, fused.dtype == "bfloat16")
    reference_of_sample = level_of_sample if fused.levels > 1 else np.zeros(K, np.intp)
    references = references[:, :, reference_of_sample][:, :, None]
    box_fraction = (0.5 / np.repeat(points, points)).astype(dtype)[:, None]
    if fused.coordinates == 4:
        location_per_offset = references[..., 2:] * box_fraction
    else:
        sizes = np.array(problem.levels, np.float64).reshape(-1, 3)[level_of_sample, 1::-1]
        location_per_offset = (1 / sizes).astype(dtype)
    weights = np.exp(logits - logits.max(-1, initial=-np.inf, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    locations = references[..., :2] + offsets * location_per_offset
    return Samples(locations, weights, offsets, location_per_offset, box_fraction)


def _plain_inputs(inputs: Inputs, samples: Samples) -> Inputs:
    """The plain call of these locations and weights."""
    problem = inputs.problem
    shape = samples.weights.shape[:3] + ((problem.K,) if problem.variant.num_points else (problem.L, problem.P))
    return replace(
        inputs,
        problem=replace(problem, fused=None, location_dtype=problem.accumulator_dtype),
        locations=samples.locations.reshape(*shape, 2),
        weights=samples.weights.reshape(shape),
        references=None,
    )


def _product(grad: np.ndarray, factor: np.ndarray) -> np.ndarray:
    """The product; 0 where `grad` is, whatever `factor` is: a sample that does not count or is clamped has no part."""
    product = grad * factor
    np.copyto(product, 0, where=grad == 0)
    return product


def _reference_gradient(inputs: Inputs, samples: Samples, grad_locations: np.ndarray) -> np.ndarray:
    assert inputs.problem.fused is not None
    parts = [grad_locations]
    if inputs.problem.fused.coordinates == 4:
        parts.append(_product(grad_locations, samples.offsets * samples.box_fraction))
    return _sum_per_reference(inputs.problem, np.concatenate(parts, -1).sum(2))


def _sum_per_reference(problem: Problem, grad: np.ndarray) -> np.ndarray:
    """[N, Q, reference points, coordinates] from [N, Q, K, coordinates]."""
    assert problem.fused is not None
    if problem.fused.levels == 1:
        return grad.sum(2, keepdims=True)
    first = np.concatenate(([0], np.cumsum(problem.points)[:-1]))
    return np.add.reduceat(grad, first, axis=2)


def _clear_ragged(grad: np.ndarray, lengths: Sequence[int] | None) -> np.ndarray:
    """`grad` with zeros for the queries beyond the query lengths, whatever their inputs were."""
    for image, length in enumerate(lengths or ()):
        grad[image, length:] = 0
    return grad


def _stored(gradients: Gradients, inputs: Inputs) -> Gradients:
    """The gradients in the shapes and storage dtypes of their inputs; that of value has its own already."""
    problem, locations, weights = inputs.problem, gradients.locations, gradients.weights
    assert problem.fused is not None
    if problem.packed and locations is not None and weights is not None:
        locations, weights = np.concatenate((locations.reshape(*weights.shape[:3], -1), weights), -1), None

    def cast(grad: np.ndarray | None, like: np.ndarray | None, dtype: str) -> np.ndarray | None:
        return None if grad is None or like is None else from_accumulator(grad, like.dtype, dtype).reshape(like.shape)

    return Gradients(
        value=gradients.value,
        locations=cast(locations, inputs.locations, problem.location_dtype),
        weights=cast(weights, inputs.weights, problem.location_dtype),
        references=cast(gradients.references, inputs.references, problem.fused.dtype),
    )
