"""Tables and plots of the operator: the workloads, the floors, the backward's options, and the host's time."""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from . import plots
from .backward import SKEWS
from .cases import load, on_cpu
from .records import recorded

OPERATOR, BASELINE, CPU_BASELINE = "cupy_msda", "torch-ms-deform-attn", "grid_sample"
DTYPES = ("float32", "float16", "bfloat16")
DIRECTIONS = ("forward", "backward")
# Names of steps in records from before 28 November 2026, and those of today.
OLD_STEPS = {
    "does anything observe": "check for observers",
    "same layout as before": "layout guards",
    "output": "output allocation",
    "addresses": "data pointers",
}
Times = dict[tuple[str, str, str, str], float]


def medians(result: dict[str, Any]) -> Times:
    """Microseconds of valid results by (workload, dtype, implementation, direction)."""
    found = {}
    for record in result["records"]:
        for direction in DIRECTIONS:
            if record.get("valid") and direction in record:
                key = (record["workload"], record["dtype"], record["implementation"], direction)
                found[key] = record[direction]["median_us"]
    return found


def speed_ups(times: Times, baseline: str, dtype: str, direction: str) -> dict[str, float]:
    """The time of a baseline over this operator's, by workload; only where both were measured."""
    pairs = {
        workload: (times.get((workload, dtype, baseline, direction)), times.get((workload, dtype, OPERATOR, direction)))
        for workload in dict.fromkeys(key[0] for key in times)
    }
    return {workload: theirs / ours for workload, (theirs, ours) in pairs.items() if theirs and ours}


def geometric_mean(numbers: Iterable[float]) -> float:
    logarithms = [math.log(number) for number in numbers]
    return math.exp(sum(logarithms) / len(logarithms))


def microseconds(time: float) -> str:
    return f"{time:.{0 if time >= 20 else 1}f}"


def head(columns: Iterable[str], first: str = "workload") -> list[str]:
    """The first two lines of a table: names on the left, numbers on the right."""
    columns = list(columns)
    return [f"| {first} | {' | '.join(columns)} |", f"| --- |{' ---: |' * len(columns)}"]


def comparison_table(path: Path, result: dict[str, Any]) -> str:
    """Markdown: the microseconds of this operator and its speed-up over the baseline."""
    times, where = medians(result), result["provenance"]
    on_gpu = where["device"] == "cuda"
    baseline = BASELINE if on_gpu else CPU_BASELINE
    dtypes = [d for d in DTYPES if any(key[1] == d for key in times)]
    columns = [(direction, dtype) for direction in DIRECTIONS for dtype in dtypes]
    found = {column: speed_ups(times, baseline, column[1], column[0]) for column in columns}
    lines = head(f"{direction} {dtype}" for direction, dtype in columns)
    for workload in dict.fromkeys(key[0] for key in times):
        cells = [
            f"{microseconds(times[workload, dtype, OPERATOR, direction])} ({of_workload[workload]:.1f}x)"
            if workload in of_workload
            else ""
            for (direction, dtype), of_workload in found.items()
        ]
        lines.append(f"| {workload} | {' | '.join(cells)} |")
    means = [f"{geometric_mean(ratios.values()):.2f}x" if ratios else "" for ratios in found.values()]
    images = "" if on_gpu else f" Images: {images_on_cpu(times)}."
    lines += [
        f"| geometric mean | {' | '.join(means)} |",
        "",
        f"Microseconds per call. In brackets: the speed-up over `{baseline}` in the same run.{images} "
        + recorded(where, path),
    ]
    return "\n".join(lines)


def images_on_cpu(times: Times) -> str:
    """N of each workload on a CPU."""
    workloads = load()
    return ", ".join(f"{name} {on_cpu(workloads[name]).N}" for name in dict.fromkeys(key[0] for key in times))


def floors_table(path: Path, result: dict[str, Any]) -> str:
    """Markdown: the time of this operator as a share of its floors."""
    times = medians(result)
    kinds = {"forward": ("hbm", "l1"), "backward": ("hbm",)}
    dtypes = ("float32", "float16")
    columns = [(direction, kind, dtype) for direction in DIRECTIONS for kind in kinds[direction] for dtype in dtypes]
    lines = head(f"{direction} {dtype}, {kind.upper()} floor" for direction, kind, dtype in columns)
    floors = {(found["workload"], found["dtype"]): found for found in result["floors"]}
    for workload in dict.fromkeys(name for name, _ in floors):
        cells = []
        for direction, kind, dtype in columns:
            floor, time = floors[workload, dtype][f"{direction}_{kind}_us"], times[workload, dtype, OPERATOR, direction]
            cells.append(f"{floor:.{0 if floor >= 20 else 1 if floor >= 1 else 2}f} ({100 * floor / time:.0f} %)")
        lines.append(f"| {workload} | {' | '.join(cells)} |")
    lines += [
        "",
        "Microseconds. In brackets: the floor as a share of the measured time; 100 % cannot be exceeded. "
        + recorded(result["provenance"], path),
    ]
    return "\n".join(lines)


def workloads_table() -> str:
    """Markdown: the sizes of the workloads and what they stand for."""
    lines = [
        "| workload | N | Q | S | levels | sampling | stands for |",
        "| --- | ---: | ---: | ---: | --- | --- | --- |",
    ]
    for name, workload in load().items():
        levels = ", ".join(f"{h}x{w}" for h, w in workload.levels)
        sampling = workload.sampling if workload.sampling == "uniform" else f"local, sigma {workload.sigma:g}"
        queries = f"{workload.Q:,}" + (" (pixels)" if workload.queries is None else "")
        cells = (name, str(workload.N), queries, f"{workload.S:,}", levels, sampling, workload.model)
        lines.append(f"| {' | '.join(cells)} |")
    samples = load()["encoder_800x1333"].samples
    text = (
        f"encoder_800x1333 has {samples / 1e6:.2f} million samples, so it reads {4 * samples / 1e6:.1f} million value "
        "vectors."
    )
    return "\n".join([*lines, "", text])


def backward_times(record: dict[str, Any]) -> dict[str, float]:
    """Microseconds by what was measured. Records from before 28 November 2026 call them "ways"."""
    return {name: found["median_us"] for name, found in (record.get("times") or record["ways"]).items()}


def backward_table(path: Path, result: dict[str, Any]) -> str:
    """Markdown: the default and the deterministic backward, the time of some gradients only, and memory."""
    records = {(record["workload"], record["dtype"]): record for record in result["records"]}
    orders = ("default", "deterministic")
    heads = [f"{order} {dtype}" for dtype in ("float32", "float16") for order in orders]
    heads += [f"only {name}, float32" for name in ("value", "locations and weights", "weights")]
    lines = head([*heads, "extra MiB, float16"])
    for workload in dict.fromkeys(name for name, _ in records):
        cells = []
        for dtype in ("float32", "float16"):
            times = backward_times(records[workload, dtype])
            cells += [f"{microseconds(times[order])} ({times['baseline'] / times[order]:.1f}x)" for order in orders]
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
    lines = head(usages, first="implementation")
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


def startup_text(path: Path, result: dict[str, Any]) -> str:
    """Seconds of the first call of a kernel."""
    times = {kind: [result[kind][f"{direction}_s"] for direction in DIRECTIONS] for kind in ("compiled", "cached")}
    (forward, backward), cached = times["compiled"], max(times["cached"])
    return (
        f"The first call of a kernel takes {forward:.2f} s forward and {backward:.2f} s backward with NVRTC, and "
        f"{cached:.2f} s from CuPy's disk cache. " + recorded(result["provenance"], path)
    )


@plots.styled
def plot_comparison(result: dict[str, Any], path: Path) -> None:
    """The time of every implementation for every workload, with the floors."""
    times = medians(result)
    names = [OPERATOR, BASELINE, CPU_BASELINE]
    workloads = list(dict.fromkeys(key[0] for key in times))
    floors = {(f["workload"], f["dtype"]): f for f in result["floors"]}
    figure, axes = plots.panels(4, height=9)
    for ax, (direction, dtype) in zip(axes, [(d, t) for d in DIRECTIONS for t in DTYPES[:2]], strict=True):
        series = {name: [times.get((w, dtype, name, direction), math.nan) for w in workloads] for name in names}
        plots.dots(ax, workloads, series)
        for kind in ("hbm", "l1") if direction == "forward" else ("hbm",):
            at = [floors[workload, dtype][f"{direction}_{kind}_us"] for workload in workloads]
            label = {"hbm": "floor: memory traffic", "l1": "floor: L1 traffic"}[kind]
            ax.plot(
                at,
                range(len(workloads)),
                "|",
                markersize=11,
                color=plots.COLOURS[3 if kind == "hbm" else 4],
                label=label,
            )
        plots.logarithmic(ax, (1, 10, 100, 1000, 10000))
        ax.set_xlim(left=1)
        ax.set_title(f"{direction}, {dtype}: microseconds")
    plots.legend(figure, axes[0])
    plots.save(figure, path)


@plots.styled
def plot_overhead(result: dict[str, Any], path: Path) -> None:
    """Host time of each implementation and usage, and of the steps of a forward."""
    records = result["records"]
    usages = list(dict.fromkeys(record["usage"] for record in records))
    names = list(dict.fromkeys(record["implementation"] for record in records))
    figure, (above, below) = plots.panels(2, height=5, height_ratios=(4, 3))
    times = {(record["implementation"], record["usage"]): record["median_us"] for record in records}
    plots.dots(above, usages, {name: [times[name, usage] for usage in usages] for name in names})
    plots.logarithmic(above, (20, 50, 100, 200, 500))
    above.set_title("host microseconds per call of tiny_call")
    plots.legend(figure, above)
    whole, *steps = result["steps"]
    labels = [step_name(step) for step in steps] + ["Python between the steps"]
    parts = [step["median_us"] for step in steps]
    parts.append(max(0.0, whole["median_us"] - sum(parts)))
    bars = below.barh(labels, parts, color=plots.COLOURS[0])
    below.bar_label(bars, fmt="%.1f", padding=2, color=plots.GREY)
    below.invert_yaxis()
    below.set_title(f"steps of a forward: {whole['median_us']:.1f} microseconds")
    plots.save(figure, path)


@plots.styled
def plot_backward(result: dict[str, Any], path: Path) -> None:
    """The time with skewed locations relative to local ones, for every workload."""
    figure, axes = plots.panels(2, height=5, sharex=True)
    for ax, mode in zip(axes, ("default", "deterministic"), strict=True):
        records = [record for record in result["records"] if record["dtype"] == "float32"]
        times = [backward_times(record) for record in records]
        series = {label: [t[f"{mode}, {kind}"] / t[mode] for t in times] for kind, label in SKEWS.items()}
        plots.dots(ax, [record["workload"] for record in records], series)
        plots.factors(ax, (0.25, 0.5, 1, 2, 3))
        ax.set_title(f"{mode}, float32: time relative to local ones")
    plots.legend(figure, axes[0], columns=3)
    plots.save(figure, path)
