"""python -m benchmarks.grid_report FILE: what a record of ``benchmarks.grid`` says, as numbers and as a plot."""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

from . import plots

WAYS = ("sorted", "atomics", "aggregated")
OURS = ("ours", "deterministic", *WAYS)
# Peers that sum 16-bit gradients in float32.
FLOAT32_SUMS = ("deformops, float32 sums", "torch-ms-deform-attn")
# A peer is as accurate where each of its errors is at most so many times ours.
AS_ACCURATE = 2
# A cell is slower by more than this share or these microseconds, whichever is more.
MARGIN, MARGIN_US = 0.03, 1.0
# The errors of a result that is wrong, not inaccurate.
WRONG = {"float32": 1e-3, "float16": 5e-2, "bfloat16": 2e-1}


def errors_of(row: dict[str, Any], name: str) -> dict[str, float]:
    """Without those that kinks decide: where float32 and float64 pick another cell, gradients of locations jump.

    And without the gradient of a single logit, which is zero.
    """
    single_logit = row["cell"]["fused"] and len(row["cell"]["levels"]) * row["cell"]["P"] == 1
    kinds = ("output", "value") if single_logit else ("output", "value", "weights")
    return {kind: error for kind, error in row["errors"][name].items() if kind in kinds}


def is_valid(row: dict[str, Any], name: str) -> bool:
    return max(errors_of(row, name).values()) < WRONG[row["cell"]["dtype"]]


def is_accurate(row: dict[str, Any], name: str) -> bool:
    """Whether an implementation is as accurate as this one."""
    errors, ours = errors_of(row, name), errors_of(row, "ours")
    return all(error <= AS_ACCURATE * ours[kind] + 1e-12 for kind, error in errors.items())


def sums_in_float32(row: dict[str, Any], name: str) -> bool:
    """Whether an implementation sums 16-bit gradients in float32, as this one does."""
    return row["cell"]["dtype"] == "float32" or name in FLOAT32_SUMS


#: Which peers count.
PEERS: dict[str, Callable[[dict[str, Any], str], bool]] = {
    "float32 sums": sums_in_float32,
    "as accurate": is_accurate,
    "any": lambda row, name: True,
}


def ratios(rows: list[dict[str, Any]], direction: str, kind: str) -> list[tuple[float, dict[str, Any], str]]:
    """Of each cell with a peer of this kind: the time of the fastest one over ours, the cell, and the peer."""
    found = []
    for row in rows:
        times = row[direction]
        peers = [name for name in times if name not in OURS and is_valid(row, name) and PEERS[kind](row, name)]
        if peers:
            fastest = min(peers, key=times.__getitem__)
            found.append((times[fastest] / times["ours"], row, fastest))
    return sorted(found, key=lambda one: one[0])


def slower_cells(rows: list[dict[str, Any]]) -> set[str]:
    """Names of the cells in which a peer is faster, in either direction."""
    return {
        row["name"]
        for direction in ("forward", "backward")
        for ratio, row, _ in ratios(rows, direction, "any")
        if is_slower(ratio, row, direction)
    }


def is_slower(ratio: float, row: dict[str, Any], direction: str) -> bool:
    ours = row[direction]["ours"]
    return ours * (1 - ratio) > max(MARGIN * ours * ratio, MARGIN_US)


def confirmed(row: dict[str, Any] | None, direction: str, kind: str) -> bool:
    """Whether a peer is faster in the repeat, or there is none."""
    return row is None or any(is_slower(ratio, row, direction) for ratio, *_ in ratios([row], direction, kind))


def mean(numbers: list[float]) -> float:
    """Geometric mean."""
    return round(math.exp(statistics.mean(map(math.log, numbers))), 3) if numbers else math.nan


def summary(record: dict[str, Any]) -> dict[str, Any]:
    """Geometric means and slower cells, by direction and kind of peer; and how good the choice of a way is.

    A cell that was measured again is slower only where it is so both times.
    """
    rows, again = record["rows"], {row["name"]: row for row in record.get("repeat", {}).get("rows", [])}
    usual = [row for row in rows if row["cell"]["sampling"] != "degenerate"]
    found: dict[str, Any] = {"cells": len(rows), "invalid": [row["name"] for row in rows if not is_valid(row, "ours")]}
    for direction in ("forward", "backward"):
        for kind in PEERS:
            of_usual = ratios(usual, direction, kind)
            of_rest = ratios([row for row in rows if row not in usual], direction, kind)
            found[f"{direction}, {kind}"] = {
                "geometric mean": mean([ratio for ratio, *_ in of_usual]),
                "faster in": f"{sum(ratio >= 1 for ratio, *_ in of_usual)} of {len(of_usual)}",
                "degenerate": mean([ratio for ratio, *_ in of_rest]),
                "slower": [
                    f"{ratio:.2f} {row[direction]['ours']:.1f} us {peer}: {row['name']}"
                    for ratio, row, peer in of_usual + of_rest
                    if is_slower(ratio, row, direction) and confirmed(again.get(row["name"]), direction, kind)
                ],
            }
    times = [row["backward"] for row in rows]
    losses = sorted(
        (
            (time["ours"] / min(time["ours"], *(time[way] for way in WAYS)), row)
            for time, row in zip(times, rows, strict=True)
        ),
        key=lambda one: -one[0],
    )
    found["choice"] = {
        "within 5 %": f"{sum(loss <= 1.05 for loss, _ in losses)} of {len(losses)}",
        "worse": [
            f"{loss:.2f} {row['name']}: " + ", ".join(f"{way} {row['backward'][way]}" for way in ("ours", *WAYS))
            for loss, row in losses
            if loss > 1.05
        ],
    }
    by_default = {True: [], False: []}
    for time in times:
        sorted_way = abs(time["ours"] - time["sorted"]) < 0.03 * time["ours"]
        by_default[sorted_way].append(time["deterministic"] / time["ours"])
    found["deterministic over default"] = {
        "sorted by default": [mean(by_default[True]), round(max(by_default[True], default=math.nan), 2)],
        "elsewhere": [mean(by_default[False]), round(max(by_default[False], default=math.nan), 2)],
    }
    return found


@plots.styled
def plot(rows: list[dict[str, Any]], target: Path) -> None:
    """Ratios over cells, sorted; one curve per direction and kind of peer."""
    figure, (axes,) = plots.panels(1, height=3.6)
    usual = [row for row in rows if row["cell"]["sampling"] != "degenerate"]
    for direction, color in zip(("forward", "backward"), plots.COLOURS, strict=False):
        for kind, style in (("float32 sums", "-"), ("any", ":")):
            found = [ratio for ratio, *_ in ratios(usual, direction, kind)]
            share = [100 * (index + 0.5) / len(found) for index in range(len(found))]
            label = "16-bit sums included" if kind == "any" else kind
            axes.plot(share, found, style, color=color, label=f"{direction}, {label}")
    axes.axhline(1, color=plots.GREY, linewidth=1)
    axes.set(xlabel="cells, sorted by the ratio [%]", yscale="log", xlim=(0, 100))
    axes.set_title("time of the fastest peer / time of cupy_msda")
    ticks = (0.5, 1, 2, 4, 8)
    axes.set_yticks(ticks, [f"{tick:g}x" for tick in ticks])
    axes.minorticks_off()
    axes.grid()
    plots.legend(figure, axes)
    plots.save(figure, target)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.grid_report", description=__doc__)
    parser.add_argument("file", type=Path, help="a record of benchmarks.grid")
    parser.add_argument("--plot", type=Path, help="SVG file to write")
    options = parser.parse_args(arguments)
    record = json.loads(options.file.read_text())
    print(json.dumps(summary(record), indent=1))
    if options.plot:
        plot(record["rows"], options.plot)


if __name__ == "__main__":
    main()
