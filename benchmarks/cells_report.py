"""Tables of drawn cells, on a GPU and on CPUs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from . import grid_report
from .operator_report import DIRECTIONS, head
from .records import recorded

KINDS = {True: "peers that are as accurate", False: "all peers"}
CPU_RECORDS = ("grid_numba_*.json", "grid_numpy_*.json")


def cells_table(path: Path, result: dict[str, Any]) -> str:
    """Markdown: the fastest peer of each cell over this operator."""
    rows = result["rows"]
    found = grid_report.summary(rows)
    lines = head(("geometric mean", "faster in", "degenerate sampling"), first="direction, compared with")
    for direction in DIRECTIONS:
        for accurate, kind in KINDS.items():
            numbers = found[f"{direction}, {'as accurate' if accurate else 'any'}"]
            cells = (
                f"{numbers['geometric mean']:.2f}x",
                numbers["faster in"] + " cells",
                f"{numbers['degenerate']:.2f}x",
            )
            lines.append(f"| {direction}, {kind} | {' | '.join(cells)} |")
    peers = dict.fromkeys(name for row in rows for name in row["forward"] if name not in grid_report.OURS)
    deterministic = found["deterministic over default"]["elsewhere"]
    lines += [
        "",
        f"The time of the fastest peer over that of this operator, in {len(rows)} drawn cells. Peers: "
        f"{', '.join(f'`{name}`' for name in peers)}. As accurate: no error is more than {grid_report.AS_ACCURATE} "
        "times this operator's; this leaves out 16-bit sums. Degenerate: all samples of a level on one point; these "
        "count in the last column alone. Where the default is "
        f"not deterministic, `deterministic=True` takes {deterministic[0]:.2f} times its time in the geometric mean, "
        f"{deterministic[1]:.2f} at most. " + recorded(result["provenance"], path),
    ]
    return "\n".join(lines)


def cpu_cells_table(results: list[tuple[Path, dict[str, Any]]]) -> str:
    """Markdown: both tiers of the CPU path against their peers."""
    columns = [f"{kind}, {direction}" for direction in DIRECTIONS for kind in ("geometric mean", "slower in")]
    lines = head(columns, first="tier, compared with")
    for _, result in results:
        tier = result["tier"].partition(" ")[0]
        for peer, numbers in result["summary"].items():
            cells = []
            for direction in DIRECTIONS:
                of = numbers[direction]
                cells += [f"{of['geometric_mean']:.2f}x", f"{of['slower']} of {of['cells']}"]
            lines.append(f"| {tier}, `{peer}` | {' | '.join(cells)} |")
    sentences = " ".join(recorded(result["provenance"], path) for path, result in results)
    lines += [
        "",
        "The time of the peer over that of this operator, in the geometric mean of the cells that take the peer more "
        f"than a millisecond. Slower: by more than a tenth and a fixed time per call. {sentences}",
    ]
    return "\n".join(lines)
