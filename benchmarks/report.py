"""python -m benchmarks.report: the README's tables and plots, from the recorded results and nothing else."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from . import detector, fused_report, models_report, scaling, served_report, several_gpus_report
from .backward import SKEWS

RESULTS = Path(__file__).with_name("results")
README = Path(__file__).parent.parent / "README.md"
# Pages of parts that are not in the README.
PAGES = {"served": README.parent / "docs/models.md", "several_gpus": README.parent / "docs/several_gpus.md"}
# The parts of the README and of these pages, and the recorded results of each.
PARTS = {
    "benchmark": ("benchmark_*.json",),
    "shapes": ("shapes_*.json",),
    "backward": ("backward_*.json",),
    "cpu": ("cpu_*.json",),
    "overhead": ("overhead_*.json",),
    "models": ("models_*.json",),
    "fused": ("fused_*.json", "front_end_*.json"),
    "served": ("served_models.json",),
    "several_gpus": ("several_gpus_*.json",),
}
# Names of steps in records from before 28 November 2026, and those of today.
OLD_STEPS = {
    "does anything observe": "check for observers",
    "same layout as before": "layout guards",
    "output": "output allocation",
    "addresses": "data pointers",
}
OPERATOR, BASELINE, CPU_BASELINE = "cupy_msda", "torch-ms-deform-attn", "grid_sample"
DTYPES = ("float32", "float16", "bfloat16")


def files(patterns: Iterable[str]) -> list[Path]:
    """The recorded results whose names match one of `patterns`."""
    return [path for pattern in patterns for path in RESULTS.glob(pattern)]


def latest(patterns: Iterable[str]) -> tuple[Path, dict[str, Any]]:
    """The newest of these results."""
    results = [(path, json.loads(path.read_text())) for path in files(patterns)]
    return max(results, key=lambda found: found[1]["provenance"]["date"])


def markers(part: str) -> tuple[str, str]:
    """The comments that enclose a part of its page."""
    return f"<!-- {part}: made by python -m benchmarks.report -->", f"<!-- end of {part} -->"


def medians(result: dict[str, Any]) -> dict[tuple[str, str, str, str], float]:
    """Microseconds of valid results by (workload, dtype, implementation, direction)."""
    found = {}
    for record in result["records"]:
        for direction in ("forward", "backward"):
            if record.get("valid") and direction in record:
                key = (record["workload"], record["dtype"], record["implementation"], direction)
                found[key] = record[direction]["median_us"]
    return found


def comparison_table(path: Path, result: dict[str, Any]) -> str:
    """Markdown: the microseconds of this operator and its speed-up over the baseline."""
    times, where = medians(result), result["provenance"]
    on_gpu = where["device"] == "cuda"
    baseline = BASELINE if on_gpu else CPU_BASELINE
    dtypes = [d for d in DTYPES if any(key[1] == d for key in times)]
    heads = [f"{direction} {dtype}" for direction in ("forward", "backward") for dtype in dtypes]
    lines = [f"| workload | {' | '.join(heads)} |", f"| --- |{' ---: |' * len(heads)}"]
    ratios: dict[str, list[float]] = {head: [] for head in heads}
    for workload in dict.fromkeys(key[0] for key in times):
        cells = []
        for head in heads:
            direction, dtype = head.split()
            time = times.get((workload, dtype, OPERATOR, direction))
            baseline_time = times.get((workload, dtype, baseline, direction))
            if time is None or baseline_time is None:
                cells.append("")
                continue
            ratios[head].append(baseline_time / time)
            cells.append(f"{time:.{0 if time >= 20 else 1}f} ({baseline_time / time:.1f}x)")
        lines.append(f"| {workload} | {' | '.join(cells)} |")
    means = [f"{math.exp(sum(map(math.log, r)) / len(r)):.2f}x" if r else "" for r in ratios.values()]
    lines.append(f"| geometric mean | {' | '.join(means)} |")
    lines += [
        "",
        f"Microseconds per call. In brackets: the speed-up over `{baseline}` in the same run. " + recorded(where, path),
    ]
    return "\n".join(lines)


def recorded(where: dict[str, Any], *paths: Path) -> str:
    """The sentence on date, files, machine and versions of a measurement."""
    versions = ", ".join(f"{name} {version}" for name, version in where["packages"].items())
    machine = (
        f"{where['gpu']}, driver {where['driver']}, CUDA {where['cuda']}"
        if where["device"] == "cuda"
        else f"{where['cpu']}, {where['threads']} threads, one image (rtdetr_640: two)"
    )
    files = ", ".join(f"`benchmarks/results/{path.name}`" for path in paths)
    return f"Recorded {where['date'][:10]} in {files}: {machine}, {versions}."


def backward_times(record: dict[str, Any]) -> dict[str, float]:
    """Microseconds by what was measured. Records from before 28 November 2026 call them "ways"."""
    return {name: found["median_us"] for name, found in (record.get("times") or record["ways"]).items()}


def backward_table(path: Path, result: dict[str, Any]) -> str:
    """Markdown: the default and the deterministic backward, the time of some gradients only, and memory."""
    records = {(record["workload"], record["dtype"]): record for record in result["records"]}
    orders = ("default", "deterministic")
    heads = [f"{order} {dtype}" for dtype in ("float32", "float16") for order in orders]
    heads += [f"only {name}, float32" for name in ("value", "locations and weights", "weights")]
    heads += ["extra MiB, float16"]
    lines = [f"| workload | {' | '.join(heads)} |", f"| --- |{' ---: |' * len(heads)}"]
    for workload in dict.fromkeys(name for name, _ in records):
        cells = []
        for dtype in ("float32", "float16"):
            times = backward_times(records[workload, dtype])
            for order in orders:
                speed_up = f"{times['baseline'] / times[order]:.1f}x"
                cells.append(f"{times[order]:.{0 if times[order] >= 20 else 1}f} ({speed_up})")
        times = backward_times(records[workload, "float32"])
        cells += [f"{times[name]:.0f}" for name in ("value", "samples", "weights")]
        memory = records[workload, "float16"]["memory"]
        cells.append(" / ".join(f"{memory[name]['extra_bytes'] / 2**20:.0f}" for name in (*orders, "baseline")))
        lines.append(f"| {workload} | {' | '.join(cells)} |")
    same = sum(record["same_bits"] for record in result["records"])
    lines += [
        "",
        f"Microseconds per call. In brackets: the speed-up over `{BASELINE}`. Extra MiB: the peak memory in addition "
        f"to the gradients, of the default backward, the deterministic one and `{BASELINE}`. {result['runs']} "
        f"deterministic runs, while the GPU did other work, gave the same bits in {same} of {len(result['records'])} "
        "combinations of workload and dtype. " + recorded(result["provenance"], path),
    ]
    return "\n".join(lines)


def overhead_table(path: Path, result: dict[str, Any]) -> str:
    """Markdown: host microseconds per call, and the steps of a forward."""
    records = result["records"]
    usages = list(dict.fromkeys(record["usage"] for record in records))
    lines = [f"| | {' | '.join(usages)} |", f"| --- |{' ---: |' * len(usages)}"]
    for name in dict.fromkeys(record["implementation"] for record in records):
        times = {r["usage"]: r["median_us"] for r in records if r["implementation"] == name}
        lines.append(f"| {name} | {' | '.join(f'{times[usage]:.1f}' for usage in usages)} |")
    whole, *steps = result["steps"]
    parts = ", ".join(f"{step_name(step)} {step['median_us']:.1f}" for step in steps)
    lines += [
        "",
        "Host microseconds per call on tiny_call, all in one process, with a GPU queue that is never full. The steps "
        f"of a forward of {whole['median_us']:.1f}: {parts}. " + recorded(result["provenance"], path),
    ]
    return "\n".join(lines)


def step_name(step: dict[str, Any]) -> str:
    """The name of a step of a forward."""
    return OLD_STEPS.get(step["step"], step["step"])


def fused_table(path: Path, result: dict[str, Any]) -> str:
    """Markdown: the fused operator against torch's softmax and location arithmetic before the plain one."""
    return fused_report.fused_table(result, recorded(result["provenance"], path))


def models_table() -> str:
    """Markdown: whole models of transformers, each from its newest record."""
    results = models_report.newest(files(PARTS["models"]))
    same_provenance: dict[str, list[Path]] = {}
    for path, result in results.items():
        same_provenance.setdefault(recorded(result["provenance"]), []).append(path)
    runs = (recorded(results[paths[0]]["provenance"], *paths) for paths in same_provenance.values())
    return models_report.models_table(results.values(), " ".join(runs))


def served_table(path: Path, result: dict[str, Any]) -> str:
    """Markdown: models of other packages that have been served."""
    return served_report.served_table(result, path.name)


def several_gpus_table(path: Path, result: dict[str, Any]) -> str:
    """Markdown: training on several GPUs."""
    return several_gpus_report.several_gpus_table(result, recorded(result["provenance"], path))


def page_of(part: str) -> Path:
    """The page that has a part."""
    return PAGES.get(part, README)


def enclosed(part: str) -> str:
    """A part of its page between its markers."""
    begin, end = markers(part)
    tables = {
        "overhead": overhead_table, "backward": backward_table, "fused": fused_table, "served": served_table,
        "several_gpus": several_gpus_table,
    }  # fmt: skip
    if not files(PARTS[part]):
        return f"{begin}\nNot recorded yet.\n{end}"
    table = models_table() if part == "models" else tables.get(part, comparison_table)(*latest(PARTS[part]))
    return f"{begin}\n{table}\n{end}"


def write_table(part: str) -> None:
    """Replace the part of its page between its markers."""
    begin, end = markers(part)
    page = page_of(part)
    before, _, rest = page.read_text().partition(begin)
    _, _, after = rest.partition(end)
    page.write_text(before + enclosed(part) + after)


def plot_comparison(result: dict[str, Any], path: Path) -> None:
    """The time of every implementation for every workload, with the floors."""
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
                    label = {"hbm": "floor: HBM traffic", "l1": "floor: L1 traffic"}[kind] if x == 0 else None
                    ax.plot([x - width / 2, x + 0.8 - width / 2], [at, at], color=colour, label=label)
            ax.set_yscale("log")
            ax.set_ylabel("microseconds")
            ax.set_title(f"{direction}, {dtype}")
            ax.set_xticks([x + 0.4 - width / 2 for x in range(len(workloads))], workloads, rotation=30, ha="right")
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=len(names) + 2)
    figure.suptitle(f"One call on {result['provenance']['gpu']}, {result['provenance']['date'][:10]}")
    figure.savefig(path, dpi=80)


def plot_overhead(result: dict[str, Any], path: Path) -> None:
    """Host time of each implementation and usage, and of the steps of a forward."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 3.4), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    records = result["records"]
    usages = list(dict.fromkeys(record["usage"] for record in records))
    names = list(dict.fromkeys(record["implementation"] for record in records))
    height = 0.8 / len(names)
    for i, name in enumerate(names):
        times = [r["median_us"] for r in records if r["implementation"] == name]
        bars = left.barh([y + i * height for y in range(len(usages))], times, height, label=name)
        left.bar_label(bars, fmt="%.0f", padding=2)
    left.set_yticks([y + 0.4 - height / 2 for y in range(len(usages))], usages)
    left.invert_yaxis()
    left.set_xlabel("host microseconds per call (tiny_call)")
    left.legend(fontsize="small")
    whole, *steps = result["steps"]
    labels = [step_name(step) for step in steps] + ["Python between the steps"]
    times = [step["median_us"] for step in steps]
    times.append(max(0.0, whole["median_us"] - sum(times)))
    bars = right.barh(labels, times)
    right.bar_label(bars, fmt="%.1f", padding=2)
    right.invert_yaxis()
    right.set_xlabel(f"host microseconds of a forward, {whole['median_us']:.1f} in all")
    figure.savefig(path, dpi=80)


def plot_backward(result: dict[str, Any], path: Path) -> None:
    """The time with skewed locations relative to local ones, for every workload."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 4), layout="constrained")
    for ax, mode in zip(figure.subplots(1, 2, sharey=True), ("default", "deterministic"), strict=True):
        records = [record for record in result["records"] if record["dtype"] == "float32"]
        times = [backward_times(record) for record in records]
        for i, (kind, label) in enumerate(SKEWS.items()):
            bars = [by_name[f"{mode}, {kind}"] / by_name[mode] for by_name in times]
            ax.bar([x + i * 0.27 for x in range(len(records))], bars, 0.27, label=label)
        ax.axhline(1, color="black", linewidth=0.8)
        ax.axhline(3, color="tab:red", linewidth=0.8, linestyle="--")
        ax.set_xticks(
            [x + 0.27 for x in range(len(records))], [r["workload"] for r in records], rotation=30, ha="right"
        )
        ax.set_title(f"backward, {mode}, float32")
    figure.axes[0].set_ylabel("time relative to the workload's own locations")
    figure.axes[0].legend()
    figure.savefig(path, dpi=80)


def main() -> None:
    for part in PARTS:
        write_table(part)
    plot_comparison(latest(PARTS["benchmark"])[1], RESULTS / "benchmark.png")
    plot_backward(latest(PARTS["backward"])[1], RESULTS / "backward.png")
    plot_overhead(latest(PARTS["overhead"])[1], RESULTS / "overhead.png")
    fused_report.plot_fused(latest(PARTS["fused"])[1], RESULTS / "fused.png")
    models_report.plot_models(models_report.newest(files(PARTS["models"])).values(), RESULTS / "models.png")
    scaling.plot_scaling(latest(["scaling_*.json"])[1], RESULTS / "scaling.png")
    detector.plot_losses(latest(["detector_*.json"])[1], RESULTS / "detector.png")


if __name__ == "__main__":
    main()
