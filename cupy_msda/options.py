"""The options of a call and metadata in Python sequences: which types each takes. Every path of a call reads them here.

A flag is a bool of Python or NumPy. A number is anything with ``__index__``, such as an int of Python or NumPy, but no
bool. Nothing here reads the operands, so that a compiler can trace it.
"""

from __future__ import annotations

import operator
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np

from . import arrays
from .call import PLAIN, Variant

_INTERPOLATIONS = ("bilinear", "nearest")
_PADDING_MODES = ("zeros", "border")


def requested_variant(num_points: Any, interpolation: Any, padding_mode: Any, align_corners: Any) -> Variant:
    """The variant of a caller's arguments, with `num_points` as a tuple of ints. What needs L is not checked."""
    defaults = interpolation is PLAIN.interpolation and padding_mode is PLAIN.padding_mode and align_corners is False
    if defaults and num_points is None:
        return PLAIN
    interpolation = _choice("interpolation", interpolation, _INTERPOLATIONS)
    padding_mode = _choice("padding_mode", padding_mode, _PADDING_MODES)
    align_corners = flag("align_corners", align_corners)
    if interpolation == "nearest":
        given = {"padding_mode": padding_mode, "align_corners": align_corners}
        for name, default in (("padding_mode", PLAIN.padding_mode), ("align_corners", PLAIN.align_corners)):
            if given[name] != default:
                raise ValueError(
                    f"{name}: expected {default!r} with interpolation='nearest', which always clamps the index "
                    f"int(location * size + 0.5) into the level, got {given[name]!r}"
                )
    if num_points is not None:
        num_points = _read_points(num_points)
    return Variant(num_points, interpolation, padding_mode, align_corners)


def read_variant(variant: Variant, L: int) -> Variant:
    """`variant` as :func:`requested_variant` returns it, with one number of points for each of L levels."""
    variant = requested_variant(*variant)
    if variant.num_points is not None and len(variant.num_points) != L:
        raise ValueError(f"num_points: expected one number per level, L = {L}, got {list(variant.num_points)}")
    return variant


def read_settings(im2col_step: Any, deterministic: Any, validate: Any) -> tuple[int, bool | None, bool]:
    """These options, checked, as Python's own ints and bools."""
    # Any step of at least N means the same. 64 bits are what torch's operators take.
    im2col_step = min(_positive_int("im2col_step", im2col_step), sys.maxsize)
    if deterministic is not None:
        deterministic = flag("deterministic", deterministic, "True, False or None")
    return im2col_step, deterministic, flag("validate", validate)


def metadata_array(name: str, metadata: Sequence[Any]) -> np.ndarray:
    """Metadata of a Python sequence as an integer array. An empty sequence stands for no levels, or no images."""
    if len(metadata) == 0:
        return np.zeros((0, 2) if name == "spatial_shapes" else (0,), np.int64)
    try:
        array = np.asarray(metadata)
    except ValueError:
        raise ValueError(f"{name}: expected rows of equal length, got {metadata!r}") from None
    except (TypeError, RuntimeError) as error:
        raise TypeError(f"{name}: expected integers, got {metadata!r}: {error}") from error
    if array.size == 0:
        return np.zeros(array.shape, np.int64)
    if array.dtype.kind not in "iu":
        if array.dtype.kind == "O" and all(isinstance(part, (int, np.integer)) for part in array.flat):
            raise ValueError(f"{name}: expected integers of at most 64 bits, got {metadata!r}")
        raise TypeError(f"{name}: expected an integer dtype, got {array.dtype.name} from {metadata!r}")
    refuse_bools(name, metadata)
    return array


def is_sequence(given: Any) -> bool:
    """Whether this is a Python sequence of numbers or rows: neither an array nor a string."""
    return isinstance(given, (list, tuple)) or (
        isinstance(given, Sequence) and not isinstance(given, (str, bytes, bytearray, memoryview))
    )


def _choice(name: str, given: Any, known: tuple[str, str]) -> str:
    if not isinstance(given, str) or given not in known:
        raise ValueError(f"{name}: expected {known[0]!r} or {known[1]!r}, got {given!r}")
    return known[known.index(given)]


def flag(name: str, given: Any, expected: str = "True or False") -> bool:
    """A flag as Python's own bool."""
    if not isinstance(given, (bool, np.bool_)):
        raise TypeError(f"{name}: expected {expected}, got {type(given).__name__}")
    return bool(given)


def _read_points(given: Any) -> tuple[int, ...]:
    if not is_sequence(given):
        if arrays.framework_of(given) is None:
            raise TypeError(
                f"num_points: expected a list or tuple of ints, or an integer array [L], got {type(given).__name__}"
            )
        view = arrays.view("num_points", given)
        if len(view.shape) != 1:
            raise ValueError(f"num_points: expected shape [L], got {list(view.shape)}")
        if not (view.dtype.startswith(("int", "uint")) or 0 in view.shape):
            raise TypeError(f"num_points: expected an integer dtype, got {view.dtype}")
        given = arrays.to_numpy(view).tolist()
    return tuple(_points_of_level(count) for count in given)


def number(name: str, given: Any, least: int, expected: str) -> int:
    """A number of at least `least` as Python's own int."""
    if _is_bool(given):
        raise TypeError(f"{name}: expected {expected}, got {given!r}")
    try:
        result = operator.index(given)
    except TypeError:
        raise TypeError(f"{name}: expected {expected}, got {given!r}") from None
    if result < least:
        raise ValueError(f"{name}: expected {expected}, got {result}")
    return result


def refuse_bools(name: str, metadata: Any) -> None:
    """TypeError for a bool anywhere in metadata: among ints, arrays would make a number of it."""
    if _has_bool(metadata):
        raise TypeError(f"{name}: expected integers, got a bool in {metadata!r}")


def _has_bool(metadata: Any) -> bool:
    if is_sequence(metadata):
        return any(type(part) is not int and _has_bool(part) for part in metadata)
    return _is_bool(metadata)


def _is_bool(given: Any) -> bool:
    # A torch tensor of a bool has an index, which a bool of NumPy does not.
    return isinstance(given, (bool, np.bool_)) or str(getattr(given, "dtype", "")).endswith("bool")


def _positive_int(name: str, given: Any) -> int:
    return number(name, given, 1, "a positive int")


def _points_of_level(count: Any) -> int:
    points = _positive_int("num_points", count)
    if points > sys.maxsize:
        raise ValueError(f"num_points: expected ints of at most 64 bits, got {points}")
    return points
