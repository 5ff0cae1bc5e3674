"""The operator by ``gather`` and other functions of JAX, differentiable any number of times.

For forward mode, second derivatives, and devices without kernels. Arithmetic is in float32, or float64. Each call holds
the value vectors of the neighbours of all samples, N * Q * M * K * D numbers per neighbour.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ..call import Variant, accumulator_of
from .metadata import numbers
from .operation import Operation


class _Levels(NamedTuple):
    """Heights, widths and first pixels [L], and which levels do not lie in the S pixels: None where that is checked."""

    height: jax.Array
    width: jax.Array
    start: jax.Array
    bad: jax.Array | None


class _Axis(NamedTuple):
    """Coordinates of samples along one axis: floor, fraction, and which are in bounds."""

    floor: jax.Array
    fraction: jax.Array
    in_bounds: jax.Array


def forward(operation: Operation, *inputs: jax.Array) -> jax.Array:
    """The output [N, Q, M*D] for the inputs of an operation."""
    given = dict(zip(operation.inputs, inputs, strict=True))
    value = given["value"]
    dtype = jnp.dtype(accumulator_of(value.dtype.name))
    levels = _levels(operation, given, value.shape[1])
    wrong = [] if levels.bad is None else [levels.bad.any()]
    valid = None
    if operation.ragged:
        Q, lengths = given["locations"].shape[1], numbers(given["lengths"])
        wrong.append(((lengths < 0) | (lengths > Q)).any())
        valid = jnp.arange(Q) < lengths[:, None]
    given = _times_nan(given, operation.differentiable, wrong)
    value = given["value"]
    samples = {name: given[name].astype(dtype) for name in operation.differentiable[1:]}
    if valid is not None:  # what padding holds is not read
        samples = {name: _masked(array, valid) for name, array in samples.items()}
    locations, weights = _samples(operation, samples, levels)
    if valid is not None:
        locations, weights = _masked(locations, valid, jnp.nan), _masked(weights, valid)
    output = _attention(value.astype(dtype), levels, locations, weights, operation)
    return _times_nan({"output": output}, ["output"], wrong)["output"].astype(value.dtype)


def tangent(operation: Operation, names: tuple[str, ...], *arrays: jax.Array) -> jax.Array:
    """The tangent of the output for tangents of the inputs of these `names`, followed by all inputs."""
    tangents, inputs = arrays[: len(names)], arrays[len(names) :]
    places = [operation.inputs.index(name) for name in names]

    def of_these(*changed: jax.Array) -> jax.Array:
        given = list(inputs)
        for place, array in zip(places, changed, strict=True):
            given[place] = array
        return forward(operation, *given)

    return jax.jvp(of_these, tuple(inputs[place] for place in places), tuple(tangents))[1]


def backward(operation: Operation, grad_output: jax.Array, *inputs: jax.Array) -> list[jax.Array]:
    """The gradients that an operation computes."""
    places = [operation.inputs.index(name) for name in operation.gradients]

    def of_these(*changed: jax.Array) -> jax.Array:
        given = list(inputs)
        for place, array in zip(places, changed, strict=True):
            given[place] = array
        return forward(operation, *given)

    return list(jax.vjp(of_these, *(inputs[place] for place in places))[1](grad_output))


def _levels(operation: Operation, given: dict[str, Any], S: int) -> _Levels:
    if operation.levels is not None:
        known = jnp.asarray(np.array(operation.levels, np.int32).reshape(-1, 3))
        return _Levels(known[:, 0], known[:, 1], known[:, 2], None)
    height, width = numbers(given["shapes"]).T
    available = jnp.asarray(S, height.dtype)
    # No product or sum of what fits overflows 32 bits, and the first level that does not fit is found.
    bad = (height < 1) | (width < 1) | (height > available // jnp.maximum(width, 1))
    pixels = jnp.where(bad, 0, height * width)
    start = numbers(given["starts"]) if operation.starts else jnp.cumsum(pixels, dtype=pixels.dtype) - pixels
    return _Levels(height, width, start, bad | (start < 0) | (start > available - pixels))


def _times_nan(arrays: dict[str, Any], names: Iterable[str], wrong: list[jax.Array]) -> dict[str, Any]:
    """`arrays`, where those of these `names` are NaN if the metadata are `wrong`, and so is what is derived from them.

    XLA drops an output that nothing uses, and what checks with it. A derivative keeps a factor, and loses a summand.
    """
    if not wrong:
        return arrays
    factor = jnp.where(jnp.stack(wrong).any(), jnp.nan, 1.0)
    return arrays | {name: arrays[name] * factor.astype(arrays[name].dtype) for name in names}


def _level_of_samples(operation: Operation, K: int) -> np.ndarray:
    """The level [K] of each sample of a query and head."""
    points = operation.variant.num_points or (K // max(operation.L, 1),) * operation.L
    return np.repeat(np.arange(operation.L), points)


def _samples(operation: Operation, samples: dict[str, jax.Array], levels: _Levels) -> tuple[jax.Array, jax.Array]:
    """Locations [N, Q, M, K, 2] and weights [N, Q, M, K]."""
    locations, weights = samples["locations"], samples.get("weights")
    N, Q, M = locations.shape[:3]
    if weights is None:
        K = locations.shape[3] // 3
        locations, weights = locations[..., : 2 * K], locations[..., 2 * K :]
    K = int(np.prod(weights.shape[3:]))
    locations, weights = locations.reshape(N, Q, M, K, 2), weights.reshape(N, Q, M, K)
    if not operation.coordinates:
        return locations, weights
    level_of = _level_of_samples(operation, K)
    points = samples["references"]
    points = (points if points.shape[2] == 1 else points[:, :, level_of])[:, :, None]
    weights = jax.nn.softmax(weights, axis=-1)
    if operation.coordinates == 2:
        size = jnp.stack([levels.width, levels.height], -1)[level_of].astype(locations.dtype)
        return points + locations / size, weights
    in_level = np.bincount(level_of, minlength=operation.L)[level_of]
    unit = jnp.asarray(2.0 * in_level[:, None], locations.dtype)

    def in_boxes(boxes: jax.Array, offsets: jax.Array) -> jax.Array:
        return boxes[..., :2] + offsets / unit * boxes[..., 2:]

    values = jax.lax.stop_gradient(in_boxes(points, locations))
    finite = jnp.isfinite(values)  # zero times infinity is NaN: what is not finite has no derivatives
    boxes = jnp.where(jnp.concatenate([finite, finite], -1), points, 0)
    return jnp.where(finite, in_boxes(boxes, jnp.where(finite, locations, 0)), values), weights


def _attention(
    value: jax.Array, levels: _Levels, locations: jax.Array, weights: jax.Array, operation: Operation
) -> jax.Array:
    N, S, M, D = value.shape
    Q, K = weights.shape[1], weights.shape[3]
    variant, level_of = operation.variant, _level_of_samples(operation, K)
    height, width, start = (part[level_of] for part in levels[:3])
    finite = ~jnp.isnan(locations).any(-1) if variant.clamped else jnp.isfinite(locations).all(-1)
    # What lies this far outside is the same as at infinity, and has no gradient.
    located = jnp.clip(jnp.where(finite[..., None], locations, 0), -1, 2)
    x = _axis(located[..., 0], width, variant)
    y = _axis(located[..., 1], height, variant)
    valid = finite & x.in_bounds & y.in_bounds
    # The last vector is zeros, and serves the neighbours outside a level.
    vectors = jnp.pad(value, ((0, 0), (0, 1), (0, 0), (0, 0))).transpose(0, 2, 1, 3)
    output = jnp.zeros((N, Q, M, D), value.dtype)
    for right in variant.neighbours:
        for below in variant.neighbours:
            column, row = x.floor + right, y.floor + below
            inside = valid & (column >= 0) & (column < width) & (row >= 0) & (row < height)
            index = jnp.clip(jnp.where(inside, start + row * width + column, S), 0, S)
            across, along = (axis.fraction if one else 1 - axis.fraction for axis, one in ((x, right), (y, below)))
            weight = jnp.where(inside, across * along, 0) * jnp.where(inside, weights, 0)
            flat = index.transpose(0, 2, 1, 3).reshape(N, M, Q * K, 1)
            found = jnp.take_along_axis(vectors, flat, axis=2).reshape(N, M, Q, K, D)
            output = output + jnp.einsum("nqmk,nmqkd->nqmd", weight, found, precision="highest")
    return output.reshape(N, Q, M * D)


def _axis(location: jax.Array, size: jax.Array, variant: Variant) -> _Axis:
    if variant.nearest:
        pixel = jax.lax.stop_gradient(jnp.floor(location * size + 0.5))
    else:
        pixel = location * (size - 1) if variant.align_corners else location * size - 0.5
    in_bounds = jnp.ones(pixel.shape, bool)
    last = (size - 1).astype(pixel.dtype)
    if variant.clamped:
        free = (pixel > 0) & (pixel < last)
        pixel = jnp.where(free, pixel, jax.lax.stop_gradient(jnp.minimum(jnp.maximum(pixel, 0), last)))
    else:
        in_bounds = (pixel > -1) & (pixel < size)
        pixel = jnp.where(in_bounds, pixel, 0)
    floor = jax.lax.stop_gradient(jnp.floor(pixel))
    index = floor.astype(jnp.int32)
    return _Axis(jnp.minimum(index, size - 1) if variant.clamped else index, pixel - floor, in_bounds)


def _masked(array: jax.Array, valid: jax.Array, fill: float = 0) -> jax.Array:
    """`array` with `fill` in the queries that are not `valid`."""
    return jnp.where(valid.reshape(*valid.shape, *(1,) * (array.ndim - 2)), array, fill)
