"""Exported forwards as C: declarations, launch choices and cubins, for the launcher in ``cuda_src/launcher``."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from pathlib import Path

from ..arrays import item_size
from ..call import Problem
from . import kernels
from .forward_export import ForwardCubin, ForwardExport

LAUNCHER = ("cupy_msda_launch.h", "cupy_msda_launch.c")
_HEADER, _SOURCE = "cupy_msda_kernels.h", "cupy_msda_kernels.c"
_WORDS_PER_LINE = 6


def write(exports: Sequence[ForwardExport], folder: Path) -> list[Path]:
    """Write launcher, declarations, definitions and cubins into `folder`, which exists; returns the files."""
    launcher = kernels.source_folder() / "launcher"
    contents = {name: (launcher / name).read_bytes() for name in LAUNCHER}
    contents |= {_HEADER: header(exports).encode(), _SOURCE: source(exports).encode()}
    for export in exports:
        contents |= {f"{export.name}.sm_{cubin.architecture}.cubin": cubin.image for cubin in export.cubins}
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    return [folder / name for name in contents]


def header(exports: Sequence[ForwardExport]) -> str:
    """The declaration of each configuration, with what its arrays hold."""
    declared = "\n".join(
        f"/* {_description(export)} */\nextern const cupy_msda_configuration cupy_msda_{export.name};\n"
        for export in exports
    )
    return (
        "/* Written by python -m cupy_msda export-kernels. */\n"
        "#ifndef CUPY_MSDA_KERNELS_H\n#define CUPY_MSDA_KERNELS_H\n\n"
        '#include "cupy_msda_launch.h"\n\n'
        '#ifdef __cplusplus\nextern "C" {\n#endif\n\n'
        f"{declared}\n#ifdef __cplusplus\n}}\n#endif\n\n#endif\n"
    )


def source(exports: Sequence[ForwardExport]) -> str:
    """The definition of each configuration. Configurations with the same cubin share it."""
    images = list(dict.fromkeys(cubin.image for export in exports for cubin in export.cubins))
    number_of = {image: number for number, image in enumerate(images)}
    parts = [f'/* Written by python -m cupy_msda export-kernels. */\n#include "{_HEADER}"\n']
    parts += [
        f"static const uint64_t image_{number}[] = {{\n{_words(image)}}};\n" for number, image in enumerate(images)
    ]
    for export in exports:
        rows = "".join(f"    {_row(cubin, number_of[cubin.image])},\n" for cubin in export.cubins)
        parts.append(f"static const cupy_msda_cubin {export.name}_cubins[] = {{\n{rows}}};\n")
        parts.append(_definition(export))
    return "\n".join(parts)


def _words(image: bytes) -> str:
    """The bytes as 64-bit words of a little-endian machine, which are aligned for the driver."""
    padded = image + bytes(-len(image) % 8)
    words = [f"0x{word:x}u" for (word,) in struct.iter_unpack("<Q", padded)]
    lines = (words[start : start + _WORDS_PER_LINE] for start in range(0, len(words), _WORDS_PER_LINE))
    return "".join(f"    {', '.join(line)},\n" for line in lines)


def _row(cubin: ForwardCubin, number: int) -> str:
    major, minor = divmod(cubin.architecture, 10)
    spec = cubin.spec
    fields = (
        major, minor, f"image_{number}", spec.threads, spec.shared_bytes, cubin.carveout, cubin.queries_per_block,
        cubin.query_tiles, spec.heads_per_warp, cubin.resident_blocks, cubin.max_S, cubin.max_Q, cubin.max_heads,
    )  # fmt: skip
    return f"{{{', '.join(map(str, fields))}}}"


def _definition(export: ForwardExport) -> str:
    problem = export.problem
    fields = {
        "M": problem.M,
        "D": problem.D,
        "value_bytes": item_size(problem.value_dtype),
        "location_bytes": item_size(problem.location_dtype),
        "packed_weights": 2 * problem.K if problem.packed else 0,
        "fused": int(problem.fused is not None),
        "ragged": int(problem.ragged),
        "pixel_queries": int(export.pixel_queries),
        "cubins": f"{export.name}_cubins",
        "cubin_count": len(export.cubins),
    }
    members = "".join(f"    .{name} = {value},\n" for name, value in fields.items())
    return f"const cupy_msda_configuration cupy_msda_{export.name} = {{\n{members}}};\n"


def _description(export: ForwardExport) -> str:
    problem = export.problem
    lines = [
        f"value {problem.value_dtype}, {_samples(problem)}, output {problem.value_dtype}.",
        f"M = {problem.M}, D = {problem.D}, L = {problem.L}, K = {problem.K}: the points of each level are "
        f"{', '.join(map(str, problem.points))}.",
        f"{problem.variant.interpolation}, padding {problem.variant.padding_mode}, align_corners "
        f"{str(problem.variant.align_corners).lower()}{', query_lengths' if problem.ragged else ''}.",
        f"{'N and S = Q' if export.pixel_queries else 'N, S and Q'} may vary. The launch choices are those for "
        f"N = {problem.N}, S = {problem.S}, Q = {problem.Q}",
        f"on {', '.join(f'sm_{cubin.architecture}' for cubin in export.cubins)}.",
    ]
    return "\n * ".join([f"cupy_msda_{export.name}", *lines])


def _samples(problem: Problem) -> str:
    if problem.fused is None:
        return f"locations and weights {problem.location_dtype}"
    held = "offsets with logits (packed)" if problem.packed else "offsets and logits"
    levels = "1" if problem.fused.levels == 1 else "L"
    shape = f"[N, Q, {levels}, {problem.fused.coordinates}]"
    return f"{held} {problem.location_dtype}, references {shape} {problem.fused.dtype}"
