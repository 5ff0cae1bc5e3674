"""The README's table and the plot of whole models, from what ``benchmarks.models`` recorded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

Record = dict[str, Any]


def by_row(result: dict[str, Any]) -> dict[tuple[str, str, str], dict[bool, Record]]:
    """Records by (model, dtype, mode), and whether they are served by this operator; only what was measured twice."""
    rows: dict[tuple[str, str, str], dict[bool, Record]] = {}
    for record in result["records"]:
        if "failed" not in record:
            rows.setdefault((record["model"], record["dtype"], record["mode"]), {})[record["served"]] = record
    return {key: pair for key, pair in rows.items() if len(pair) == 2}


def table(result: dict[str, Any], recorded: str) -> str:
    """Markdown: images a second, memory and the operator's share, as the model is and served."""
    heads = ["images", "images / s", "served", "peak MiB", "served", "operator's share of the GPU's time", "served"]
    lines = [f"| model | {' | '.join(heads)} |", f"| --- | --- |{' ---: |' * (len(heads) - 1)}"]
    rows = by_row(result)
    for (model, dtype, mode), pair in rows.items():
        H, W = pair[False]["size"]
        cells = [f"{pair[False]['N']} of {H}x{W}"]
        cells += [f"{pair[served]['images_per_second']:.1f}" for served in (False, True)]
        cells += [f"{pair[served]['peak_bytes'] / 2**20:.0f}" for served in (False, True)]
        shares = (pair[served].get("share_of_operator") for served in (False, True))
        cells += ["" if share is None else f"{100 * share:.1f} %" for share in shares]
        lines.append(f"| {model}, {dtype}, {mode} | {' | '.join(cells)} |")
    worst = max(pair[True]["largest_difference"] for (_, dtype, _), pair in rows.items() if dtype == "float32")
    lines += [
        "",
        "Models of transformers with random weights, as they are and inside `cupy_msda.torch.transformers.patch()`; "
        "float32 is TF32 in matrix products. In float32 no output differs by more than "
        f"{worst:.0e} of its norm. Eager models of this size are bound by the host. {recorded}",
    ]
    return "\n".join(lines)


def plot(result: dict[str, Any], path: Path) -> None:
    """Images a second, peak memory and the operator's share, as the models are and served."""
    from matplotlib.figure import Figure

    rows = by_row(result)
    labels = [f"{model}\n{dtype}, {mode}" for model, dtype, mode in rows]
    figure = Figure(figsize=(13, 4.2), layout="constrained")
    panels = (
        ("images a second", lambda r: r["images_per_second"]),
        ("peak memory, GiB", lambda r: r["peak_bytes"] / 2**30),
        ("operator's share of the GPU's time, %", lambda r: 100 * r.get("share_of_operator", float("nan"))),
    )
    for ax, (title, number) in zip(figure.subplots(1, 3, sharey=True), panels, strict=True):
        for served, label in ((False, "as it is"), (True, "served")):
            places = [y + 0.4 * served for y in range(len(rows))]
            bars = ax.barh(places, [number(pair[served]) for pair in rows.values()], 0.4, label=label)
            ax.bar_label(bars, fmt="%.1f", padding=2, fontsize="small")
        ax.set_title(title)
        ax.set_yticks([y + 0.2 for y in range(len(rows))], labels, fontsize="small")
        ax.margins(x=0.15)
    figure.axes[0].invert_yaxis()
    figure.axes[0].legend(fontsize="small")
    figure.savefig(path, dpi=80)
