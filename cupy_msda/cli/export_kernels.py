"""``python -m cupy_msda export-kernels``: the forward as cubins and C sources, for programs without Python."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from .. import arrays
from ..cuda import c_sources
from ..cuda.forward_export import ForwardExport, export_forward
from ..cuda.gpu import refusal_of
from ..sizes import Sizes, fused_front_ends, problem_of, read_dtypes
from . import architecture_argument, sizes_argument
from .output import CommandError, reason_of

EXAMPLE = "decoder levels=100x167,50x84,25x42,13x21 N=2 Q=300"
_NAME = re.compile(r"[a-z][a-z0-9_]*", re.ASCII)


def read_sizes(text: str) -> tuple[str, Sizes]:
    """The name and the sizes of ``NAME levels=HxW,... N=2 Q=300``."""
    name, _, sizes = text.strip().partition(" ")
    if not _NAME.fullmatch(name):
        raise CommandError(f"--sizes: expected a name of a-z, 0-9 and _ first, as in '{EXAMPLE}', got {text!r}")
    return name, sizes_argument.read(sizes)


def _dtypes_of(text: str) -> tuple[str, str]:
    """The dtypes of value and of locations: ``float16``, or ``float16/float32``."""
    try:
        value, locations = read_dtypes("--dtypes", text)
    except TypeError as error:
        raise CommandError(str(error)) from error
    return value, locations or value


def read_architectures(texts: Sequence[str]) -> list[int]:
    """Compute capabilities such as ``9.0``, ``90`` or ``sm_90``, which the NVRTC of this machine compiles for."""
    numbers = sorted({architecture_argument.read(text, "--arch") for text in texts})
    try:
        cupy = arrays.require_cupy("compiling kernels")
        reasons = [reason for number in numbers if (reason := refusal_of(cupy, number))]
    except RuntimeError as error:
        raise CommandError(str(error)) from error
    if reasons:
        raise CommandError(f"--arch: {reasons[0]}")
    return numbers


def export(sizes: Sequence[str], dtypes: Sequence[str], architectures: Sequence[str], out: Path) -> list[ForwardExport]:
    """Compile every one of `sizes` in every one of `dtypes`, and write all of it into `out`."""
    of_gpus, pairs = read_architectures(architectures), [_dtypes_of(text) for text in dtypes]
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
