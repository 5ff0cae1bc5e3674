"""python -m benchmarks.report: the README's table and the plot, from the recorded results and nothing else."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from . import detector, front_end_report, models_report, scaling
from .backward import SKEWS

RESULTS = Path(__file__).with_name("results")
README = Path(__file__).parent.parent / "README.md"
# Part of the README: the files that it is made from.
PARTS = {
    "benchmark": "benchmark_*.json",
    "shapes": "shapes_*.json",
    "backward": "backward_*.json",
    "cpu": "cpu_*.json",
    "overhead": "overhead_*.json",
    "models": "models_*.json",
    "front_end": "front_end_*.json",
}
OURS, BASELINE, CPU_BASELINE = "cupy_msda", "torch-ms-deform-attn", "grid_sample"
DTYPES = ("float32", "float16", "bfloat16")


def latest(pattern: str) -> tuple[Path, dict[str, Any]]:
    """The newest result among the files of `pattern`."""
    results = [(path, json.loads(path.read_text())) for path in RESULTS.glob(pattern)]
    return max(results, key=lambda found: found[1]["provenance"]["date"])


def markers(part: str) -> tuple[str, str]:
    """The comments that enclose a part of the README."""
    return f"<!-- {part}: made by python -m benchmarks.report -->", f"<!-- end of {part} -->"


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
            ours = times.get((workload, dtype, OURS, direction))
            theirs = times.get((workload, dtype, baseline, direction))
            if ours is None or theirs is None:
                cells.append("")
                continue
            ratios[head].append(theirs / ours)
            cells.append(f"{ours:.{0 if ours >= 20 else 1}f} ({theirs / ours:.1f}x)")
        lines.append(f"| {workload} | {' | '.join(cells)} |")
    means = [f"{math.exp(sum(map(math.log, r)) / len(r)):.2f}x" if r else "" for r in ratios.values()]
    lines.append(f"| geometric mean | {' | '.join(means)} |")
    lines += [
        "",
        f"Microseconds a call, and in brackets how many times as fast as `{baseline}` in the same run. "
        + recorded(where, path),
    ]
    return "\n".join(lines)


def recorded(where: dict[str, Any], *paths: Path) -> str:
    """The sentence that says when, where and with what results were measured."""
    versions = ", ".join(f"{name} {version}" for name, version in where["packages"].items())
    machine = (
        f"{where['gpu']}, driver {where['driver']}, CUDA {where['cuda']}"
        if where["device"] == "cuda"
        else f"{where['cpu']}, {where['threads']} threads, one image (rtdetr_640: two)"
    )
    files = ", ".join(f"`benchmarks/results/{path.name}`" for path in paths)
    return f"Recorded {where['date'][:10]} in {files}: {machine}, {versions}."


def backward_table(path: Path, result: dict[str, Any]) -> str:
    """Markdown: the default and the deterministic backward, what only some gradients take, and memory."""
    records = {(record["workload"], record["dtype"]): record for record in result["records"]}
    heads = [f"{way} {dtype}" for dtype in ("float32", "float16") for way in ("default", "deterministic")]
    heads += [f"{name} alone float32" for name in ("value", "samples", "weights")]
    heads += ["MiB beside the gradients, float16"]
    lines = [f"| workload | {' | '.join(heads)} |", f"| --- |{' ---: |' * len(heads)}"]
    for workload in dict.fromkeys(name for name, _ in records):
        cells = []
        for dtype in ("float32", "float16"):
            ways = {way: found["median_us"] for way, found in records[workload, dtype]["ways"].items()}
            for way in ("default", "deterministic"):
                times = f"{ways['baseline'] / ways[way]:.1f}x"
                cells.append(f"{ways[way]:.{0 if ways[way] >= 20 else 1}f} ({times})")
        ways = records[workload, "float32"]["ways"]
        cells += [f"{ways[way]['median_us']:.0f}" for way in ("value", "samples", "weights")]
        held = {way: found["extra_bytes"] / 2**20 for way, found in records[workload, "float16"]["memory"].items()}
        cells.append(f"{held['default']:.0f} / {held['deterministic']:.0f} / {held['baseline']:.0f}")
        lines.append(f"| {workload} | {' | '.join(cells)} |")
    same = sum(record["same_bits"] for record in result["records"])
    lines += [
        "",
        f"Microseconds a call, and in brackets how many times as fast as `{BASELINE}`; memory of the default, the "
        f"deterministic backward and `{BASELINE}`. {result['runs']} deterministic runs beside other work gave the same "
        f"bits in {same} of {len(result['records'])} combinations of workload and dtype. "
        + recorded(result["provenance"], path),
    ]
    return "\n".join(lines)


def overhead_table(path: Path, result: dict[str, Any]) -> str:
    """Markdown: microseconds of the host a call, and what a forward is made of."""
    records = result["records"]
    usages = list(dict.fromkeys(record["usage"] for record in records))
    lines = [f"| | {' | '.join(usages)} |", f"| --- |{' ---: |' * len(usages)}"]
    for name in dict.fromkeys(record["implementation"] for record in records):
        times = {r["usage"]: r["median_us"] for r in records if r["implementation"] == name}
        lines.append(f"| {name} | {' | '.join(f'{times[usage]:.1f}' for usage in usages)} |")
    whole, *steps = result["steps"]
    parts = ", ".join(f"{step['step']} {step['median_us']:.1f}" for step in steps)
    lines += [
        "",
        "Microseconds of the host a call on tiny_call, all in one process, the GPU's queue never full. Of a forward's "
        f"{whole['median_us']:.1f}: {parts}. " + recorded(result["provenance"], path),
    ]
    return "\n".join(lines)


def front_end_table(path: Path, result: dict[str, Any]) -> str:
    """Markdown: the front end in the kernel against torch's arithmetic before the operator."""
    return front_end_report.table(result, recorded(result["provenance"], path))


def models_table() -> str:
    """Markdown: models of transformers from end to end, each from its newest record."""
    results = models_report.newest(RESULTS.glob(PARTS["models"]))
    alike: dict[str, list[Path]] = {}
    for path, result in results.items():
        alike.setdefault(recorded(result["provenance"]), []).append(path)
    runs = (recorded(results[paths[0]]["provenance"], *paths) for paths in alike.values())
    return models_report.table(results.values(), " ".join(runs))


def enclosed(part: str) -> str:
    """A part of the README with its markers."""
    begin, end = markers(part)
    make = {"overhead": overhead_table, "backward": backward_table, "front_end": front_end_table}.get(part, table)
    made = models_table() if part == "models" else make(*latest(PARTS[part]))
    return f"{begin}\n{made}\n{end}"


def write_table(part: str) -> None:
    """Replace the part of the README between its markers."""
    begin, end = markers(part)
    readme = README.read_text()
    before, _, rest = readme.partition(begin)
    _, _, after = rest.partition(end)
    README.write_text(before + enclosed(part) + after)


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
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=len(names) + 2)
    figure.suptitle(f"One call on {result['provenance']['gpu']}, {result['provenance']['date'][:10]}")
    figure.savefig(path, dpi=80)


def plot_overhead(result: dict[str, Any], path: Path) -> None:
    """Host time of each way of calling, and the steps of a forward beside each other."""
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
    left.set_xlabel("microseconds of the host a call (tiny_call)")
    left.legend(fontsize="small")
    whole, *steps = result["steps"]
    labels = [step["step"] for step in steps] + ["Python between them"]
    times = [step["median_us"] for step in steps]
    times.append(max(0.0, whole["median_us"] - sum(times)))
    bars = right.barh(labels, times)
    right.bar_label(bars, fmt="%.1f", padding=2)
    right.invert_yaxis()
    right.set_xlabel(f"microseconds, of {whole['median_us']:.1f} of a forward")
    figure.savefig(path, dpi=80)


def plot_backward(result: dict[str, Any], path: Path) -> None:
    """What skewed locations do to the time, against local ones, for every workload."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 4), layout="constrained")
    for ax, mode in zip(figure.subplots(1, 2, sharey=True), ("default", "deterministic"), strict=True):
        records = [record for record in result["records"] if record["dtype"] == "float32"]
        for i, kind in enumerate(SKEWS):
            bars = [r["ways"][f"{mode}, {kind}"]["median_us"] / r["ways"][mode]["median_us"] for r in records]
            ax.bar([x + i * 0.27 for x in range(len(records))], bars, 0.27, label=kind)
        ax.axhline(1, color="black", linewidth=0.8)
        ax.axhline(3, color="tab:red", linewidth=0.8, linestyle="--")
        ax.set_xticks(
            [x + 0.27 for x in range(len(records))], [r["workload"] for r in records], rotation=30, ha="right"
        )
        ax.set_title(f"backward, {mode}, float32")
    figure.axes[0].set_ylabel("time against the workload's own locations")
    figure.axes[0].legend()
    figure.savefig(path, dpi=80)


def main() -> None:
    for part in PARTS:
        write_table(part)
    plot(latest(PARTS["benchmark"])[1], RESULTS / "benchmark.png")
    plot_backward(latest(PARTS["backward"])[1], RESULTS / "backward.png")
    plot_overhead(latest(PARTS["overhead"])[1], RESULTS / "overhead.png")
    front_end_report.plot(latest(PARTS["front_end"])[1], RESULTS / "front_end.png")
    models_report.plot(models_report.newest(RESULTS.glob(PARTS["models"])).values(), RESULTS / "models.png")
    scaling.plot(latest("scaling_*.json")[1], RESULTS / "scaling.png")
    detector.plot(latest("detector_*.json")[1], RESULTS / "detector.png")


if __name__ == "__main__":
    main()
