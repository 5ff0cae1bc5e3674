"""Inputs for the tests: sizes that reach every code path, numbers drawn from a seed, and expected results."""

import itertools
from dataclasses import dataclass, field
from typing import NamedTuple

import ml_dtypes
import numpy as np

from cupy_msda.call import Wanted
from tests.helpers import reference

DTYPE_PAIRS = (
    ("float64", "float64"),
    ("float32", "float32"),
    ("float16", "float16"),
    ("float16", "float32"),
    ("bfloat16", "bfloat16"),
    ("bfloat16", "float32"),
)


def dtype_of(name: str) -> np.dtype:
    return np.dtype(ml_dtypes.bfloat16) if name == "bfloat16" else np.dtype(name)


class Inputs(NamedTuple):
    value: np.ndarray
    shapes: np.ndarray
    starts: np.ndarray | None
    locations: np.ndarray
    weights: np.ndarray
    grad_output: np.ndarray


class FusedInputs(NamedTuple):
    """`locations` are offsets and `weights` are logits, or None where `locations` holds both."""

    value: np.ndarray
    shapes: np.ndarray
    starts: np.ndarray | None
    locations: np.ndarray
    weights: np.ndarray | None
    grad_output: np.ndarray
    references: np.ndarray


@dataclass(frozen=True)
class Case:
    """Sizes and options of one problem. `queries` None: one query per pixel, in the order of S, as in an encoder."""

    name: str
    levels: tuple[tuple[int, int], ...] = ((6, 7), (3, 4))
    N: int = 2
    M: int = 2
    D: int = 8
    P: int = 2
    queries: int | None = 5
    starts: tuple[int, ...] | None = None
    S: int | None = None
    variant: dict = field(default_factory=dict)

    def __str__(self) -> str:
        return self.name

    def inputs(self, value_dtype: str = "float32", location_dtype: str | None = None, seed: int = 0) -> Inputs:
        rng = np.random.default_rng([seed, self.D, self.M, self.P])
        location_dtype = location_dtype or value_dtype
        shapes = np.array(self.levels, np.int64).reshape(-1, 2)
        S = self.S if self.S is not None else int(shapes.prod(1).sum())
        Q = S if self.queries is None else self.queries
        L = len(shapes)
        value = rng.standard_normal((self.N, S, self.M, self.D)).astype(dtype_of(value_dtype))
        # Some samples are outside their level, on each side. Fractions of a pixel keep away from 0 and 1, where the
        # gradient of the location jumps. A cast to 16 bits moves them by less than that on levels of this size.
        size = shapes[:, ::-1].reshape(L, 1, 2)
        samples = (L, self.P)
        if "num_points" in self.variant:
            size = np.repeat(size[:, 0], self.variant["num_points"], axis=0)
            samples = size.shape[:1]
        cell = rng.integers(-3, size + 2, (self.N, Q, self.M, *samples, 2))
        pixel = cell + rng.uniform(0.1, 0.9, cell.shape)
        if self.variant.get("align_corners"):
            locations = pixel / np.maximum(size - 1, 1)
        elif self.variant.get("interpolation") == "nearest":
            locations = (pixel - 0.5) / size
        else:
            locations = (pixel + 0.5) / size
        locations = locations.astype(dtype_of(location_dtype))
        weights = rng.uniform(0.1, 1.0, cell.shape[:-1]).astype(dtype_of(location_dtype))
        grad_output = rng.standard_normal((self.N, Q, self.M * self.D)).astype(dtype_of(value_dtype))
        starts = None if self.starts is None else np.array(self.starts, np.int64)
        return Inputs(value, shapes, starts, locations, weights, grad_output)


def to_fused(
    inputs: Inputs,
    coordinates: int = 2,
    levels: int | None = None,
    packed: bool = False,
    reference_dtype: str | None = None,
    num_points: tuple[int, ...] | None = None,
    seed: int = 0,
) -> FusedInputs:
    """Offsets from reference points whose locations are those of `inputs`, up to a cast, and new logits.

    `levels` is the number of reference points per query, L unless given. A cast of the offset to 16 bits moves its
    sample by less than the distance to the next kink, on levels of a few pixels.
    """
    rng = np.random.default_rng([seed, 7])
    N, Q, M = inputs.locations.shape[:3]
    L = len(inputs.shapes)
    dtype = inputs.locations.dtype
    points = num_points or (inputs.locations.shape[4],) * L
    level_of = np.repeat(np.arange(L), points)
    size = inputs.shapes[level_of, ::-1].astype(np.float64)
    references = rng.uniform(0.2, 0.8, (N, Q, levels or L, coordinates)).astype(dtype_of(reference_dtype or dtype.name))
    of_sample = references.astype(np.float64)[:, :, level_of if references.shape[2] == L else level_of * 0][:, :, None]
    of_box = of_sample[..., 2:] * 0.5 / np.repeat(points, points)[:, None]
    location_per_offset = of_box if coordinates == 4 else 1 / size
    locations = inputs.locations.astype(np.float64).reshape(N, Q, M, -1, 2)
    offsets = ((locations - of_sample[..., :2]) / location_per_offset).astype(dtype)
    logits = rng.standard_normal((N, Q, M, len(level_of))).astype(dtype)
    if packed:
        offsets, logits = np.concatenate((offsets.reshape(N, Q, M, -1), logits), -1), None
    else:
        offsets, logits = offsets.reshape(inputs.locations.shape), logits.reshape(inputs.weights.shape)
    return FusedInputs(*inputs[:3], offsets, logits, inputs.grad_output, references)


def pixel_units(
    grad_locations: np.ndarray, shapes: np.ndarray, num_points: tuple[int, ...] | None = None
) -> np.ndarray:
    """Gradient of locations as d/d(pixel): comparable between levels."""
    size = shapes[:, None, ::-1] if num_points is None else np.repeat(shapes[:, ::-1], num_points, axis=0)
    return grad_locations.astype(np.float64) / size


def expected(inputs: Inputs, **variant) -> tuple[np.ndarray, tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Output and gradients of the float64 reference."""
    output = reference.forward(*inputs[:5], **variant)
    return output, reference.backward(*inputs, **variant)


CASES = (
    Case("plain"),
    Case("one_pixel_levels", levels=((1, 1), (1, 5), (4, 1)), D=4),
    Case("encoder_order", levels=((9, 11), (4, 5), (2, 2)), N=1, M=3, D=4, queries=None),
    Case("starts_with_gaps", starts=(4, 50), S=64),
    Case("overlapping_levels", starts=(3, 10), S=60),
    Case("one_level_eight_points", levels=((5, 6),), P=8),
    Case("many_samples", levels=((4, 5), (3, 3), (2, 2), (2, 1), (1, 2)), P=9, M=1, D=4, queries=3),
    Case("seventy_levels", levels=((2, 3),) * 70, N=1, M=1, D=4, P=1, queries=3),
    Case("tail_block", levels=((5, 6), (3, 3)), N=1, M=1, D=16, queries=70),
    *(
        Case(f"D{D}", levels=((4, 5), (2, 3)), N=1, M=2, D=D, queries=4)
        for D in (1, 2, 3, 6, 30, 32, 33, 36, 48, 64, 71, 128, 256, 1025)
    ),
)
SMALL_CASES = CASES[:9]
VARIANTS = (
    Case("points", levels=((6, 7), (3, 4), (2, 5)), variant={"num_points": (3, 6, 2)}),
    Case("equal_points", levels=((6, 7), (3, 4)), variant={"num_points": (3, 3)}),
    Case("points_in_chunks", levels=((6, 7), (3, 4)), M=1, D=4, variant={"num_points": (1, 35)}),
    Case("nearest", levels=((6, 7), (1, 4)), variant={"interpolation": "nearest"}),
    Case("border", levels=((6, 7), (1, 4)), variant={"padding_mode": "border"}),
    Case("align_corners", levels=((6, 7), (1, 4)), variant={"align_corners": True}),
    Case("one_sample_border", levels=((6, 7), (1, 4)), queries=1, P=1, variant={"padding_mode": "border"}),
    Case("one_sample_nearest", levels=((6, 7), (1, 4)), queries=1, P=1, variant={"interpolation": "nearest"}),
    Case("border_align_corners", variant={"padding_mode": "border", "align_corners": True}),
    Case(
        "encoder_order_nearest_points",
        levels=((9, 11), (4, 5)),
        N=1,
        D=16,
        queries=None,
        variant={"num_points": (2, 4), "interpolation": "nearest"},
    ),
    Case(
        "border_points",
        levels=((6, 7), (3, 4)),
        starts=(3, 10),
        S=60,
        D=33,
        variant={"num_points": (4, 1), "padding_mode": "border"},
    ),
)
# Every choice of some gradients, but not all, of a plain call.
PARTIAL_GRADIENTS = [
    Wanted(*asked) for asked in itertools.product((True, False), repeat=3) if any(asked) and not all(asked)
]


def gradient_names(wanted):
    return ", ".join(name for name, asked in wanted._asdict().items() if asked) or "nothing"


def expected_fused(inputs, num_points=None, **variant):
    """Output and gradients of value, offsets, logits and references of inputs by :func:`to_fused`."""
    of_logits = inputs.weights
    offsets = inputs.locations
    if of_logits is None:
        K = offsets.shape[-1] // 3
        offsets, of_logits = offsets[..., : 2 * K], offsets[..., 2 * K :]
    points = num_points or (of_logits.size // np.prod(of_logits.shape[:3]) // len(inputs.shapes),) * len(inputs.shapes)
    locations, weights = reference.locations_and_weights(inputs.shapes, inputs.references, offsets, of_logits, points)
    plain = Inputs(*inputs[:3], locations, weights, inputs.grad_output)
    output, (of_value, of_locations, of_weights) = expected(plain, num_points=points, **variant)
    of_references, grad_offsets, grad_logits = reference.fused_backward(
        inputs.shapes, inputs.references, offsets, weights, points, of_locations, of_weights
    )
    if inputs.weights is None:
        packed = np.concatenate((grad_offsets.reshape(*grad_logits.shape[:3], -1), grad_logits), -1)
        return output, (of_value, packed, None, of_references)
    grad_offsets, grad_logits = grad_offsets.reshape(offsets.shape), grad_logits.reshape(of_logits.shape)
    return output, (of_value, grad_offsets, grad_logits, of_references)


def expected_ragged(inputs, lengths, **variant):
    """Output and gradients of a ragged call, with zeros in the padding."""
    padding = np.arange(inputs.locations.shape[1]) >= np.array(lengths)[:, None]
    inputs = inputs._replace(weights=inputs.weights.copy())
    inputs.weights[padding] = 0
    output, grads = expected(inputs, **variant)
    output[padding] = 0
    for grad in grads[1:]:
        grad[padding] = 0
    return output, grads


# Encoders whose blocks take cross-level tiles: levels halved up and down, the coarse level first, levels with less than
# one row and less than two rows per tile, one level, a whole number of tiles. The last two have no cross-level tiles:
# levels overlap, or the tallest level is too thin.
CROSS_LEVEL = [
    Case("rounded_up", levels=((17, 20), (9, 10), (5, 5)), N=2, M=1, D=32, queries=None),
    Case("rounded_down", levels=((19, 21), (9, 10), (4, 5)), N=1, M=1, D=32, queries=None),
    Case("coarse_first", levels=((5, 5), (9, 10), (17, 20)), N=1, M=1, D=32, queries=None),
    Case("less_than_a_row", levels=((23, 9), (12, 5), (6, 3), (1, 2)), N=1, M=1, D=32, queries=None),
    Case("a_row_less", levels=((41, 4), (9, 3)), N=1, M=1, D=32, queries=None),
    Case("one_level", levels=((21, 13),), N=1, M=1, D=32, P=4, queries=None),
    Case("whole_bands", levels=((16, 12), (8, 6)), N=1, M=2, D=32, queries=None),
    Case("overlapping", levels=((9, 11), (4, 5)), starts=(0, 10), S=119, N=1, M=1, D=32, queries=None),
    Case("thin_tallest", levels=((24, 1), *((8, 12),) * 5), N=1, M=1, D=32, P=1, queries=None),
]
