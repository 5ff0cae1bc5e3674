"""Sizes of calls without arrays, for what is done before a call: warm-up, tuning and explanations."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np

from . import options, validate
from .call import SIXTEEN_BIT, VALUE_DTYPES, FusedFrontEnd, Problem, contiguous_starts


@dataclass(frozen=True)
class Sizes:
    """The sizes of a call in the notation of the contract. `levels` holds (H, W) of each; Q None stands for Q = S, an
    encoder.

    `num_points` to `align_corners` are those of :func:`cupy_msda.ms_deform_attn`; with `num_points`, P has no meaning.
    `ragged` stands for calls with `query_lengths`.

    `reference_coordinates` of 2 (points) or 4 (boxes) stands for calls of :func:`cupy_msda.ms_deform_attn_fused`, with
    a reference for each level unless `one_reference`, and with `packed` for offsets and logits in one array.
    """

    levels: Sequence[tuple[int, int]]
    N: int = 1
    Q: int | None = None
    M: int = 8
    D: int = 32
    P: int = 4
    num_points: Sequence[int] | None = None
    interpolation: str = "bilinear"
    padding_mode: str = "zeros"
    align_corners: bool = False
    ragged: bool = False
    reference_coordinates: int | None = None
    one_reference: bool = False
    packed: bool = False

    def __post_init__(self) -> None:
        """TypeError or ValueError for what no call has."""
        levels = _read_levels(self.levels)
        given: dict[str, Any] = {"levels": levels}
        for name, least in (("N", 0), ("Q", 0), ("P", 0), ("M", 1), ("D", 1)):
            size, none = getattr(self, name), " or None" * (name == "Q")
            if size is not None or not none:
                given[name] = options.number(name, size, least, f"an int of at least {least}{none}")
        for name in ("ragged", "one_reference", "packed"):
            given[name] = options.flag(name, getattr(self, name))
        form = options.requested_variant(self.num_points, self.interpolation, self.padding_mode, self.align_corners)
        given |= options.read_variant(form, len(levels))._asdict()
        coordinates = self.reference_coordinates
        if coordinates is None:
            if given["one_reference"] or given["packed"]:
                raise ValueError("reference_coordinates: expected 2 or 4 with one_reference or packed, got None")
        else:
            given["reference_coordinates"] = options.number("reference_coordinates", coordinates, 0, "2, 4 or None")
            if coordinates not in (2, 4):
                raise ValueError(f"reference_coordinates: expected 2, 4 or None, got {coordinates!r}")
        for name, part in given.items():
            object.__setattr__(self, name, part)

    @property
    def S(self) -> int:
        """Pixels of all levels together."""
        return sum(h * w for h, w in self.levels)

    @property
    def contiguous_levels(self) -> tuple[tuple[int, int, int], ...]:
        """(H, W, start) of each level."""
        starts = contiguous_starts(self.levels)
        return tuple((h, w, start) for (h, w), start in zip(self.levels, starts, strict=True))


def problems_of(sizes: Sequence[Sizes], dtypes: Sequence[str], device: int) -> list[Problem]:
    """The problems of all these calls on a device.

    Of value in 16 bits, "float16" stands for locations and reference points in float16 and in float32, and
    "float16/float32" for float32 alone.

    Raises
    ------
    TypeError, ValueError
        For a dtype that the operator does not have.
    """
    found = []
    for size, (dtype, given) in product(sizes, [read_dtypes("dtypes", text) for text in dtypes]):
        location_dtypes = [given] if given else [dtype, "float32"] if dtype in SIXTEEN_BIT else [dtype]
        for location_dtype, fused in product(location_dtypes, fused_front_ends(size, location_dtypes)):
            found.append(problem_of(size, dtype, location_dtype, fused, device))
    return found


def read_dtypes(name: str, text: str) -> tuple[str, str | None]:
    """The dtypes of value and of locations in "float16/float32"; None for these in "float16".

    Raises
    ------
    TypeError
        For other texts, in which `name` is the argument.
    """
    value, slash, locations = text.partition("/") if isinstance(text, str) else ("", "", "")
    allowed = (value, "float32") if value in SIXTEEN_BIT else (value,)
    if value not in VALUE_DTYPES or (slash and locations not in allowed):
        raise TypeError(
            f"{name}: expected {', '.join(VALUE_DTYPES)}, float16/float32 or bfloat16/float32, got {text!r}"
        )
    return value, locations or None


def problem_of(size: Sizes, dtype: str, location_dtype: str, fused: FusedFrontEnd | None, device: int) -> Problem:
    """The problem of a call of this size on a CUDA device, with a contiguous value."""
    S, levels = size.S, size.contiguous_levels
    form = options.requested_variant(size.num_points, size.interpolation, size.padding_mode, size.align_corners)
    variant, P = validate.equal_points(form, size.P)
    return Problem(
        size.N, S, size.M, size.D, len(levels), P, S if size.Q is None else size.Q,
        value_dtype=dtype, location_dtype=location_dtype, device=("cuda", device),
        levels=levels, variant=variant, ragged=size.ragged, fused=fused,
    )  # fmt: skip


def fused_front_ends(size: Sizes, dtypes: Iterable[str]) -> list[FusedFrontEnd | None]:
    """What the samples of calls of this size come from: reference points of each dtype, or nothing."""
    coordinates = size.reference_coordinates
    if coordinates is None:
        return [None]
    levels = 1 if size.one_reference else len(size.levels)
    return [FusedFrontEnd(coordinates, levels, dtype, size.packed) for dtype in dtypes]


def _read_levels(levels: Any) -> tuple[tuple[int, int], ...]:
    """Levels as pairs of Python's own ints."""
    expected = "levels of positive (H, W)"
    rows = levels.tolist() if isinstance(levels, np.ndarray) else levels
    if not options.is_sequence(rows):
        raise TypeError(f"levels: expected {expected}, got {levels!r}")
    pairs = [row.tolist() if isinstance(row, np.ndarray) else row for row in rows]
    for pair in pairs:
        if not options.is_sequence(pair):
            raise TypeError(f"levels: expected {expected}, got {pair!r} in {levels!r}")
        if len(pair) != 2:
            raise ValueError(f"levels: expected {expected}, got {pair!r} in {levels!r}")
    if not pairs:
        raise ValueError(f"levels: expected {expected}, got {levels!r}")
    return tuple(
        (options.number("levels", height, 1, expected), options.number("levels", width, 1, expected))
        for height, width in pairs
    )
