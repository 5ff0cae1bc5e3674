"""The README's table and the plot of the front end in the kernel, from what ``benchmarks.front_end`` recorded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

FORMS = ("points", "boxes")
DIRECTIONS = ("forward", "backward")


def table(result: dict[str, Any], recorded: str) -> str:
    """Markdown: the fused times, how many times as fast that is, and the memory of a training step."""
    dtypes = list(dict.fromkeys(record["dtype"] for record in result["records"]))
    heads = [f"{direction} {dtype}" for direction in DIRECTIONS for dtype in dtypes]
    heads += [f"MiB of a step, {dtype}" for dtype in dtypes[:2]]
    lines = [f"| workload | {' | '.join(heads)} |", f"| --- |{' ---: |' * len(heads)}"]
    records = {(record["workload"], record["dtype"]): record for record in result["records"]}
    for workload in dict.fromkeys(name for name, _ in records):
        cells = []
        for direction in DIRECTIONS:
            for dtype in dtypes:
                times = {way: found["median_us"] for way, found in records[workload, dtype][direction].items()}
                fused = times["points, fused"]
                ratios = (times[f"{form}, unfused"] / times[f"{form}, fused"] for form in FORMS)
                cells.append(f"{fused:.{0 if fused >= 20 else 1}f} ({', '.join(f'{ratio:.2f}x' for ratio in ratios)})")
        for dtype in dtypes[:2]:
            memory = records[workload, dtype]["step_bytes"]
            cells.append(f"{memory['unfused'] / 2**20:.1f} → {memory['fused'] / 2**20:.1f}")
        lines.append(f"| {workload} | {' | '.join(cells)} |")
    lines += [
        "",
        "Microseconds of `ms_deform_attn_fused` with reference points, and in brackets how many times as fast it is, "
        "with points and with boxes, as torch's softmax and location arithmetic in the inputs' dtype before "
        "`ms_deform_attn`, or their gradients after its backward. Memory of a forward and a backward beside inputs and "
        f"gradients, at its peak, unfused and fused. {recorded}",
    ]
    return "\n".join(lines)


def plot(result: dict[str, Any], path: Path) -> None:
    """How many times as fast fused is as the sequence, the arithmetic in the inputs' dtype and in float32."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 3.6), layout="constrained")
    records = result["records"]
    workloads = list(dict.fromkeys(record["workload"] for record in records))
    series = dict.fromkeys(
        (record["dtype"], way) for record in records for way in record["forward"] if way.startswith("points, unfused")
    )
    for ax, direction in zip(figure.subplots(1, 2, sharey=True), DIRECTIONS, strict=True):
        for i, (dtype, way) in enumerate(series):
            found = [record[direction] for record in records if record["dtype"] == dtype]
            ratios = [times[way]["median_us"] / times["points, fused"]["median_us"] for times in found]
            label = f"{dtype}, arithmetic in float32" if way.endswith("in float32") else dtype
            ax.bar([x + i * 0.16 for x in range(len(workloads))], ratios, 0.16, label=label)
        ax.axhline(1, color="black", linewidth=0.8)
        ax.axhline(1.5 if direction == "forward" else 1.3, color="tab:red", linewidth=0.8, linestyle="--")
        ax.set_xticks([x + 0.32 for x in range(len(workloads))], workloads, rotation=30, ha="right")
        ax.set_title(f"{direction}; dashed: wanted of encoder_800x1333")
    figure.axes[0].set_ylabel("times as fast as the sequence")
    figure.axes[0].legend(fontsize="small")
    figure.savefig(path, dpi=80)
