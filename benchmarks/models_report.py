"""The table and the plot of whole models, from the records of ``benchmarks.models``."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

from . import plots

Record = dict[str, Any]
# Keys of records from before 28 November 2026, and those of today.
OLD_KEYS = {
    "served": "patched",
    "gradient_error_served": "gradient_error_patched",
    "gradient_error_as_it_is": "gradient_error_original",
}
MODELS = {False: "original", True: "patched"}


def _load(path: Path) -> dict[str, Any]:
    result = json.loads(path.read_text())
    result["records"] = [{OLD_KEYS.get(key, key): item for key, item in r.items()} for r in result["records"]]
    return result


def _row(record: Record) -> tuple[str, str, str]:
    return record["model"], record["dtype"], record["mode"]


def newest(paths: Iterable[Path]) -> dict[Path, dict[str, Any]]:
    """The newest records of each model, dtype and mode, by the result that holds them, oldest first."""
    results = sorted(
        ((path, _load(path)) for path in paths),
        key=lambda pair: (pair[1]["provenance"]["date"], pair[0].name),
    )
    found = {_row(record): path for path, result in results for record in result["records"]}
    kept = {path: [r for r in result["records"] if found[_row(r)] == path] for path, result in results}
    return {path: result | {"records": kept[path]} for path, result in results if kept[path]}


def by_row(results: Iterable[dict[str, Any]]) -> dict[tuple[str, str, str], dict[bool, Record]]:
    """Records by (model, dtype, mode) and whether the model is patched; only where both were measured."""
    rows: dict[tuple[str, str, str], dict[bool, Record]] = {}
    for record in (record for result in results for record in result["records"]):
        if "images_per_second" in record:
            rows.setdefault(_row(record), {})[record["patched"]] = record
    # A model's rows may come from several files.
    order = sorted(rows, key=lambda row: (row[0], row[1] != "float32", row[2] != "eager"))
    return {row: rows[row] for row in order if len(rows[row]) == 2}


def host_bound(record: Record) -> bool:
    """Whether the GPU waits for the host for more than a third of a call."""
    return record.get("gpu_us", float("inf")) < 2 / 3 * record["time"]["median_us"]


def _rate(record: Record) -> str:
    """Images per second, in italics where the host is the limit."""
    rate = f"{record['images_per_second']:.1f}"
    return f"*{rate}*" if host_bound(record) else rate


def models_table(results: Collection[dict[str, Any]], recorded: str) -> str:
    """Markdown: images per second, GPU time, memory and the operator's share, of original and patched models."""
    columns = ("images / s", "GPU, ms per call", "peak MiB", "operator's share of the GPU time")
    heads = ["images", *(f"{column}, {model}" for column in columns for model in MODELS.values())]
    lines = [f"| model | {' | '.join(heads)} |", f"| --- | --- |{' ---: |' * (len(heads) - 1)}"]
    rows = by_row(results)
    for (model, dtype, mode), pair in rows.items():
        H, W = pair[False]["size"]
        cells = [f"{pair[False]['N']} of {H}x{W}"]
        cells += [_rate(pair[patched]) for patched in MODELS]
        cells += [f"{t / 1e3:.1f}" if (t := pair[patched].get("gpu_us")) else "" for patched in MODELS]
        cells += [f"{pair[patched]['peak_bytes'] / 2**20:.0f}" for patched in MODELS]
        shares = (pair[patched].get("share_of_operator") for patched in MODELS)
        cells += ["" if share is None else f"{100 * share:.1f} %" for share in shares]
        lines.append(f"| {model}, {dtype}, {mode} | {' | '.join(cells)} |")
    differences = [pair[True]["largest_difference"] for row, pair in rows.items() if row[1:] == ("float32", "eager")]
    compared = [r for result in results for r in result["records"] if r["mode"] == "gradients" and "failed" not in r]
    gradients = ""
    if compared:
        original, patched = (max(r[f"gradient_error_{model}"] for r in compared) for model in MODELS.values())
        gradients = (
            "With float32 products, the gradients of all parameters differ from those in float64 by at most "
            f"{patched:.0e} of their norm in patched models and by {original:.0e} in original ones. "
        )
    lines += [
        "",
        "Models of transformers with random weights, original and inside `cupy_msda.torch.transformers.patch()`. "
        f"Matrix products in float32 use TF32. In eager float32 no output differs by more than {max(differences):.0e} "
        f"of its norm. {gradients}In italics: the GPU waits for the host during more than a third of a call. The "
        "host's time for the same code varied twofold within minutes, so compare the GPU time there. "
        f"{recorded}",
    ]
    return "\n".join(lines)


@plots.styled
def plot_models(results: Iterable[dict[str, Any]], path: Path) -> None:
    """GPU time and peak memory of original and patched models."""
    rows = by_row(results)
    labels = [f"{model}\n{dtype}, {mode}" for model, dtype, mode in rows]
    panels = {
        "GPU, ms per call": lambda record: record.get("gpu_us", float("nan")) / 1e3,
        "peak, GiB": lambda record: record["peak_bytes"] / 2**30,
    }
    figure, axes = plots.panels(1, 2, height=0.4 * len(rows) + 1, sharey=True)
    for ax, (title, number) in zip(axes, panels.items(), strict=True):
        series = {label: [number(pair[patched]) for pair in rows.values()] for patched, label in MODELS.items()}
        ends = zip(*series.values(), strict=True)
        for row, pair in enumerate(ends):
            ax.plot(pair, (row, row), color=plots.GREY, linewidth=1)
        plots.dots(ax, labels, series)
        ax.set_title(title)
        ax.set_xlim(left=0)
    axes[0].tick_params(axis="y", labelsize=8)
    plots.legend(figure, axes[0])
    plots.save(figure, path)
