"""``python -m cupy_msda export-kernels``: the forward as cubins and C sources, for programs without Python."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..call import VALUE_DTYPES
from ..cuda import c_sources
from ..cuda.forward_export import ForwardExport, export_forward
from ..cuda.gpu import ARCHITECTURES
from ..sizes import Sizes, fused_front_ends, problem_of
from .output import CommandError, reason_of

EXAMPLE = "decoder levels=100x167,50x84,25x42,13x21 N=2 Q=300"
_NAME = re.compile(r"[a-z][a-z0-9_]*", re.ASCII)


def read_sizes(text: str) -> tuple[str, Sizes]:
    """The name and the sizes of ``NAME levels=HxW,... N=2 Q=300``, whose keys are the fields of :class:`Sizes`."""
    name, *settings = text.split() or [""]
    if not _NAME.fullmatch(name):
        raise CommandError(f"--sizes: expected a name of a-z, 0-9 and _ first, as in '{EXAMPLE}', got {text!r}")
    fields = {field.name: field for field in dataclasses.fields(Sizes)}
    found: dict[str, Any] = {}
    for setting in settings:
        key, _, given = setting.partition("=")
        if key not in fields:
            raise CommandError(f"--sizes: expected settings of {', '.join(fields)}, got {setting!r}")
        found[key] = _read(key, given, str(fields[key].type))
    if "levels" not in found:
        raise CommandError(f"--sizes: expected levels=HxW,..., as in '{EXAMPLE}', got {text!r}")
    return name, Sizes(**found)


def _read(key: str, text: str, annotation: str) -> Any:
    """The value of a field of Sizes."""
    try:
        if key == "levels":
            return [(int(height), int(width)) for height, width in (level.split("x") for level in text.split(","))]
        if annotation == "str":
            return text
        if annotation == "bool":
            return {"true": True, "false": False}[text]
        return [int(number) for number in text.split(",")] if "Sequence" in annotation else int(text)
    except (ValueError, KeyError):
        expected = {"levels": "HxW,...", "bool": "true or false", "num_points": "numbers with commas"}
        raise CommandError(
            f"--sizes: expected {key}={expected.get(key, expected.get(annotation, 'a number'))}, got {key}={text}"
        ) from None


def read_dtypes(text: str) -> tuple[str, str]:
    """The dtypes of value and of locations: ``float16``, or ``float16/float32``."""
    value, slash, locations = text.partition("/")
    locations = locations if slash else value
    if value not in VALUE_DTYPES or locations not in (value, "float32") or (value == "float64" != locations):
        raise CommandError(
            f"--dtypes: expected {', '.join(VALUE_DTYPES)}, float16/float32 or bfloat16/float32, got {text!r}"
        )
    return value, locations


def read_architectures(texts: Sequence[str]) -> list[int]:
    """Compute capabilities such as ``90`` or ``sm_90``."""
    numbers = {f"{prefix}{number}": number for number in ARCHITECTURES for prefix in ("", "sm_")}
    unknown = [text for text in texts if text not in numbers]
    if unknown:
        raise CommandError(f"--arch: expected some of {', '.join(map(str, ARCHITECTURES))}, got {', '.join(unknown)}")
    return sorted({numbers[text] for text in texts})


def export(sizes: Sequence[str], dtypes: Sequence[str], architectures: Sequence[str], out: Path) -> list[ForwardExport]:
    """Compile every one of `sizes` in every one of `dtypes`, and write all of it into `out`."""
    of_gpus, pairs = read_architectures(architectures), [read_dtypes(text) for text in dtypes]
    exports = [
        _exported(name, size, pair, of_gpus) for name, size in map(read_sizes, sizes) for pair in dict.fromkeys(pairs)
    ]
    names = [one.name for one in exports]
    if len(set(names)) < len(names):
        raise CommandError(f"--sizes: expected names that differ, got {', '.join(names)}")
    try:
        out.mkdir(parents=True, exist_ok=True)
        c_sources.write(exports, out)
    except OSError as error:
        raise CommandError(f"cannot write into {out}: {reason_of(error)}") from error
    return exports


def _exported(name: str, size: Sizes, dtypes: tuple[str, str], architectures: Sequence[int]) -> ForwardExport:
    value, locations = dtypes
    name = "_".join([name, *dict.fromkeys(dtypes)])
    try:
        (fused,) = fused_front_ends(size, [locations])
        problem = problem_of(size, value, locations, fused, device=0)
        if problem.empty:
            raise CommandError(f"--sizes: expected sizes of at least 1 in {name}, got {size}")
        return export_forward(name, problem, architectures)
    except (ValueError, TypeError, RuntimeError, NotImplementedError) as error:
        raise CommandError(str(error)) from error
