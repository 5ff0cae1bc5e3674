"""The numbers of a drawn call: inside, on kinks, far outside, huge, infinite and NaN."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from tests.helpers.cases import dtype_of

if TYPE_CHECKING:
    from .draw import Form

# Large enough to overflow where two are multiplied, small enough to be finite in the dtype.
HUGE = {"float16": 6e4, "bfloat16": 1e30, "float32": 1e30, "float64": 1e200}
SPECIAL = (np.nan, np.inf, -np.inf)
# The share of samples that are not inside their level, by the style of the call.
OUTSIDE = {"finite": 0.1, "kinks": 0.7, "outside": 0.6, "huge": 0.2, "not finite": 0.1, "hostile": 0.6}


def draw_arrays(
    rng: np.random.Generator, form: Form, levels: tuple[tuple[int, int], ...], sizes: tuple[int, int, int], style: str
) -> dict[str, np.ndarray]:
    """The arrays of a Case."""
    N, S, Q = sizes
    M, D, K = form.M, form.D, sum(form.points)
    level_of = form.level_of_samples
    extent = np.array(levels, np.float64).reshape(-1, 2)[level_of, ::-1]  # (W, H) of each sample
    locations = _locations(rng, (N, Q, M, K, 2), extent, form.align_corners, style)
    # A constant value along S needs no memory: draw one pixel where S is large.
    value = rng.standard_normal((N, min(S, 5000), M, D))
    if S > 5000:
        value = np.broadcast_to(value[:, :1], (N, S, M, D))
    arrays = {"value": value, "locations": locations, "weights": rng.uniform(-0.5, 1, (N, Q, M, K))}
    if form.fused:
        references = rng.uniform(0.1, 0.9, (N, Q, form.reference_levels, form.coordinates))
        if style in ("kinks", "hostile"):
            references = np.round(references * 8) / 8
        of_sample = references[:, :, level_of if form.reference_levels > 1 else level_of * 0][:, :, None]
        points = form.points_of_samples[:, None]
        step = of_sample[..., 2:] * 0.5 / points if form.coordinates == 4 else 1 / extent
        with np.errstate(all="ignore"):
            offsets = np.nan_to_num((locations - of_sample[..., :2]) / step, nan=0.5, posinf=9.0, neginf=-9.0)
        arrays["locations"] = np.round(offsets * 8) / 8 if style == "kinks" else offsets
        arrays["weights"] = rng.standard_normal((N, Q, M, K)) * rng.choice((0.5, 3))
        arrays["references"] = references
    arrays["grad_output"] = rng.standard_normal((N, Q, M, D))
    arrays = {name: _cast(array, form.dtype_of(name)) for name, array in arrays.items()}
    for name, array in arrays.items():
        if style in ("not finite", "hostile") and rng.random() < 0.45:
            _place(rng, array, SPECIAL)
        if style in ("huge", "hostile") and rng.random() < 0.4:
            huge = HUGE[form.dtype_of(name)]
            _place(rng, array, (huge, -huge))
    if form.fused and style in ("not finite", "huge", "hostile") and arrays["weights"].size:
        _mask_logits(rng, arrays["weights"])
    return arrays


def _cast(array: np.ndarray, dtype: str) -> np.ndarray:
    if array.strides and 0 in array.strides and array.size > 10_000:
        return np.broadcast_to(array[:, :1].astype(dtype_of(dtype)), array.shape)
    limit = HUGE[dtype]
    return np.clip(array, -limit, limit).astype(dtype_of(dtype))


def _locations(
    rng: np.random.Generator, shape: tuple[int, ...], extent: np.ndarray, align_corners: bool, style: str
) -> np.ndarray:
    """Normalised locations: mostly inside, the others on kinks, on borders or outside."""
    scale = np.maximum(extent - 1, 1) if align_corners else extent
    pixels = rng.uniform(-1.3, 0.3, shape) + rng.uniform(0, 1, shape) * (extent + 1)
    other = rng.random(shape) < OUTSIDE[style]
    if style in ("kinks", "hostile", "not finite"):
        on_kinks = np.floor(rng.uniform(-1, 0, shape) + rng.random(shape) * (extent + 2))
        half = np.where(rng.random(shape) < 0.2, 0.5, 0.0)
        pixels = np.where(other, on_kinks + half, pixels)
    elif style in ("outside", "huge"):
        far = rng.choice((-1.0, 1.0), shape) * 10.0 ** rng.uniform(0, 6 if style == "outside" else 30, shape)
        pixels = np.where(other, far, pixels)
    return (pixels if align_corners else pixels + 0.5) / scale


def _place(rng: np.random.Generator, array: np.ndarray, numbers: tuple[float, ...]) -> None:
    """A few of `numbers` at random places of `array`, or along one row of it."""
    if not array.size or not array.flags.writeable:
        return
    number = numbers[rng.integers(len(numbers))]
    if rng.random() < 0.25:
        axis = int(rng.integers(array.ndim))
        at = [int(rng.integers(n)) for n in array.shape]
        array[(*at[:axis], slice(None), *at[axis + 1 :])] = number
    else:
        for _ in range(int(rng.integers(1, 4))):
            array.reshape(-1)[int(rng.integers(array.size))] = number


def _mask_logits(rng: np.random.Generator, logits: np.ndarray) -> None:
    """Logits of minus infinity, as masks have them, and very different ones."""
    kind = rng.random()
    if kind < 0.3:
        logits[rng.random(logits.shape) < 0.3] = -np.inf
    elif kind < 0.5:
        logits[rng.random(logits.shape) < 0.2] = 300
