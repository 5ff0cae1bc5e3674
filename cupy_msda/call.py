"""What travels from validation to the kernels: one frozen :class:`Call`, pure data that imports no framework.

:class:`Arguments` is a call as the user made it. :func:`cupy_msda.validate.read` turns it into a :class:`Call`: the
:class:`Problem` (sizes, dtypes, device and variant; hashable, and all that the planner looks at), the
:class:`Operands` (arrays) and the gradients that are :class:`Wanted`.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from .arrays import Device, View, item_size

VALUE_DTYPES = ("float16", "bfloat16", "float32", "float64")
SIXTEEN_BIT = ("float16", "bfloat16")


def accumulator_of(value_dtype: str) -> str:
    """Dtype of all arithmetic on a value of `value_dtype`."""
    return "float64" if value_dtype == "float64" else "float32"


def contiguous_starts(sizes: Sequence[Sequence[int]]) -> list[int]:
    """First pixel of each level of (H, W) where each level follows the one before it."""
    return [0, *itertools.accumulate(h * w for h, w in sizes)][: len(sizes)]


class Variant(NamedTuple):
    """Which form of the operator: :func:`cupy_msda.ms_deform_attn` says what each parameter means.

    In a :class:`Problem`, `num_points` is None where all levels have P points.
    """

    num_points: tuple[int, ...] | None = None
    interpolation: str = "bilinear"
    padding_mode: str = "zeros"
    align_corners: bool = False

    @property
    def nearest(self) -> bool:
        return self.interpolation == "nearest"

    @property
    def clamped(self) -> bool:
        """Whether a location outside a level stands for a pixel on its edge."""
        return self.nearest or self.padding_mode == "border"

    @property
    def neighbours(self) -> tuple[int, ...]:
        """Neighbouring pixels of a coordinate along one axis, as distances from the lower one."""
        return (0,) if self.nearest else (0, 1)


PLAIN = Variant()


class Wanted(NamedTuple):
    """Which gradients a backward computes. In a fused call, `locations` are offsets and `weights` are logits."""

    value: bool = True
    locations: bool = True
    weights: bool = True
    references: bool = False

    @property
    def samples(self) -> bool:
        """Whether any gradient of the samples is computed, for which the kernels read value."""
        return self.locations or self.weights or self.references


ALL = Wanted()


class FusedFrontEnd(NamedTuple):
    """How the samples of a fused call come: as offsets from reference points, and as logits.

    `coordinates` is 2 for points and 4 for boxes. `levels` is the number of reference points per query: L, or 1 for all
    levels. `packed` says that offsets and logits are one array [N, Q, M, 3*K].
    """

    coordinates: int
    levels: int
    dtype: str
    packed: bool


class ValueStrides(NamedTuple):
    """Elements of value from one image, pixel or head to the next."""

    image: int
    pixel: int
    head: int


@dataclass(frozen=True)
class Problem:
    """The static part of a call: sizes in the contract's notation, dtypes, device and flags. Hashable.

    `levels` holds (H, W, start) of each level, or is None where the metadata stays on the GPU and the kernels check it.
    P is 0 where the number of points differs between levels. `value_strides` is None where value is contiguous, or has
    to be made so. `ragged` says that `query_lengths` bounds the queries of each image.
    """

    N: int
    S: int
    M: int
    D: int
    L: int
    P: int
    Q: int
    value_dtype: str
    location_dtype: str
    device: Device
    levels: tuple[tuple[int, int, int], ...] | None
    im2col_step: int = 64
    deterministic: bool = False
    variant: Variant = PLAIN
    value_strides: ValueStrides | None = None
    ragged: bool = False
    fused: FusedFrontEnd | None = None

    @property
    def strides(self) -> ValueStrides:
        """Strides of value as the kernels read it."""
        return self.value_strides or ValueStrides(self.S * self.M * self.D, self.M * self.D, self.D)

    @property
    def stride_alignment(self) -> int:
        """Bytes, a power of two up to 16, that every D-vector of value is aligned to, if value is."""
        if self.value_strides is None:
            return 16
        steps = [step * item_size(self.value_dtype) for step in self.value_strides]
        return min((step & -step) or 16 for step in (*steps, 16))

    @property
    def points(self) -> tuple[int, ...]:
        """Points of each level."""
        return self.variant.num_points or (self.P,) * self.L

    @property
    def K(self) -> int:
        """Samples per query and head: the points of all levels."""
        return sum(self.points)

    @property
    def packed(self) -> bool:
        """Whether offsets and logits are one array."""
        return self.fused is not None and self.fused.packed

    def computed(self, wanted: Wanted) -> Wanted:
        """What a backward computes for `wanted`: more, where the kernels compute gradients only together."""
        if self.fused is None:
            return wanted
        locations = wanted.locations or wanted.references
        if self.packed:
            locations = locations or wanted.weights
        return wanted._replace(locations=locations, weights=locations if self.packed else wanted.weights)

    @property
    def empty(self) -> bool:
        """True where no sample is taken: the output and the gradient of value are zeros or empty."""
        return 0 in (self.N, self.S, self.M, self.D, self.K, self.Q)

    @property
    def accumulator_dtype(self) -> str:
        """Dtype of all arithmetic."""
        return accumulator_of(self.value_dtype)

    @property
    def value_shape(self) -> tuple[int, int, int, int]:
        return (self.N, self.S, self.M, self.D)

    @property
    def output_shape(self) -> tuple[int, int, int]:
        return (self.N, self.Q, self.M * self.D)


@dataclass(frozen=True)
class Operands:
    """The arrays of one call.

    In a fused call, `locations` are offsets and `weights` are logits; both are views of one array where the call is
    packed. `shapes` and `starts` are None where the problem's levels hold the metadata.
    """

    value: View
    locations: View
    weights: View
    references: View | None = None
    shapes: View | None = None
    starts: View | None = None
    lengths: View | None = None
    grad_output: View | None = None


@dataclass(frozen=True)
class Call:
    """One validated call. Everything below validation takes it whole."""

    problem: Problem
    operands: Operands
    wanted: Wanted = ALL


class ArgumentNames(NamedTuple):
    """What the caller's function calls the arguments that hold the samples: error messages use these names."""

    locations: str = "sampling_locations"
    weights: str = "attention_weights"


OPERATOR_NAMES = ArgumentNames()
EXTENSION_NAMES = ArgumentNames("sampling_loc", "attn_weight")
FUSED_NAMES = ArgumentNames("sampling_offsets", "attention_logits")


@dataclass(frozen=True)
class Arguments:
    """One call as the user made it, not validated, in the one order that this package uses.

    A call is fused where `names` is FUSED_NAMES: then `reference_points` is an array, `locations` are offsets, and
    `weights` are logits, or None where `locations` holds both.
    """

    value: Any
    spatial_shapes: Any
    level_start_index: Any
    reference_points: Any
    locations: Any
    weights: Any
    im2col_step: Any = 64
    variant: Variant = PLAIN
    query_lengths: Any = None
    deterministic: Any = None
    validate: bool = False
    names: ArgumentNames = field(default=OPERATOR_NAMES, repr=False)

    @property
    def fused(self) -> bool:
        return self.names is FUSED_NAMES

    @property
    def packed(self) -> bool:
        """Whether offsets and logits are one array."""
        return self.fused and self.weights is None
