"""Validation: arrays and metadata in, a frozen :class:`Problem` and the :class:`Operands` out.

Every error rule of the contract lives here. A message names the argument, what was expected in the
notation of the contract (N, S, M, D, L, P, Q) and what came.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from . import interop
from .interop import Device, View

VALUE_DTYPES = ("float16", "bfloat16", "float32", "float64")
SIXTEEN_BIT = ("float16", "bfloat16")


def accumulator_of(value_dtype: str) -> str:
    """Dtype of all arithmetic beside a value of `value_dtype`."""
    return "float64" if value_dtype == "float64" else "float32"


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
        """Whether locations outside a level stand for a pixel on its edge."""
        return self.nearest or self.padding_mode == "border"

    @property
    def near(self) -> tuple[int, ...]:
        """Pixels of a coordinate that count, from the one before it on."""
        return (0,) if self.nearest else (0, 1)


PLAIN = Variant()


class Wanted(NamedTuple):
    """Which gradients a backward computes; with a front end, `locations` are offsets and `weights` logits."""

    value: bool = True
    locations: bool = True
    weights: bool = True
    references: bool = False

    @property
    def samples(self) -> bool:
        """Whether there are any of the samples, for which the rows of value are read."""
        return self.locations or self.weights or self.references


ALL = Wanted()


class FrontEnd(NamedTuple):
    """How samples come where it is not as locations and weights: as offsets from reference points, and as logits.

    `coordinates` is 2 for points and 4 for boxes, `levels` the reference points of a query: L, or 1 for all levels.
    `packed` says that offsets and logits are one array [N, Q, M, 3*K].
    """

    coordinates: int
    levels: int
    dtype: str
    packed: bool


class Strides(NamedTuple):
    """Elements of value from an image to the next, from a row to the next, and from a head to the next."""

    image: int
    row: int
    head: int


@dataclass(frozen=True)
class Problem:
    """One call: its sizes in the contract's notation, dtypes, device and flags.

    `levels` holds (H, W, start) of each level, or is None where the metadata stays on the GPU and the
    kernels check it. P is 0 where the number of points differs from level to level. `value_strides` is None where value
    is contiguous, or has to be made so; `padded` says that only the first queries of each image count.
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
    value_strides: Strides | None = None
    padded: bool = False
    front: FrontEnd | None = None

    @property
    def strides(self) -> Strides:
        """Those of value as the kernels read it."""
        return self.value_strides or Strides(self.S * self.M * self.D, self.M * self.D, self.D)

    @property
    def kernel_sizes(self) -> tuple[int, int, int, int, int]:
        """S, Q, the strides of value's images and heads, N * M: the last words of the forward and backward kernels."""
        return (self.S, self.Q, self.strides.image, self.strides.head, self.N * self.M)

    @property
    def stride_alignment(self) -> int:
        """Bytes, a power of two up to 16, that every row of value begins at a multiple of, if value does."""
        if self.value_strides is None:
            return 16
        steps = [step * interop.item_size(self.value_dtype) for step in self.value_strides]
        return min((step & -step) or 16 for step in (*steps, 16))

    @property
    def points(self) -> tuple[int, ...]:
        """Points of each level."""
        return self.variant.num_points or (self.P,) * self.L

    @property
    def K(self) -> int:
        """Samples of a query and head: the points of all levels."""
        return sum(self.points)

    def computed(self, wanted: Wanted) -> Wanted:
        """What a backward computes for those that are wanted: more, where gradients only come together."""
        if self.front is None:
            return wanted
        locations = wanted.locations or wanted.references
        if self.front.packed:
            locations = locations or wanted.weights
        return wanted._replace(locations=locations, weights=locations if self.front.packed else wanted.weights)

    @property
    def empty(self) -> bool:
        """True where no sample is taken: the output and the gradient of value are zeros or empty."""
        return 0 in (self.N, self.S, self.M, self.D, self.K, self.Q)

    @property
    def accumulator_dtype(self) -> str:
        """Dtype of all arithmetic."""
        return accumulator_of(self.value_dtype)

    @property
    def output_shape(self) -> tuple[int, int, int]:
        return (self.N, self.Q, self.M * self.D)


@dataclass(frozen=True)
class Operands:
    """The arrays of one call. `shapes` and `starts` are None where the problem's levels say it all."""

    value: View
    locations: View
    weights: View
    shapes: View | None = None
    starts: View | None = None
    grad_output: View | None = None
    lengths: View | None = None
    references: View | None = None


# What the arguments are called that hold the samples: of the C++ interface, and of the fused front end.
NAMES = ("sampling_locations", "attention_weights")
SHORT_NAMES = ("sampling_loc", "attn_weight")
FUSED_NAMES = ("sampling_offsets", "attention_logits")


def read(
    value: Any,
    spatial_shapes: Any,
    level_start_index: Any,
    sampling_locations: Any,
    attention_weights: Any,
    im2col_step: Any = 64,
    grad_output: Any = None,
    *,
    names: tuple[str, str] = NAMES,
    reference_points: Any = None,
    deterministic: Any = None,
    validate: bool = False,
    variant: Variant = PLAIN,
    query_lengths: Any = None,
) -> tuple[Problem, Operands]:
    """Check everything that the contract promises to check; `names` are those of the caller's parameters.

    With FUSED_NAMES the samples come as offsets from `reference_points` and as logits, both in one where there are no
    weights.
    """
    arrays = {"value": value, names[0]: sampling_locations, names[1]: attention_weights}
    packed = names is FUSED_NAMES and attention_weights is None
    if packed:
        del arrays[names[1]]
    if names is FUSED_NAMES:
        arrays["reference_points"] = reference_points
    if grad_output is not None:
        arrays["grad_output"] = grad_output
    views = {name: interop.view(name, array) for name, array in arrays.items()}
    value_view, locations, weights = views["value"], views[names[0]], views[names[0 if packed else 1]]

    _check_dtypes(views, names)
    _check_together(views)
    N, S, M, D = _dimensions("value", value_view, "[N, S, M, D]")
    shapes = _read_metadata("spatial_shapes", spatial_shapes)
    if len(shapes.shape) != 2 or shapes.shape[1] != 2:
        raise ValueError(f"spatial_shapes: expected shape [L, 2], got {list(shapes.shape)}")
    L = shapes.shape[0]
    if variant != PLAIN:
        variant = read_variant(variant, L)
    if packed:
        Q, P = _read_packed(names, locations, variant, N, M, L)
    else:
        Q, P = _read_samples(names, locations, weights, variant, N, M, L)
    variant, P = same_points(variant, P)
    front = _read_front(views["reference_points"], N, Q, L, packed) if names is FUSED_NAMES else None
    if grad_output is not None:
        _check_shape("grad_output", views["grad_output"], "[N, Q, M*D]", (N, Q, M * D))

    starts = None
    if level_start_index is not None:
        starts = _read_metadata("level_start_index", level_start_index)
        if starts.shape != (L,):
            raise ValueError(f"level_start_index: expected shape [L] with L = {L}, got {list(starts.shape)}")

    on_device = [m for m in (shapes, starts) if m is not None and m.device[0] == "cuda"]
    unread = on_device and value_view.device[0] == "cuda" and not validate
    levels = None if unread else _levels(shapes, starts, S)
    if not (deterministic is None or isinstance(deterministic, bool)):
        raise TypeError(f"deterministic: expected True, False or None, got {type(deterministic).__name__}")

    lengths = None if query_lengths is None else _read_lengths(query_lengths, N, Q, value_view.device)
    problem = Problem(
        N, S, M, D, L, P, Q,
        value_dtype=value_view.dtype,
        location_dtype=locations.dtype,
        device=value_view.device,
        levels=levels,
        im2col_step=_positive_int("im2col_step", im2col_step),
        deterministic=value_view.framework.wants_fixed_order() if deterministic is None else deterministic,
        variant=variant,
        value_strides=_strides(value_view),
        padded=lengths is not None,
        front=front,
    )  # fmt: skip
    operands = Operands(
        value_view,
        locations,
        weights,
        shapes if levels is None else None,
        starts if levels is None else None,
        views.get("grad_output"),
        lengths,
        views.get("reference_points"),
    )
    return problem, operands


def _read_samples(
    names: tuple[str, str], locations: View, weights: View, variant: Variant, N: int, M: int, L: int
) -> tuple[int, int]:
    """Q and P of locations and weights, or of offsets and logits."""
    if variant.num_points is None:
        _, Q, _, _, P, _ = _dimensions(names[0], locations, "[N, Q, M, L, P, 2]")
        samples, symbols = (L, P), "L, P"
    else:
        _, Q, _, _, _ = _dimensions(names[0], locations, "[N, Q, M, sum(num_points), 2]")
        P, samples, symbols = 0, (sum(variant.num_points),), "sum(num_points)"
    _check_shape(names[0], locations, f"[N, Q, M, {symbols}, 2]", (N, Q, M, *samples, 2))
    _check_shape(names[1], weights, f"[N, Q, M, {symbols}]", (N, Q, M, *samples))
    return Q, P


def _read_packed(names: tuple[str, str], packed: View, variant: Variant, N: int, M: int, L: int) -> tuple[int, int]:
    """Q and P of offsets and logits in one array."""
    symbols = "L*P*3" if variant.num_points is None else "sum(num_points)*3"
    name = f"{names[0]} without {names[1]}"
    _, Q, _, numbers = _dimensions(name, packed, f"[N, Q, M, {symbols}]")
    P = 0 if variant.num_points else numbers // max(3 * L, 1)
    _check_shape(name, packed, f"[N, Q, M, {symbols}]", (N, Q, M, 3 * sum(variant.num_points or (P,) * L)))
    return Q, P


def _read_front(references: View, N: int, Q: int, L: int, packed: bool) -> FrontEnd:
    symbols = "[N, Q, L, 2]"
    _, _, levels, coordinates = _dimensions("reference_points", references, symbols)
    if levels == 1:
        symbols = symbols.replace("L", "1")
    boxes = symbols.replace("2]", "4]")
    if coordinates not in (2, 4):
        got = list(references.shape)
        raise ValueError(f"reference_points: expected shape {symbols} for points or {boxes} for boxes, got {got}")
    if coordinates == 4:
        symbols = boxes
    expected = (N, Q, 1 if levels == 1 else L, coordinates)
    _check_shape("reference_points", references, symbols, expected)
    return FrontEnd(coordinates, levels, references.dtype, packed)


def read_variant(variant: Variant, L: int) -> Variant:
    """`variant` checked and with `num_points` as a tuple."""
    num_points, interpolation, padding_mode, align_corners = variant
    for name, given, known in (
        ("interpolation", interpolation, ("bilinear", "nearest")),
        ("padding_mode", padding_mode, ("zeros", "border")),
    ):
        if given not in known:
            raise ValueError(f"{name}: expected {known[0]!r} or {known[1]!r}, got {given!r}")
    if not isinstance(align_corners, bool):
        raise TypeError(f"align_corners: expected True or False, got {type(align_corners).__name__}")
    if interpolation == "nearest":
        for name, given, only in (("padding_mode", padding_mode, "zeros"), ("align_corners", align_corners, False)):
            if given != only:
                raise ValueError(
                    f"{name}: expected {only!r} beside interpolation='nearest', which always clamps the index "
                    f"int(location * size + 0.5) into the level, got {given!r}"
                )
    if num_points is not None:
        if not isinstance(num_points, (list, tuple)):
            raise TypeError(f"num_points: expected a list or tuple of ints, got {type(num_points).__name__}")
        num_points = tuple(_positive_int("num_points", count) for count in num_points)
        if len(num_points) != L:
            raise ValueError(f"num_points: expected one number a level, L = {L}, got {list(num_points)}")
    return Variant(num_points, interpolation, padding_mode, align_corners)


def same_points(variant: Variant, P: int = 0) -> tuple[Variant, int]:
    """`variant` as in a :class:`Problem`, and P: the same number of points in every level lies in memory as L, P do."""
    if variant.num_points is None:
        return variant, P
    if len(set(variant.num_points)) > 1:
        return variant, 0
    return variant._replace(num_points=None), variant.num_points[0] if variant.num_points else 0


def _check_dtypes(views: dict[str, View], names: tuple[str, str]) -> None:
    value = views["value"].dtype
    if value not in VALUE_DTYPES:
        raise TypeError(f"value: expected dtype {', '.join(VALUE_DTYPES[:-1])} or float64, got {value}")
    allowed = (value, "float32") if value in SIXTEEN_BIT else (value,)
    for name in (*names, "reference_points"):
        if name in views and views[name].dtype not in allowed:
            raise TypeError(
                f"{name}: expected dtype {' or '.join(allowed)} beside a {value} value, got {views[name].dtype}"
            )
    if names[1] in views and views[names[0]].dtype != views[names[1]].dtype:
        raise TypeError(
            f"{names[1]}: expected the dtype of {names[0]}, {views[names[0]].dtype}, got {views[names[1]].dtype}"
        )
    if "grad_output" in views and views["grad_output"].dtype != value:
        raise TypeError(f"grad_output: expected the dtype of value, {value}, got {views['grad_output'].dtype}")


def _check_together(views: dict[str, View]) -> None:
    first = views["value"]
    for name, view in views.items():
        if view.framework is not first.framework:
            raise TypeError(
                f"{name}: expected an array of value's framework, {first.framework.name}, got {view.framework.name}"
            )
        if view.device != first.device:
            raise ValueError(
                f"{name}: expected value's device, {_device_name(first.device)}, got {_device_name(view.device)}"
            )


def _dimensions(name: str, view: View, symbols: str) -> tuple[int, ...]:
    if len(view.shape) != symbols.count(",") + 1:
        raise ValueError(f"{name}: expected shape {symbols}, got {list(view.shape)}")
    return view.shape


def _check_shape(name: str, view: View, symbols: str, expected: tuple[int, ...]) -> None:
    if view.shape != expected:
        raise ValueError(f"{name}: expected shape {symbols} = {list(expected)}, got {list(view.shape)}")


def _read_metadata(name: str, metadata: Any) -> View:
    """A View of integer metadata; Python sequences become NumPy arrays."""
    if isinstance(metadata, (list, tuple)):
        try:
            array = np.asarray(metadata)
        except ValueError:
            raise ValueError(f"{name}: expected rows of equal length, got {metadata!r}") from None
        if array.size == 0:
            array = np.zeros((0, 2) if name == "spatial_shapes" else (0,), np.int64)
        metadata = array
    view = interop.view(name, metadata)
    if not view.dtype.startswith(("int", "uint")):
        raise TypeError(f"{name}: expected an integer dtype, got {view.dtype}")
    return view


def _read_lengths(query_lengths: Any, N: int, Q: int, device: Device) -> View:
    """A View of the queries that count; on the host it is checked, on a GPU the kernels clamp it."""
    lengths = _read_metadata("query_lengths", query_lengths)
    if lengths.shape != (N,):
        raise ValueError(f"query_lengths: expected shape [N] with N = {N}, got {list(lengths.shape)}")
    if lengths.device[0] == "cuda" and device[0] == "cuda":
        return lengths
    for image, length in enumerate(interop.to_numpy(lengths).tolist()):
        if not 0 <= length <= Q:
            raise ValueError(f"query_lengths: expected 0 to Q = {Q}, got {length} for image {image}")
    return lengths


def _strides(value: View) -> Strides | None:
    """How a value that is not contiguous lies in memory, where its rows of D channels are; None otherwise."""
    N, S, M, D = value.shape
    image, row, head, channel = value.strides
    if value.contiguous or (D > 1 and channel != 1) or min(value.strides) < 0:
        return None
    # A dimension of one has no stride to speak of.
    return Strides(image if N > 1 else 0, row if S > 1 else M * D, head if M > 1 else D)


def packed_starts(sizes: Sequence[Sequence[int]]) -> list[int]:
    """First row of each level of (H, W) where levels follow each other."""
    return [0, *itertools.accumulate(h * w for h, w in sizes)][: len(sizes)]


def _levels(shapes: View, starts: View | None, S: int) -> tuple[tuple[int, int, int], ...]:
    sizes = interop.to_numpy(shapes).tolist()
    firsts = packed_starts(sizes) if starts is None else interop.to_numpy(starts).tolist()
    for level, ((h, w), start) in enumerate(zip(sizes, firsts, strict=True)):
        if h <= 0 or w <= 0:
            raise ValueError(f"spatial_shapes: expected positive (H, W), got ({h}, {w}) for level {level}")
        if start < 0:
            raise ValueError(f"level_start_index: expected starts of at least 0, got {start} for level {level}")
        if start + h * w > S:
            raise ValueError(
                f"spatial_shapes: expected level {level} of {h} x {w} pixels from row {start} to fit into S = {S}, "
                f"got an end of {start + h * w}"
            )
    return tuple((h, w, start) for (h, w), start in zip(sizes, firsts, strict=True))


def _positive_int(name: str, number: Any) -> int:
    if isinstance(number, (bool, np.bool_)):
        raise TypeError(f"{name}: expected a positive int, got {number!r}")
    try:
        result = operator.index(number)
    except TypeError:
        raise TypeError(f"{name}: expected a positive int, got {number!r}") from None
    if result <= 0:
        raise ValueError(f"{name}: expected a positive int, got {result}")
    return result


def _device_name(device: Device) -> str:
    return "cpu" if device[0] == "cpu" else f"cuda:{device[1]}"
