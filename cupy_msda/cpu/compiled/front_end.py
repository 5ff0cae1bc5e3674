"""The fused front end as loops, for numba: locations and weights of a block, and their gradients back to its inputs.

numba's cache looks at the file of a kernel alone, so that a kernel calls no function of another file.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np

_function = numba.njit(nogil=True, forceinline=True)


@_function
def _location_per_offset(references: np.ndarray, at: Any, height: int, width: int, points: int) -> Any:
    """How far an offset of 1 moves the location, along x and y; `at` is the index of the reference point."""
    one = references.dtype.type
    if references.shape[3] == 2:
        return one(1.0 / width), one(1.0 / height)
    of_box = one(0.5 / max(points, 1))
    return references[at[0], at[1], at[2], 2] * of_box, references[at[0], at[1], at[2], 3] * of_box


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
    images, queries, heads, K = logits.shape
    zero, lowest = logits.dtype.type(0), logits.dtype.type(-np.inf)
    for image in range(images):
        for query in range(queries):
            for head in range(heads):
                largest, total = lowest, zero
                for k in range(K):
                    if logits[image, query, head, k] > largest:
                        largest = logits[image, query, head, k]
                for k in range(K):
                    power = np.exp(logits[image, query, head, k] - largest)
                    weights[image, query, head, k] = power
                    total += power
                for k in range(K):
                    weights[image, query, head, k] /= total
            first = 0
            for level in range(levels.shape[0]):
                height, width, points = levels[level, 0], levels[level, 1], levels[level, 3]
                at = (image, query, level if references.shape[2] > 1 else 0)
                x, y = references[at[0], at[1], at[2], 0], references[at[0], at[1], at[2], 1]
                step_x, step_y = _location_per_offset(references, at, height, width, points)
                for head in range(heads):
                    for k in range(2 * first, 2 * (first + points), 2):
                        locations[image, query, head, k] = x + offsets[image, query, head, k] * step_x
                        locations[image, query, head, k + 1] = y + offsets[image, query, head, k + 1] * step_y
                first += points


@_function
def _product(gradient: Any, factor: Any) -> Any:
    """The product; 0 where `gradient` is, whatever `factor` is: a sample that does not count has no part."""
    return gradient if gradient == 0 else gradient * factor


def backward_of_logits(weights: np.ndarray, grad_weights: np.ndarray) -> None:
    """Replace the gradient of the weights [images, queries, heads, K] by that of the logits."""
    images, queries, heads, K = weights.shape
    for image in range(images):
        for query in range(queries):
            for head in range(heads):
                inner = weights.dtype.type(0)
                for k in range(K):
                    inner += weights[image, query, head, k] * grad_weights[image, query, head, k]
                for k in range(K):
                    gradient = grad_weights[image, query, head, k] - inner
                    grad_weights[image, query, head, k] = weights[image, query, head, k] * gradient


def backward_of_offsets(
    references: np.ndarray,
    offsets: np.ndarray,
    levels: np.ndarray,
    grad_locations: np.ndarray,
    grad_references: np.ndarray,
) -> None:
    """Replace the gradient of the locations by that of the offsets, and add to that of the reference points.

    Shapes as in :func:`materialise`.
    """
    images, queries, heads, _ = offsets.shape
    boxes, number = references.shape[3] == 4, references.dtype.type
    for image in range(images):
        for query in range(queries):
            first = 0
            for level in range(levels.shape[0]):
                height, width, points = levels[level, 0], levels[level, 1], levels[level, 3]
                at = level if references.shape[2] > 1 else 0
                step_x, step_y = _location_per_offset(references, (image, query, at), height, width, points)
                of_box = number(0.5 / max(points, 1))
                of_x, of_y, of_width, of_height = number(0), number(0), number(0), number(0)
                for head in range(heads):
                    for k in range(2 * first, 2 * (first + points), 2):
                        by_x, by_y = grad_locations[image, query, head, k], grad_locations[image, query, head, k + 1]
                        of_x += by_x
                        of_y += by_y
                        if boxes:
                            of_width += _product(by_x, offsets[image, query, head, k] * of_box)
                            of_height += _product(by_y, offsets[image, query, head, k + 1] * of_box)
                        grad_locations[image, query, head, k] = _product(by_x, step_x)
                        grad_locations[image, query, head, k + 1] = _product(by_y, step_y)
                grad_references[image, query, at, 0] += of_x
                grad_references[image, query, at, 1] += of_y
                if boxes:
                    grad_references[image, query, at, 2] += of_width
                    grad_references[image, query, at, 3] += of_height
                first += points
