"""The table and the plot of the fused operator, from the records of ``benchmarks.fused``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from . import plots

REFERENCES = ("points", "boxes")
DIRECTIONS = ("forward", "backward")


def fused_table(result: dict[str, Any], recorded: str) -> str:
    """Markdown: times of the fused operator, its speed-up, and the memory of a training step."""
    dtypes = list(dict.fromkeys(record["dtype"] for record in result["records"]))
    heads = [f"{direction} {dtype}" for direction in DIRECTIONS for dtype in dtypes]
    heads += [f"MiB per step, {dtype}" for dtype in dtypes[:2]]
    lines = [f"| workload | {' | '.join(heads)} |", f"| --- |{' ---: |' * len(heads)}"]
    records = {(record["workload"], record["dtype"]): record for record in result["records"]}
    for workload in dict.fromkeys(name for name, _ in records):
        cells = []
        for direction in DIRECTIONS:
            for dtype in dtypes:
                times = {name: found["median_us"] for name, found in records[workload, dtype][direction].items()}
                fused = times["points, fused"]
                ratios = (times[f"{kind}, unfused"] / times[f"{kind}, fused"] for kind in REFERENCES)
                cells.append(f"{fused:.{0 if fused >= 20 else 1}f} ({', '.join(f'{ratio:.2f}x' for ratio in ratios)})")
        for dtype in dtypes[:2]:
            memory = records[workload, dtype]["step_bytes"]
            cells.append(f"{memory['unfused'] / 2**20:.1f} → {memory['fused'] / 2**20:.1f}")
        lines.append(f"| {workload} | {' | '.join(cells)} |")
    lines += [
        "",
        "Microseconds per call of `ms_deform_attn_fused` with reference points. In brackets: its speed-up over the "
        "unfused sequence, with reference points and with reference boxes. The sequence is torch's softmax and "
        "location arithmetic in the inputs' dtype and `ms_deform_attn`. MiB per step: the peak memory of a forward "
        f"and a backward in addition to inputs and gradients, unfused → fused. {recorded}",
    ]
    return "\n".join(lines)


@plots.styled
def plot_fused(result: dict[str, Any], path: Path) -> None:
    """Speed-up over the unfused sequence, with its arithmetic in the inputs' dtype and in float32."""
    records = result["records"]
    workloads = list(dict.fromkeys(record["workload"] for record in records))
    names = [(record["dtype"], name) for record in records for name in record["forward"]]
    kinds = dict.fromkeys((dtype, name) for dtype, name in names if name.startswith("points, unfused"))
    figure, axes = plots.panels(2, height=5.4)
    for ax, direction in zip(axes, DIRECTIONS, strict=True):
        series = {}
        for dtype, name in kinds:
            found = [record[direction] for record in records if record["dtype"] == dtype]
            label = f"{dtype}, unfused in float32" if name.endswith("in float32") else dtype
            series[label] = [times[name]["median_us"] / times["points, fused"]["median_us"] for times in found]
        plots.dots(ax, workloads, series)
        plots.factors(ax, (1, 1.5, 2, 3, 4, 6))
        ax.set_title(f"{direction}: speed-up over unfused")
    plots.legend(figure, axes[0])
    plots.save(figure, path)
