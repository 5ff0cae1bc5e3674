"""The fused front end as loops, for numba: locations and weights of a block, and their gradients back to its inputs.

numba's cache looks at the file of a kernel alone, so that a kernel calls no function of another file.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np

_function = numba.njit(nogil=True)


@_function
def _softmax(logits: np.ndarray, weights: np.ndarray) -> None:
    largest, total = type(logits[0])(-np.inf), type(logits[0])(0)
    for k in range(logits.shape[0]):
        if logits[k] > largest:
            largest = logits[k]
    for k in range(logits.shape[0]):
        weights[k] = np.exp(logits[k] - largest)
        total += weights[k]
    for k in range(logits.shape[0]):
        weights[k] /= total


@_function
def _location_per_offset(reference: np.ndarray, height_width_start_points: np.ndarray) -> Any:
    """How far an offset of 1 moves the location, along x and y."""
    height, width, _, points = height_width_start_points
    one = type(reference[0])
    if reference.shape[0] == 2:
        return one(1.0 / width), one(1.0 / height)
    of_box = one(0.5 / points)
    return reference[2] * of_box, reference[3] * of_box


def materialise(
    references: np.ndarray,
    offsets: np.ndarray,
    logits: np.ndarray,
    levels: np.ndarray,
    locations: np.ndarray,
    weights: np.ndarray,
) -> None:
    """Fill in locations and weights of a block, in the shapes of offsets and logits.

    Shapes are [images, queries, reference points, 2 or 4], [images, queries, heads, 2 * K] and [.., K]; `levels` as in
    :mod:`.kernels`.
    """
    images, queries, heads, _ = logits.shape
    for image in range(images):
        for query in range(queries):
            for head in range(heads):
                _softmax(logits[image, query, head], weights[image, query, head])
            first = 0
            for level in range(levels.shape[0]):
                reference = references[image, query, level if references.shape[2] > 1 else 0]
                step_x, step_y = _location_per_offset(reference, levels[level])
                last = first + levels[level, 3]
                for head in range(heads):
                    offset, location = offsets[image, query, head], locations[image, query, head]
                    for k in range(first, last):
                        location[2 * k] = reference[0] + offset[2 * k] * step_x
                        location[2 * k + 1] = reference[1] + offset[2 * k + 1] * step_y
                first = last


@_function
def _product(gradient: Any, factor: Any) -> Any:
    """The product; 0 where `gradient` is, whatever `factor` is: a sample that does not count has no part."""
    return gradient if gradient == 0 else gradient * factor


def backward(
    references: np.ndarray,
    offsets: np.ndarray,
    weights: np.ndarray,
    levels: np.ndarray,
    grad_locations: np.ndarray,
    grad_weights: np.ndarray,
    grad_references: np.ndarray,
) -> None:
    """Replace gradients of locations and weights by those of offsets and logits; add to those of the reference points.

    Shapes as in :func:`materialise`.
    """
    images, queries, heads, K = weights.shape
    boxes = references.shape[3] == 4
    for image in range(images):
        for query in range(queries):
            for head in range(heads):
                weight, of_weight = weights[image, query, head], grad_weights[image, query, head]
                inner = weight.dtype.type(0)
                for k in range(K):
                    inner += weight[k] * of_weight[k]
                for k in range(K):
                    of_weight[k] = weight[k] * (of_weight[k] - inner)
            first = 0
            for level in range(levels.shape[0]):
                at = level if references.shape[2] > 1 else 0
                reference, of_reference = references[image, query, at], grad_references[image, query, at]
                step_x, step_y = _location_per_offset(reference, levels[level])
                of_box = type(reference[0])(0.5 / max(levels[level, 3], 1))
                last = first + levels[level, 3]
                for head in range(heads):
                    offset, gradient = offsets[image, query, head], grad_locations[image, query, head]
                    for k in range(first, last):
                        by_x, by_y = gradient[2 * k], gradient[2 * k + 1]
                        of_reference[0] += by_x
                        of_reference[1] += by_y
                        if boxes:
                            of_reference[2] += _product(by_x, offset[2 * k] * of_box)
                            of_reference[3] += _product(by_y, offset[2 * k + 1] * of_box)
                        gradient[2 * k] = _product(by_x, step_x)
                        gradient[2 * k + 1] = _product(by_y, step_y)
                first = last
