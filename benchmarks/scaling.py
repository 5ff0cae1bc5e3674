"""python -m benchmarks.scaling: CPU time over Q, N, P and the number of threads.

This operator and the grid_sample composition, each called several times in a row: threads that one of them leaves
spinning must not slow down the other.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from . import cases, implementations, plots
from .provenance import provenance

BASE = cases.Workload(
    name="base", N=1, M=8, D=32, levels=((50, 84), (25, 42), (13, 21)), P=4, queries=1000, sampling="uniform"
)
AXES: dict[str, list[dict[str, int]]] = {
    "Q": [{"queries": Q} for Q in (100, 300, 1000, 3000, 10000, 30000)],
    "N": [{"N": N} for N in (1, 2, 4, 8)],
    "P": [{"P": P} for P in (1, 2, 4, 8, 16)],
    "threads": [{"threads": threads} for threads in (1, 2)],
}
DIRECTIONS = ("forward", "backward")
# The compared implementations and their line styles.
MARKERS = {"cupy_msda": "o-", "grid_sample": "s--"}


def samples(workload: cases.Workload) -> int:
    """N * Q * M * L * P; the time should be proportional to it."""
    return workload.N * workload.Q * workload.M * len(workload.levels) * workload.P


def milliseconds(call: Callable[[], Any], repeats: int) -> float:
    """Median of `repeats` calls, after two untimed ones."""
    times = []
    for index in range(repeats + 2):
        begin = time.perf_counter()
        call()
        if index >= 2:
            times.append((time.perf_counter() - begin) * 1e3)
    return statistics.median(times)


def measure_cpu(workload: cases.Workload, threads: int, repeats: int) -> list[dict[str, Any]]:
    """One record per implementation."""
    inputs = cases.make_inputs(workload, torch.float32, "cpu")
    torch.set_num_threads(threads)
    os.environ["CUPY_MSDA_NUM_THREADS"] = str(threads)
    records = []
    for implementation in implementations.known():
        if implementation.name not in MARKERS:
            continue
        backward = implementation.prepare_backward(inputs)
        record = {"implementation": implementation.name, "samples": samples(workload), "threads": threads}
        record["forward_ms"] = milliseconds(lambda made=implementation: made.forward(inputs), repeats)
        record["backward_ms"] = milliseconds(backward, repeats)
        records.append(record)
    return records


@plots.styled
def plot_scaling(result: dict[str, Any], path: Path) -> None:
    """Time over the number of samples for each axis, and a line of proportional time."""
    records = result["records"]
    axes = [axis for axis in AXES if axis != "threads"]
    figure, found = plots.panels(3, 2, height=6.4, sharey="col")
    for index, ax in enumerate(found):
        axis, direction = axes[index // 2], DIRECTIONS[index % 2]
        for name, marker in MARKERS.items():
            points = [r for r in records if r["axis"] == axis and r["implementation"] == name]
            x, y = [p["samples"] for p in points], [p[f"{direction}_ms"] for p in points]
            ax.plot(x, y, marker, label=name, markersize=4)
            if name == "cupy_msda":
                ax.plot(x, [y[-1] * value / x[-1] for value in x], ":", color=plots.GREY, label="proportional")
        ax.set_xscale("log")
        ax.set_yscale("log")
        ax.minorticks_off()
        ax.grid()
        ax.set_title(f"{direction}, by {axis}: ms")
    plots.legend(figure, found[0], columns=3)
    plots.save(figure, path)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scaling", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--axes", nargs="+", choices=AXES, default=list(AXES))
    options = parser.parse_args(arguments)
    records = []
    for axis in options.axes:
        for change in AXES[axis]:
            threads = change.get("threads", options.threads)
            workload = replace(BASE, **{k: v for k, v in change.items() if k != "threads"})
            for record in measure_cpu(workload, threads, options.repeats):
                records.append({"axis": axis, **change, **record})
                print(f"{axis:8}{next(iter(change.values())):6} {record['implementation']:12}"
                      f"{record['forward_ms']:10.2f}{record['backward_ms']:10.2f} ms", flush=True)  # fmt: skip
    result = {"provenance": provenance("cpu"), "records": records}
    options.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
