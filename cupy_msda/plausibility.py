"""What ``validate=True`` says about numbers that the contract allows but that are probably a mistake.

A warning needs clear evidence: locations a few percent outside [0, 1] are usual,
and so are far offsets on small levels.
"""

from __future__ import annotations

import sys
import warnings
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np

from . import arrays
from .arrays import View
from .call import ArgumentNames, Operands, Problem

_PACKAGE = Path(__file__).parent
# Of coordinates. A share of fewer says nothing, and a share of more is that of a part.
_FEWEST, _MOST = 16, 1 << 20
# On levels with a shorter side, offsets of a few pixels lead far outside. They count where no other level is there, and
# then locations are far outside only beyond so many pixels more.
_SHORTEST_SIDE, _FAR = 8, 8
# Pixels: more than this share is above 1.5, and less than that one below -0.5.
_ABOVE, _NOT_BELOW = 0.5, 0.05
# The coordinates of grid_sample: at least this share is below -0.5, and at least that one within [-1, 1].
_BELOW, _WITHIN = 0.1, 0.95
# (W, H): the correlation of a value with the one W pixels later is at most the first, with the one H pixels later at
# least the second.
_UNRELATED, _RELATED = 0.2, 0.4
# Channels that the correlation is computed of.
_CHANNELS = 64


def check(problem: Problem, operands: Operands, names: ArgumentNames) -> None:
    """Warns about sizes that look like (W, H), and about locations or reference points in other units than [0, 1]."""
    if problem.empty or problem.levels is None:
        return
    _check_sizes(problem.levels, operands.value)
    if operands.references is not None:
        points = _valid_queries(problem, operands.references, operands.lengths)
        _check_units("reference_points", points[..., :2])
        return
    points = _valid_queries(problem, operands.locations, operands.lengths)
    points = points.reshape(*points.shape[:2], problem.K, 2)
    sides = np.repeat([min(h, w) for h, w, _ in problem.levels], problem.points)
    large = sides >= _SHORTEST_SIDE
    if large.any():
        _check_units(names.locations, points[:, :, large])
    else:
        _check_units(names.locations, points, (_FAR / sides)[:, None])


def _check_sizes(levels: tuple[tuple[int, int, int], ...], value: View) -> None:
    """Features of neighbouring pixels are similar: a value is like the one below it, which is W pixels later."""
    level, (h, w, start) = max(enumerate(levels), key=lambda numbered: numbered[1][0] * numbered[1][1])
    if h == w or min(h, w) < _SHORTEST_SIDE:
        return
    pixels = _numbers("value", value, (0, slice(start, start + h * w))).reshape(h * w, -1)
    pixels = pixels[:, :: -(-pixels.shape[1] // _CHANNELS)]
    pixels = pixels - pixels.mean(0)
    if not pixels.any() or not np.isfinite(pixels).all():
        return
    by_width, by_height = (_correlation(pixels, lag) for lag in (w, h))
    if by_width <= _UNRELATED and by_height >= _RELATED:
        _warn(
            f"spatial_shapes: expected (H, W) per level, got ({h}, {w}) for level {level}, which looks like (W, H): "
            f"the correlation of a value with the one {w} pixels later, below it, is {by_width:.2f}, and with the one "
            f"{h} pixels later {by_height:.2f}"
        )


def _correlation(pixels: np.ndarray, lag: int) -> float:
    first, second = pixels[:-lag].ravel(), pixels[lag:].ravel()
    norm = np.sqrt((first @ first) * (second @ second))
    return float(first @ second / norm) if norm else 0.0


def _valid_queries(problem: Problem, points: View, lengths: View | None) -> np.ndarray:
    """The points [valid queries, ...] of the queries that are not padding, or of some of them."""
    per_query = int(np.prod(points.shape[2:]))
    step = max(1, problem.N * problem.Q * per_query // _MOST)
    numbers = _numbers("points", points, (slice(None), slice(None, None, step)))
    if lengths is None:
        return numbers.reshape(-1, *points.shape[2:])
    query = np.arange(0, problem.Q, step)
    return numbers[query < arrays.to_numpy(lengths)[:, None]]


def _check_units(name: str, points: np.ndarray, further: np.ndarray | float = 0.0) -> None:
    """Warns about `points` [..., 2] that lie outside; what is outside by less than `further` more does not count."""
    finite = np.isfinite(points)
    numbers = points[finite]
    if numbers.size < _FEWEST:
        return
    above, below = (points > 1.5 + further)[finite].mean(), (points < -0.5 - further)[finite].mean()
    got = f"{name}: expected coordinates from 0 to 1 over the level, got {numbers.min():.3g} to {numbers.max():.3g}"
    if above > _ABOVE and below < _NOT_BELOW:
        _warn(f"{got}, {above:.0%} far above 1, which look like pixels: divide x by W and y by H")
    elif below >= _BELOW and (np.abs(numbers) <= 1).mean() >= _WITHIN:
        _warn(f"{got}, {below:.0%} far below 0, which look like grid_sample's, from -1 to 1: use (x + 1) / 2")


def _numbers(name: str, view: View, index: tuple[Any, ...]) -> np.ndarray:
    """A part of an array in float64."""
    part = arrays.view(name, view.array[index])
    numbers = arrays.to_numpy(part)
    if part.dtype == "bfloat16":
        numbers = (numbers.astype(np.uint32) << 16).view(np.float32)
    return numbers.astype(np.float64)


def _warn(message: str) -> None:
    """A UserWarning at the line that calls this package."""
    frame: FrameType | None = sys._getframe(1)
    depth = 2
    while frame is not None and Path(frame.f_code.co_filename).is_relative_to(_PACKAGE):
        frame = frame.f_back
        depth += 1
    warnings.warn(message, UserWarning, stacklevel=depth)
