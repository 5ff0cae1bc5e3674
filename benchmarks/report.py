"""python -m benchmarks.report: the README's table and the plot, from the recorded results and nothing else."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).with_name("results")
README = Path(__file__).parent.parent / "README.md"
BEGIN, END = "<!-- benchmark: made by python -m benchmarks.report -->", "<!-- end of benchmark -->"
OURS, BASELINE = "cupy_msda", "torch-ms-deform-attn"
DTYPES = ("float32", "float16", "bfloat16")


def latest() -> tuple[Path, dict[str, Any]]:
    """The newest result of a GPU."""
    found = []
    for path in RESULTS.glob("benchmark_*.json"):
        result = json.loads(path.read_text())
        if result["provenance"]["device"] == "cuda":
            found.append((result["provenance"]["date"], path, result))
    _, path, result = max(found, key=lambda entry: entry[0])
    return path, result


def medians(result: dict[str, Any]) -> dict[tuple[str, str, str, str], float]:
    """Microseconds by (workload, dtype, implementation, direction), of what was valid."""
    found = {}
    for record in result["records"]:
        for direction in ("forward", "backward"):
            if record.get("valid") and direction in record:
                key = (record["workload"], record["dtype"], record["implementation"], direction)
                found[key] = record[direction]["median_us"]
    return found


def table(path: Path, result: dict[str, Any]) -> str:
    """Markdown: our microseconds, and how many times as fast as the baseline that is."""
    times, where = medians(result), result["provenance"]
    dtypes = [d for d in DTYPES if any(key[1] == d for key in times)]
    heads = [f"{direction} {dtype}" for direction in ("forward", "backward") for dtype in dtypes]
    lines = [
        BEGIN,
        f"Microseconds a call on one {where['gpu']}, host overhead excluded, and in brackets how many times as fast as "
        f"`{BASELINE}` {where['packages'].get(BASELINE, '')} in the same run (inputs of the same dtype).",
        "",
        f"| workload | {' | '.join(heads)} |",
        f"| --- |{' ---: |' * len(heads)}",
    ]
    ratios: dict[str, list[float]] = {head: [] for head in heads}
    for workload in dict.fromkeys(key[0] for key in times):
        cells = []
        for head in heads:
            direction, dtype = head.split()
            ours = times.get((workload, dtype, OURS, direction))
            baseline = times.get((workload, dtype, BASELINE, direction))
            if ours is None or baseline is None:
                cells.append("")
                continue
            ratios[head].append(baseline / ours)
            cells.append(f"{ours:.0f} ({baseline / ours:.1f}x)")
        lines.append(f"| {workload} | {' | '.join(cells)} |")
    means = [f"{math.exp(sum(map(math.log, r)) / len(r)):.1f}x" if r else "" for r in ratios.values()]
    lines.append(f"| geometric mean | {' | '.join(means)} |")
    versions = ", ".join(f"{name} {version}" for name, version in where["packages"].items())
    lines += [
        "",
        f"Recorded {where['date'][:10]} in `benchmarks/results/{path.name}` (driver {where['driver']}, CUDA "
        f"{where['cuda']}, {versions}).",
        END,
    ]
    return "\n".join(lines)


def write_table(text: str) -> None:
    """Replace the part of the README between the markers."""
    readme = README.read_text()
    before, _, rest = readme.partition(BEGIN)
    _, _, after = rest.partition(END)
    README.write_text(before + text + after)


def plot(result: dict[str, Any], path: Path) -> None:
    """Time of every implementation, and the floors, for every workload."""
    from matplotlib.figure import Figure

    times = medians(result)
    dtypes = [d for d in DTYPES if any(key[1] == d for key in times)]
    names = list(dict.fromkeys(key[2] for key in times))
    workloads = list(dict.fromkeys(key[0] for key in times))
    floors = {(f["workload"], f["dtype"]): f for f in result["floors"]}
    figure = Figure(figsize=(6.2 * len(dtypes), 9), layout="constrained")
    axes = figure.subplots(2, len(dtypes), squeeze=False)
    width = 0.8 / len(names)
    for column, dtype in enumerate(dtypes):
        for row, direction in enumerate(("forward", "backward")):
            ax = axes[row][column]
            for i, name in enumerate(names):
                bars = [times.get((w, dtype, name, direction), math.nan) for w in workloads]
                ax.bar([x + i * width for x in range(len(workloads))], bars, width, label=name)
            for x, workload in enumerate(workloads):
                bound = floors[workload, dtype]
                kinds = [("hbm", "black")] + ([("l1", "tab:red")] if direction == "forward" else [])
                for kind, colour in kinds:
                    at = bound[f"{direction}_{kind}_us"]
                    label = {"hbm": "floor: HBM traffic", "l1": "floor: rows through L1"}[kind] if x == 0 else None
                    ax.plot([x - width / 2, x + 0.8 - width / 2], [at, at], color=colour, label=label)
            ax.set_yscale("log")
            ax.set_ylabel("microseconds")
            ax.set_title(f"{direction}, {dtype}")
            ax.set_xticks([x + 0.4 - width / 2 for x in range(len(workloads))], workloads, rotation=30, ha="right")
    axes[0][0].legend(fontsize=8)
    figure.suptitle(f"One call on {result['provenance']['gpu']}, {result['provenance']['date'][:10]}")
    figure.savefig(path, dpi=80)


def main() -> None:
    path, result = latest()
    write_table(table(path, result))
    plot(result, RESULTS / "benchmark.png")


if __name__ == "__main__":
    main()
