"""Inputs for tuning, as a model has them: samples near reference points, in levels like those of an image."""

from __future__ import annotations

import functools
import math

import numpy as np

from ...arrays import item_size
from ...call import Problem, contiguous_starts

Levels = tuple[tuple[int, int, int], ...]
# Standard deviation of the offsets of samples, in pixels.
_SPREAD = 3.0
# Side of the square that holds all reference points of a cluster, as a share of the image's.
_CLUSTER_SIDE = 0.3


@functools.lru_cache(maxsize=64)
def levels_of(S: int, L: int) -> Levels:
    """(H, W, start) of L levels, each half as wide and high as the one before; of S pixels in all if there are such."""
    found = _halved(S, L)
    if found is None:
        side = max(1, math.isqrt(S // L))
        found = [(side, max(1, S // L // side))] * L if S >= L else [(1, 1)] * L
        starts = contiguous_starts(found)
        return tuple((h, w, min(start, S - 1)) for (h, w), start in zip(found, starts, strict=True))
    return tuple((h, w, start) for (h, w), start in zip(found, contiguous_starts(found), strict=True))


def _halved(S: int, L: int) -> list[tuple[int, int]] | None:
    """Such levels whose first one is as near to a square as possible."""
    share = sum(0.25**level for level in range(L))
    side = math.sqrt(S / share)
    for H in sorted(range(1, int(4 * side) + 2), key=lambda h: abs(math.log(h / side))):
        near = int(S / share / H)
        for W in range(max(1, near - 8), near + 2):
            levels = [(-(-H // 2**level), -(-W // 2**level)) for level in range(L)]
            if sum(h * w for h, w in levels) == S:
                return levels
    return None


class Inputs:
    """The arrays of one image of a problem, as their bits; all images of a call have the same.

    `clustered`: the reference points lie in a tenth of the image, where they are not the pixels.
    """

    def __init__(self, problem: Problem, levels: Levels, seed: int, clustered: bool = False) -> None:
        draw = np.random.default_rng(seed)
        S, Q, M, D = problem.S, problem.Q, problem.M, problem.D
        self.value = as_bits(draw.standard_normal((S, M, D), np.float32), problem.value_dtype)
        self.grad_output = as_bits(draw.standard_normal((Q, M, D), np.float32), problem.value_dtype)
        of_sample = np.repeat(np.arange(problem.L), problem.points)
        sizes = np.array([(w, h) for h, w, _ in levels], np.float32)[of_sample]
        reference = _references(problem, levels, draw, clustered)
        offsets = _SPREAD * draw.standard_normal((Q, M, problem.K, 2), np.float32)
        logits = draw.standard_normal((Q, M, problem.K), np.float32)
        self.references: np.ndarray | None = None
        if problem.fused is None:
            weights = np.exp(logits)
            weights /= weights.sum(-1, keepdims=True)
            self.locations = as_bits(reference[:, None, None] + offsets / sizes, problem.location_dtype)
            self.weights = as_bits(weights, problem.location_dtype)
            return
        coordinates = reference
        if problem.fused.coordinates == 4:
            coordinates = np.concatenate([reference, np.full_like(reference, 0.1)], -1)
            offsets /= 0.05 * sizes  # half of the box is one unit
        repeated = np.repeat(coordinates[:, None], problem.fused.levels, 1)
        self.references = as_bits(repeated, problem.fused.dtype)
        if problem.packed:
            offsets = np.concatenate([offsets.reshape(Q, M, -1), logits], -1)
        self.locations = as_bits(offsets, problem.location_dtype)
        self.weights = as_bits(logits, problem.location_dtype)

    @property
    def arrays(self) -> dict[str, np.ndarray]:
        """All of them by name."""
        found = {name: getattr(self, name) for name in ("value", "locations", "weights", "grad_output")}
        return found if self.references is None else found | {"references": self.references}


def are_pixels(problem: Problem, levels: Levels) -> bool:
    """Whether the queries are taken to be the pixels of all levels."""
    return sum(h * w for h, w, _ in levels) == problem.Q


def _references(problem: Problem, levels: Levels, draw: np.random.Generator, clustered: bool) -> np.ndarray:
    """Reference points (x, y) of all queries: the centres of the pixels where there are as many."""
    if not are_pixels(problem, levels):
        return draw.random((problem.Q, 2), np.float32) * np.float32(_CLUSTER_SIDE if clustered else 1)
    centres = [
        np.stack(np.meshgrid((np.arange(w) + 0.5) / w, (np.arange(h) + 0.5) / h), -1).reshape(-1, 2)
        for h, w, _ in levels
    ]
    return np.concatenate(centres).astype(np.float32)


def nbytes_of(problem: Problem) -> int:
    """Bytes of the inputs of a problem."""
    value = problem.N * problem.M * problem.D * (problem.S + problem.Q) * item_size(problem.value_dtype)
    samples = 3 * problem.N * problem.Q * problem.M * problem.K * item_size(problem.location_dtype)
    return value + samples


def as_bits(array: np.ndarray, dtype: str) -> np.ndarray:
    """The numbers in a dtype; bfloat16, which NumPy does not have, as its uint16 bits."""
    if dtype != "bfloat16":
        return np.ascontiguousarray(array, dtype)
    bits = np.ascontiguousarray(array, np.float32).view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)


def from_bits(array: np.ndarray, dtype: str) -> np.ndarray:
    """The numbers in float64, of bits that :func:`as_bits` makes."""
    if dtype == "bfloat16":
        array = (array.astype(np.uint32) << 16).view(np.float32)
    return array.astype(np.float64)
