"""The README's table: this operator and the alternatives, with the three numbers that matter."""

from __future__ import annotations

from typing import Any

from . import grid_report, models_report
from .operator_report import BASELINE, CPU_BASELINE, DIRECTIONS, DTYPES, geometric_mean, medians, speed_ups
from .records import files, latest

# The models and their settings of the last rows: the one that gains most, and one that gains as most do.
MODELS = (("Deformable DETR", "bfloat16", "compiled"), ("RT-DETR", "bfloat16", "compiled"))
# What no record holds: installation, frameworks and devices of each.
PROPERTIES = (
    (
        "to install",
        "pip and a driver",
        "torch",
        "a compiler and the CUDA toolkit, again for every torch",
        "torch 2.11, Python 3.12 or 3.13",
    ),
    ("arrays of", "NumPy, CuPy, torch, JAX, DLPack", "torch", "torch", "torch"),
    (
        "runs on",
        "NVIDIA GPUs, CPUs; other devices by functions of torch",
        "every device of torch",
        "NVIDIA GPUs, some on CPUs",
        "NVIDIA GPUs; elsewhere by functions of torch",
    ),
)


def compared_table() -> str:
    """Markdown: rows of properties and rows of numbers."""
    _, benchmark = latest(["benchmark_*.json"])
    _, cells = latest(["grid_*.json"], device="cuda")
    times = medians(benchmark)
    heads = (
        "",
        "cupy_msda",
        "torch's `grid_sample`",
        "compiled extension",
        "[deformops](https://pypi.org/project/deformops/)",
    )
    lines = [f"| {' | '.join(heads)} |", "| --- | --- | --- | --- | --- |"]
    lines += [f"| {' | '.join(row)} |" for row in PROPERTIES]
    for direction in DIRECTIONS:
        extension = (mean_of(times, BASELINE, dtype, direction) for dtype in DTYPES[:2])
        composition = mean_of(times, CPU_BASELINE, "float32", direction)
        row = (
            f"{direction}, time",
            "1",
            composition,
            " / ".join(extension),
            " / ".join(of_cells(cells["rows"], direction)),
        )
        lines.append(f"| {' | '.join(row)} |")
    for model in MODELS:
        ours, original, images = model_times(model)
        row = (f"{model[0]}, {images} images", f"{ours:.1f} ms", f"{original:.1f} ms", "not measured", "not measured")
        lines.append(f"| {' | '.join(row)} |")
    where, on = benchmark["provenance"], cells["provenance"]
    lines += [
        "",
        f"Times relative to cupy_msda's, geometric means. `grid_sample` (float32) and the extension (`{BASELINE}`, "
        f"float32 / float16): the workloads on {where['gpu']}. deformops (16-bit / float32 sums of 16-bit gradients): "
        f"drawn cells on {on['gpu']}. It is faster in {faster_in(cells)}. The models: GPU time of an inference in "
        f"{MODELS[0][1]}, compiled; where the GPU waits for the host, images per second gain less, or fall. "
        "[All numbers](docs/performance/README.md).",
    ]
    return "\n".join(lines)


def mean_of(times: dict[Any, float], baseline: str, dtype: str, direction: str) -> str:
    return f"{geometric_mean(speed_ups(times, baseline, dtype, direction).values()):.1f}"


def of_cells(rows: list[dict[str, Any]], direction: str) -> list[str]:
    """Means over cells without degenerate sampling, against all peers and against those with float32 sums."""
    usual = [row for row in rows if row["cell"]["sampling"] != "degenerate"]
    found = (grid_report.ratios(usual, direction, kind) for kind in ("any", "float32 sums"))
    return [f"{grid_report.mean([ratio for ratio, *_ in ratios]):.1f}" for ratios in found]


def faster_in(cells: dict[str, Any]) -> str:
    """In how many cells the fastest peer is faster, by the rule of the performance page."""
    found = grid_report.summary(cells)
    counts = []
    for direction in DIRECTIONS:
        slower = len(found[f"{direction}, any"]["slower"])
        counts.append(f"{slower} of {len(grid_report.ratios(cells['rows'], direction, 'any'))} {direction} cells")
    return " and ".join(counts)


def model_times(model: tuple[str, str, str]) -> tuple[float, float, int]:
    """Milliseconds on the GPU of the patched and the original model, and the images of a call."""
    pair = models_report.by_row(models_report.newest(files(["models_*.json"])).values())[model]
    return pair[True]["gpu_us"] / 1e3, pair[False]["gpu_us"] / 1e3, pair[False]["N"]
