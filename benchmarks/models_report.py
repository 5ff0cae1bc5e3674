"""The README's table and the plot of whole models, from what ``benchmarks.models`` recorded."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

Record = dict[str, Any]


def _row(record: Record) -> tuple[str, str, str]:
    return record["model"], record["dtype"], record["mode"]


def newest(paths: Iterable[Path]) -> dict[Path, dict[str, Any]]:
    """The newest records of each model, dtype and mode, in the results that they are from, oldest first."""
    results = sorted(
        ((path, json.loads(path.read_text())) for path in paths),
        key=lambda pair: (pair[1]["provenance"]["date"], pair[0].name),
    )
    found = {_row(record): path for path, result in results for record in result["records"]}
    kept = {path: [r for r in result["records"] if found[_row(r)] == path] for path, result in results}
    return {path: result | {"records": kept[path]} for path, result in results if kept[path]}


def by_row(results: Iterable[dict[str, Any]]) -> dict[tuple[str, str, str], dict[bool, Record]]:
    """Records by (model, dtype, mode), and whether they are served by this operator; only what was measured twice."""
    rows: dict[tuple[str, str, str], dict[bool, Record]] = {}
    for record in (record for result in results for record in result["records"]):
        if "images_per_second" in record:
            rows.setdefault(_row(record), {})[record["served"]] = record
    # A model's rows may come from several files.
    order = sorted(rows, key=lambda row: (row[0], row[1] != "float32", row[2] != "eager"))
    return {row: rows[row] for row in order if len(rows[row]) == 2}


def host_bound(record: Record) -> bool:
    """Whether the GPU waits for the host for more than a third of a call."""
    return record.get("gpu_us", float("inf")) < 2 / 3 * record["time"]["median_us"]


def _rate(record: Record) -> str:
    """Images a second, in italics where they say more about the host than about the GPU."""
    rate = f"{record['images_per_second']:.1f}"
    return f"*{rate}*" if host_bound(record) else rate


def table(results: Collection[dict[str, Any]], recorded: str) -> str:
    """Markdown: images a second, the GPU's time, memory and the operator's share, as the model is and served."""
    heads = ["images", "images / s", "served", "GPU, ms a call", "served", "peak MiB", "served"]
    heads += ["operator's share of the GPU's time", "served"]
    lines = [f"| model | {' | '.join(heads)} |", f"| --- | --- |{' ---: |' * (len(heads) - 1)}"]
    rows = by_row(results)
    for (model, dtype, mode), pair in rows.items():
        H, W = pair[False]["size"]
        cells = [f"{pair[False]['N']} of {H}x{W}"]
        cells += [_rate(pair[served]) for served in (False, True)]
        cells += [f"{t / 1e3:.1f}" if (t := pair[served].get("gpu_us")) else "" for served in (False, True)]
        cells += [f"{pair[served]['peak_bytes'] / 2**20:.0f}" for served in (False, True)]
        shares = (pair[served].get("share_of_operator") for served in (False, True))
        cells += ["" if share is None else f"{100 * share:.1f} %" for share in shares]
        lines.append(f"| {model}, {dtype}, {mode} | {' | '.join(cells)} |")
    apart = [pair[True]["largest_difference"] for (_, *way), pair in rows.items() if way == ["float32", "eager"]]
    compared = [r for result in results for r in result["records"] if r["mode"] == "gradients" and "failed" not in r]
    with_grads = ""
    if compared:
        served, as_it_is = (max(r[f"gradient_error_{way}"] for r in compared) for way in ("served", "as_it_is"))
        with_grads = (
            f"With float32 products the gradients of all parameters are at most {served:.0e} of their norm off those "
            f"in float64, and {as_it_is:.0e} as the models are. "
        )
    lines += [
        "",
        "Models of transformers with random weights, as they are and inside `cupy_msda.torch.transformers.patch()`; "
        "float32 is TF32 in matrix products. In eager float32 no output differs by more than "
        f"{max(apart):.0e} of its norm. {with_grads}In italics: the GPU waits for the host for more than a third "
        "of a call, and the host's time for the same code varied twofold within minutes; compare the GPU's time there. "
        f"{recorded}",
    ]
    return "\n".join(lines)


def plot(results: Iterable[dict[str, Any]], path: Path) -> None:
    """Images a second, the GPU's time, peak memory and the operator's share, as the models are and served."""
    from matplotlib.figure import Figure

    rows = by_row(results)
    labels = [f"{model}\n{dtype}, {mode}" for model, dtype, mode in rows]
    figure = Figure(figsize=(16, 0.5 * len(rows) + 1), layout="constrained")
    panels = (
        ("images a second", lambda r: r["images_per_second"]),
        ("GPU, ms a call", lambda r: r.get("gpu_us", float("nan")) / 1e3),
        ("peak memory, GiB", lambda r: r["peak_bytes"] / 2**30),
        ("operator's share of the GPU's time, %", lambda r: 100 * r.get("share_of_operator", float("nan"))),
    )
    for ax, (title, number) in zip(figure.subplots(1, 4, sharey=True), panels, strict=True):
        for served, label in ((False, "as it is"), (True, "served")):
            places = [y + 0.4 * served for y in range(len(rows))]
            bars = ax.barh(places, [number(pair[served]) for pair in rows.values()], 0.4, label=label)
            ax.bar_label(bars, fmt="%.1f", padding=2, fontsize="small")
        ax.set_title(title)
        ax.set_yticks([y + 0.2 for y in range(len(rows))], labels, fontsize="small")
        ax.margins(x=0.15)
    figure.axes[0].invert_yaxis()
    for served, bars in enumerate(figure.axes[0].containers):
        for bar, pair in zip(bars, rows.values(), strict=True):
            bar.set_alpha(0.4 if host_bound(pair[served]) else 1)
    figure.axes[0].set_xlabel("pale: the GPU waits for the host")
    figure.axes[0].legend(fontsize="small")
    figure.savefig(path, dpi=80)
