"""``python -m cupy_msda demo``: deformable attention on a photograph, forward and backward, and a picture of it.

Every pixel of the finest level is a query. Its heads sample P points in each level of an image pyramid, along and
across the edge at this pixel. The weight of a sample depends on how close its colour is to that of the query. So the
output is the photograph, smoothed along its edges. The loss compares the output with the photograph.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .. import arrays
from ..api import ms_deform_attn_backward, ms_deform_attn_forward
from ..cpu import tier
from .check import relative_error
from .output import CommandError, one_line

PHOTOGRAPH = Path(__file__).parent.parent / "data" / "chelsea.jpg"
LEVELS, POINTS, HEADS, CHANNELS = 4, 4, 4, 8
STEP = 1.3  # pixels from one point to the next; the points are at no whole pixels
COLOUR_SCALE = 0.15
REPEATS = 5


@dataclass(frozen=True)
class Scene:
    """The operator's arguments, made from a photograph."""

    photograph: np.ndarray  # [H, W, 3], 0 to 1, the finest level
    shapes: list[tuple[int, int]]
    value: np.ndarray
    locations: np.ndarray
    weights: np.ndarray


@dataclass(frozen=True)
class Outcome:
    """Results, times and errors of one run."""

    backend: str
    output: np.ndarray
    grad_value: np.ndarray
    forward_seconds: float
    backward_seconds: float
    errors: dict[str, float]


def make_scene(photograph: np.ndarray) -> Scene:
    """An image pyramid, locations along and across the edges, and weights by colour."""
    pyramid = [photograph]
    while len(pyramid) < LEVELS:
        pyramid.append(_halve(pyramid[-1]))
    shapes = [level.shape[:2] for level in pyramid]
    H, W = shapes[0]
    features = np.concatenate([_features(level).reshape(-1, CHANNELS) for level in pyramid])
    value = np.repeat(features[None, :, None], HEADS, axis=2).astype(np.float32)

    luminance = photograph.mean(-1)
    gy, gx = (np.gradient(luminance, axis=axis) if luminance.shape[axis] > 1 else 0 * luminance for axis in (0, 1))
    angle = np.arctan2(gy, gx).ravel()[:, None] + np.arange(HEADS) * (2 * np.pi / HEADS)
    direction = np.stack((np.cos(angle), np.sin(angle)), -1)  # [Q, M, 2]
    offsets = direction[:, :, None, None] * (STEP * np.arange(1, POINTS + 1))[:, None]
    y, x = np.mgrid[:H, :W]
    reference = np.stack(((x + 0.5) / W, (y + 0.5) / H), -1).reshape(-1, 1, 1, 1, 2)
    size = np.array([(w, h) for h, w in shapes])[:, None]
    # Zeros from outside the photograph would darken its border. Locations keep off the outermost pixel centres, where
    # their gradient jumps.
    locations = np.clip(reference + offsets / size, 0.51 / size, 1 - 0.51 / size)[None].astype(np.float32)

    colours = _nearest(pyramid, locations[0])
    distance = ((colours - photograph.reshape(-1, 1, 1, 1, 3)) ** 2).sum(-1)
    logits = -distance / COLOUR_SCALE**2 - 0.5 * np.arange(LEVELS)[:, None]
    logits = logits.reshape(H * W, HEADS, LEVELS * POINTS)
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    weights = (weights / weights.sum(-1, keepdims=True)).reshape(1, H * W, HEADS, LEVELS, POINTS)
    return Scene(photograph, shapes, value, locations, weights.astype(np.float32))


def choose_backend(name: str) -> str:
    """``cpu`` or ``cuda`` for ``auto``, ``cpu`` or ``cuda``."""
    if name == "cpu":
        return "cpu"
    reason = arrays.cuda_unavailable()
    if name == "cuda" and reason is not None:
        raise CommandError(f"the backend cuda cannot be used here: {reason}")
    return "cpu" if reason is not None else "cuda"


def run_on(scene: Scene, name: str) -> tuple[Outcome, str | None]:
    """:func:`run` on the backend of this name; where ``auto`` finds a GPU that fails, on the CPU, with the reason."""
    backend = choose_backend(name)
    try:
        return run(scene, backend), None
    except Exception as error:
        if backend == "cpu":
            raise
        reason = f"the backend cuda fails here: {one_line(error)}"
        if name == "cuda":
            raise CommandError(reason) from error
    return run(scene, "cpu"), reason


def run(scene: Scene, backend: str) -> Outcome:
    """Forward and backward, timed after one warm-up call, and their errors against the NumPy path in float64."""
    put, get, synchronize = _array_functions(backend)
    value, locations, weights = (put(array) for array in (scene.value, scene.locations, scene.weights))

    def forward() -> Any:
        return ms_deform_attn_forward(value, scene.shapes, None, locations, weights, 64)

    output = get(forward())
    grad_output = _grad_output(scene, output)
    grad_on_device = put(grad_output)

    def backward() -> Any:
        return ms_deform_attn_backward(value, scene.shapes, None, locations, weights, grad_on_device, 64)

    grads = [get(grad) for grad in backward()]
    references = _float64_results(scene, grad_output)
    names = ("output", "grad_value", "grad_locations", "grad_weights")
    errors = {
        name: relative_error(result, reference)
        for name, result, reference in zip(names, (output, *grads), references, strict=True)
    }
    return Outcome(
        backend=backend,
        output=output,
        grad_value=grads[0],
        forward_seconds=_median_seconds(forward, synchronize),
        backward_seconds=_median_seconds(backward, synchronize),
        errors=errors,
    )


def table(scene: Scene, outcome: Outcome) -> str:
    """Backend, sizes, times and errors, one per line."""
    levels = ", ".join(f"{h}x{w}" for h, w in scene.shapes)
    N, S, M, D = scene.value.shape
    rows = [
        ("backend", f"cpu, computed by {tier.describe()}" if outcome.backend == "cpu" else outcome.backend),
        ("levels (H x W)", levels),
        ("sizes", f"N={N} S={S} M={M} D={D} L={LEVELS} P={POINTS} Q={scene.locations.shape[1]}"),
        ("dtype", str(scene.value.dtype)),
        ("forward", f"{outcome.forward_seconds * 1e3:.3f} ms"),
        ("backward", f"{outcome.backward_seconds * 1e3:.3f} ms"),
        *((f"error of {name}", f"{error:.1e}") for name, error in outcome.errors.items()),
    ]
    return "\n".join(f"{name:24}{text}" for name, text in rows)


def _grad_output(scene: Scene, output: np.ndarray) -> np.ndarray:
    """Gradient of half the squared distance between the heads' mean colour and the photograph."""
    Q = output.shape[1]
    heads = output.reshape(Q, HEADS, CHANNELS)
    grad = np.zeros_like(heads)
    grad[..., :3] = ((heads.mean(1)[:, :3] - scene.photograph.reshape(Q, 3)) / HEADS)[:, None]
    return grad.reshape(output.shape)


def _features(level: np.ndarray) -> np.ndarray:
    """Eight channels per pixel: colour, luminance, its gradients and their length, and a constant."""
    luminance = level.mean(-1)
    slopes = [np.gradient(luminance, axis=a) if luminance.shape[a] > 1 else 0 * luminance for a in (0, 1)]
    rest = (luminance, *slopes, np.hypot(*slopes), np.ones_like(luminance))
    return np.concatenate((level, np.stack(rest, -1)), -1)


def _halve(level: np.ndarray) -> np.ndarray:
    H, W = level.shape[:2]
    padded = np.pad(level, ((0, H % 2), (0, W % 2), (0, 0)), mode="edge")
    return padded.reshape(-(-H // 2), 2, -(-W // 2), 2, 3).mean((1, 3))


def _nearest(pyramid: list[np.ndarray], locations: np.ndarray) -> np.ndarray:
    """Colours [Q, M, L, P, 3] of the pixels nearest to `locations`."""
    colours = []
    for level, image in enumerate(pyramid):
        size = np.array(image.shape[1::-1])
        x, y = np.moveaxis(np.clip((locations[:, :, level] * size).astype(int), 0, size - 1), -1, 0)
        colours.append(image[y, x])
    return np.stack(colours, 2)


def _float64_results(scene: Scene, grad_output: np.ndarray) -> tuple[np.ndarray, ...]:
    """Output and gradients by the NumPy path in float64."""
    arrays_32 = (scene.value, scene.locations, scene.weights, grad_output)
    value, locations, weights, grad = (array.astype(np.float64) for array in arrays_32)
    output = ms_deform_attn_forward(value, scene.shapes, None, locations, weights, 64)
    return output, *ms_deform_attn_backward(value, scene.shapes, None, locations, weights, grad, 64)


def _array_functions(backend: str) -> tuple[Any, Any, Any]:
    """NumPy to the backend's arrays, back to NumPy, and waiting for the device."""
    if backend == "cpu":
        return np.asarray, np.asarray, lambda: None
    cupy = arrays.require_cupy("the backend cuda")
    return cupy.asarray, cupy.asnumpy, cupy.cuda.Device().synchronize


def _median_seconds(call: Any, synchronize: Any) -> float:
    times = []
    for _ in range(REPEATS):
        synchronize()
        begin = time.perf_counter()
        call()
        synchronize()
        times.append(time.perf_counter() - begin)
    return sorted(times)[REPEATS // 2]
