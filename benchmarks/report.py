"""python -m benchmarks.report: tables and plots of the documentation, from the recorded results and nothing else."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from . import (
    cells_report,
    detector,
    fused_report,
    grid_report,
    models_report,
    operator_report,
    scaling,
    served_report,
    several_gpus_report,
    tuning_report,
)
from .compared_report import compared_table
from .records import files, latest, recorded, records_table

ROOT = Path(__file__).parent.parent
README, MODELS, PERFORMANCE = ROOT / "README.md", ROOT / "docs/models.md", ROOT / "docs/performance/README.md"
SEVERAL_GPUS, TUNING = ROOT / "docs/several_gpus.md", ROOT / "docs/tuning.md"
PLOTS = PERFORMANCE.parent / "plots"
MODEL_RECORDS, GPU_CELLS = ("models_*.json",), partial(latest, ("grid_*.json",), device="cuda")


def models_table() -> str:
    """Markdown: whole models of transformers, each from its newest record."""
    results = models_report.newest(files(MODEL_RECORDS))
    same_provenance: dict[str, list[Path]] = {}
    for path, result in results.items():
        same_provenance.setdefault(recorded(result["provenance"]), []).append(path)
    runs = (recorded(results[paths[0]]["provenance"], *paths) for paths in same_provenance.values())
    return models_report.models_table(results.values(), " ".join(runs))


def fused_table(path: Path, result: dict[str, Any]) -> str:
    """Markdown: the fused operator against torch's softmax and location arithmetic before the plain one."""
    return fused_report.fused_table(result, recorded(result["provenance"], path))


def served_table(path: Path, result: dict[str, Any]) -> str:
    """Markdown: models of other packages that have been served."""
    return served_report.served_table(result, path.name)


def tuning_table() -> str:
    """Markdown: what tuning gains on drawn cells, and whether it repairs a table."""
    (path, tuned), (repaired_path, repaired) = latest(("tuning_*.json",)), latest(("repaired_*.json",))
    parts = [
        tuning_report.tuning_table(tuned, recorded(tuned["provenance"], path)),
        tuning_report.repaired_text(repaired, recorded(repaired["provenance"], repaired_path)),
    ]
    return "\n\n".join(parts)


def several_gpus_table() -> str:
    """Markdown: a section on training on several GPUs, or nothing where it has not been recorded."""
    patterns = ("several_gpus_*.json",)
    if not files(patterns):
        return ""
    path, result = latest(patterns)
    table = several_gpus_report.several_gpus_table(result, recorded(result["provenance"], path))
    return f"## Measured\n\n{table}"


def of_latest(table: Callable[[Path, dict[str, Any]], str], *patterns: str) -> Callable[[], str]:
    """A table of the newest record whose name matches one of `patterns`."""
    return lambda: table(*latest(patterns))


# By name: the page, and the text between the part's markers.
PARTS: dict[str, tuple[Path, Callable[[], str]]] = {
    "compared": (README, compared_table),
    "served": (MODELS, of_latest(served_table, "served_models.json")),
    "several_gpus": (SEVERAL_GPUS, several_gpus_table),
    "tuning": (TUNING, tuning_table),
    "benchmark": (PERFORMANCE, of_latest(operator_report.comparison_table, "benchmark_*.json")),
    "floors": (PERFORMANCE, of_latest(operator_report.floors_table, "benchmark_*.json")),
    "shapes": (PERFORMANCE, of_latest(operator_report.comparison_table, "shapes_*.json")),
    "cells": (PERFORMANCE, lambda: cells_report.cells_table(*GPU_CELLS())),
    "backward": (PERFORMANCE, of_latest(operator_report.backward_table, "backward_*.json")),
    "fused": (PERFORMANCE, of_latest(fused_table, "fused_*.json", "front_end_*.json")),
    "models": (PERFORMANCE, models_table),
    "overhead": (PERFORMANCE, of_latest(operator_report.overhead_table, "overhead_*.json")),
    "startup": (PERFORMANCE, of_latest(operator_report.startup_text, "startup_*.json")),
    "cpu": (PERFORMANCE, of_latest(operator_report.comparison_table, "cpu_*.json")),
    "cpu_cells": (
        PERFORMANCE,
        lambda: cells_report.cpu_cells_table([latest([pattern]) for pattern in cells_report.CPU_RECORDS]),
    ),
    "workloads": (PERFORMANCE, operator_report.workloads_table),
    "records": (PERFORMANCE, records_table),
}


def markers(part: str) -> tuple[str, str]:
    """The comments that enclose a part of its page."""
    return f"<!-- {part}: made by python -m benchmarks.report -->", f"<!-- end of {part} -->"


def enclosed(part: str) -> str:
    """A part of its page between its markers."""
    begin, end = markers(part)
    return f"{begin}\n{PARTS[part][1]()}\n{end}"


def write_table(part: str) -> None:
    """Replace the part of its page between its markers."""
    begin, end = markers(part)
    page = PARTS[part][0]
    before, found, rest = page.read_text().partition(begin)
    _, ended, after = rest.partition(end)
    if not (found and ended):
        raise ValueError(f"{page}: expected the lines {begin} and {end}")
    page.write_text(before + enclosed(part) + after)


def write_plots(folder: Path) -> None:
    """Every plot of the performance page."""
    folder.mkdir(exist_ok=True)
    operator_report.plot_comparison(latest(["benchmark_*.json"])[1], folder / "benchmark.svg")
    operator_report.plot_backward(latest(["backward_*.json"])[1], folder / "backward.svg")
    operator_report.plot_overhead(latest(["overhead_*.json"])[1], folder / "overhead.svg")
    fused_report.plot_fused(latest(["fused_*.json", "front_end_*.json"])[1], folder / "fused.svg")
    models_report.plot_models(models_report.newest(files(MODEL_RECORDS)).values(), folder / "models.svg")
    grid_report.plot(GPU_CELLS()[1]["rows"], folder / "cells.svg")
    scaling.plot_scaling(latest(["scaling_*.json"])[1], folder / "scaling.svg")
    detector.plot_losses(latest(["detector_*.json"])[1], folder / "detector.svg")


def main() -> None:
    for part in PARTS:
        write_table(part)
    write_plots(PLOTS)


if __name__ == "__main__":
    main()
