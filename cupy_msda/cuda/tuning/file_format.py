"""Measured choices as text: JSON that a person can read, and that is checked in full before any of it is used."""

from __future__ import annotations

import json
import math
from typing import Any, NamedTuple

from ...call import VALUE_DTYPES, FusedFrontEnd, Variant, Wanted
from .tuned import Entry, Measured, Subject

FORMAT = 1
# Numbers of a problem are below this.
_LARGEST = 2**48


class Key(NamedTuple):
    """What entries were measured with. They count where all of it is the same."""

    package: str
    compute_capability: str
    multiprocessors: int
    driver: int

    def __str__(self) -> str:
        return (
            f"version {self.package}, compute capability {self.compute_capability}, {self.multiprocessors} "
            f"multiprocessors, driver for CUDA {self.driver // 1000}.{self.driver % 1000 // 10}"
        )


class TuningFile(NamedTuple):
    """The contents of a file: what was measured on one GPU model, by what it was measured with."""

    gpu: str
    tuned: dict[Key, list[Entry]]


def encode(contents: TuningFile) -> str:
    """The text of a file: one line per entry."""
    blocks = []
    for key, entries in contents.tuned.items():
        head = ", ".join(f"{json.dumps(name)}: {json.dumps(value)}" for name, value in key._asdict().items())
        lines = ",\n".join(f"   {json.dumps(_fields_of(entry))}" for entry in entries)
        blocks.append(f'  {{{head}, "entries": [\n{lines}\n  ]}}')
    return f'{{"format": {FORMAT}, "gpu": {json.dumps(contents.gpu)}, "tuned": [\n' + ",\n".join(blocks) + "\n]}\n"


def decode(text: str) -> TuningFile:
    """The contents of a text.

    Raises
    ------
    ValueError
        For anything that :func:`encode` does not write.
    """
    try:
        read = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"it is no JSON: {error}") from None
    if not isinstance(read, dict) or type(read.get("format")) is not int or read["format"] != FORMAT:
        raise ValueError(f"expected a tuning file of format {FORMAT}")
    tuned: dict[Key, list[Entry]] = {}
    for block in _of_type(list, read, "tuned"):
        key = Key(
            _of_type(str, block, "package"),
            _of_type(str, block, "compute_capability"),
            _number(block, "multiprocessors"),
            _number(block, "driver"),
        )
        tuned.setdefault(key, []).extend(_entry_of(fields) for fields in _of_type(list, block, "entries"))
    return TuningFile(_of_type(str, read, "gpu"), tuned)


def _fields_of(entry: Entry) -> dict[str, Any]:
    """An entry as it is written."""
    subject, sizes = entry.subject, entry.sizes
    return {
        "for": subject.name,
        "axes": dict(entry.axes),
        "default_us": round(entry.default_us, 3),
        "tuned_us": round(entry.tuned_us, 3),
        "value_dtype": subject.value_dtype,
        "location_dtype": subject.location_dtype,
        **sizes._asdict(),
        "M": subject.M,
        "D": subject.D,
        "points": list(subject.points),
        "interpolation": subject.variant.interpolation,
        "padding_mode": subject.variant.padding_mode,
        "align_corners": subject.variant.align_corners,
        "fused": None if subject.fused is None else subject.fused._asdict(),
        "ragged": subject.ragged,
        "strided": subject.strided,
        "wanted": None if subject.wanted is None else subject.wanted._asdict(),
        "deterministic": subject.deterministic,
    }


def _entry_of(fields: Any) -> Entry:
    """The entry that is written so."""
    sizes = Measured(*(_number(fields, name) for name in Measured._fields))
    variant = Variant(
        None,
        _one_of(("bilinear", "nearest"), fields, "interpolation"),
        _one_of(("zeros", "border"), fields, "padding_mode"),
        _of_type(bool, fields, "align_corners"),
    )
    fused = wanted = None
    if fields.get("fused") is not None:
        given = _of_type(dict, fields, "fused")
        dtype = _one_of(VALUE_DTYPES, given, "dtype")
        fused = FusedFrontEnd(
            _number(given, "coordinates"), _number(given, "levels"), dtype, _of_type(bool, given, "packed")
        )
    if fields.get("wanted") is not None:
        given = _of_type(dict, fields, "wanted")
        wanted = Wanted(*(_of_type(bool, given, name) for name in Wanted._fields))
    subject = Subject(
        _of_type(str, fields, "for"),
        _one_of(VALUE_DTYPES, fields, "value_dtype"),
        _one_of(VALUE_DTYPES, fields, "location_dtype"),
        _number(fields, "M"),
        _number(fields, "D"),
        tuple(_number({"points": count}, "points") for count in _of_type(list, fields, "points")),
        variant,
        fused,
        _of_type(bool, fields, "ragged"),
        _of_type(bool, fields, "strided"),
        sizes.Q == sizes.S,
        wanted,
        _of_type(bool, fields, "deterministic"),
    )
    axes = _of_type(dict, fields, "axes")
    return Entry(subject, sizes, axes, _time(fields, "default_us"), _time(fields, "tuned_us"))


def _of_type(kind: type, fields: Any, name: str) -> Any:
    found = fields.get(name) if isinstance(fields, dict) else None
    if type(found) is not kind:
        raise ValueError(f"{name}: expected {kind.__name__}, got {str(found)[:40]}")
    return found


def _one_of(expected: tuple[str, ...], fields: Any, name: str) -> str:
    found = _of_type(str, fields, name)
    if found not in expected:
        raise ValueError(f"{name}: expected one of {', '.join(expected)}, got {found[:40]!r}")
    return str(found)


def _number(fields: Any, name: str) -> int:
    found = _of_type(int, fields, name)
    if not 0 < found < _LARGEST:
        raise ValueError(f"{name}: expected a positive number")
    return int(found)


def _time(fields: Any, name: str) -> float:
    found = fields.get(name)
    if type(found) not in (int, float) or not 0 < found < 1e12 or not math.isfinite(found):
        raise ValueError(f"{name}: expected microseconds")
    return float(found)
