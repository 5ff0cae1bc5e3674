"""Tables of drawn cells, on a GPU and on CPUs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from . import grid_report
from .operator_report import DIRECTIONS, head
from .records import recorded

KINDS = {"float32 sums": "peers with float32 sums", "as accurate": "peers that are as accurate", "any": "all peers"}
CPU_RECORDS = ("grid_numba_*.json", "grid_numpy_*.json")
# Of the CPU's cells. Training is a forward that records and its backward; the first records are without it.
CPU_DIRECTIONS = (*DIRECTIONS, "training")


def cells_table(path: Path, result: dict[str, Any]) -> str:
    """Markdown: the fastest peer of each cell over this operator."""
    found = grid_report.summary(result)
    rows = result["rows"]
    lines = head(("geometric mean", "faster in", "slower in", "degenerate sampling"), first="direction, compared with")
    for direction in DIRECTIONS:
        for kind, label in KINDS.items():
            numbers = found[f"{direction}, {kind}"]
            means = [f"{numbers[name]:.2f}x" for name in ("geometric mean", "degenerate")]
            cells = (means[0], f"{numbers['faster in']} cells", f"{len(numbers['slower'])}", means[1])
            lines.append(f"| {direction}, {label} | {' | '.join(cells)} |")
    peers = dict.fromkeys(name for row in rows for name in row["forward"] if name not in grid_report.OURS)
    deterministic = found["deterministic over default"]["elsewhere"]
    lines += [
        "",
        f"The time of the fastest peer over that of this operator, in {len(rows)} drawn cells. Peers: "
        f"{', '.join(f'`{name}`' for name in peers)}. Float32 sums: 16-bit gradients are summed in float32, as here. "
        f"As accurate: no error is more than {grid_report.AS_ACCURATE} times this operator's. Slower: by more than "
        f"{100 * grid_report.MARGIN:.0f} % and {grid_report.MARGIN_US:g} microsecond, and so once more where the cell "
        "was measured twice. Degenerate: all samples of a level on one point; the first two columns leave these out. "
        f"Where the default is not deterministic, `deterministic=True` takes {deterministic[0]:.2f} times its time in "
        f"the mean, {deterministic[1]:.2f} at most. " + recorded(result["provenance"], path),
    ]
    return "\n".join(lines)


def cpu_cells_table(results: list[tuple[Path, dict[str, Any]]]) -> str:
    """Markdown: both tiers of the CPU path against their peers."""
    columns = [f"{kind}, {direction}" for direction in CPU_DIRECTIONS for kind in ("geometric mean", "slower in")]
    lines = head(columns, first="tier, compared with")
    for _, result in results:
        tier = result["tier"].partition(" ")[0]
        for peer, numbers in result["summary"].items():
            cells = []
            for direction in CPU_DIRECTIONS:
                of = numbers.get(direction)
                cells += [f"{of['geometric_mean']:.2f}x", f"{of['slower']} of {of['cells']}"] if of else ["", ""]
            lines.append(f"| {tier}, `{peer}` | {' | '.join(cells)} |")
    sentences = " ".join(recorded(result["provenance"], path) for path, result in results)
    lines += [
        "",
        "The time of the peer over that of this operator, in the geometric mean of the cells that take the peer more "
        f"than a millisecond. Slower: by more than a tenth and a fixed time per call. {sentences}",
    ]
    return "\n".join(lines)
