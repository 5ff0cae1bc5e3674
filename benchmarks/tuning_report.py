"""What tuning gains on drawn cells and whether it repairs a spoilt table, for docs/tuning.md."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def tuning_table(record: Mapping[str, Any], where: str) -> str:
    """Markdown: the microseconds of each cell before and after."""
    lines = ["| cell | forward | tuned | backward | tuned |", "| --- | ---: | ---: | ---: | ---: |"]
    for row in record["rows"]:
        times = row["times"]
        cells = [_time(times[direction][name]) for direction in times for name in ("default", "tuned")]
        lines.append(f"| {' | '.join([row['name'], *cells])} |")
    return "\n".join([*lines, "", f"{_summary(record['summary'])} {where}"])


def _time(microseconds: float) -> str:
    return f"{microseconds:.1f}" if microseconds < 100 else f"{microseconds:.0f}"


def _summary(found: Mapping[str, Any]) -> str:
    return (
        f"Microseconds, in a process of their own. Of {found['calls']} calls {found['default_was_not_the_best']} are "
        f"faster by more than 2 % and 0.5 microseconds, {found['slower']} slower; the tuned calls take "
        f"{found['geometric_mean']:.2f} of the time in the geometric mean, {found['worst']:.2f} at most."
    )


def repaired_text(record: Mapping[str, Any], where: str) -> str:
    """Markdown: what became of a spoilt table."""
    found = record["summary"]
    repaired = found["repaired_calls"] - found["not_repaired"]
    return (
        f"{found['repaired_calls']} calls were tuned from a table with half the warps and twice the blocks, which took "
        f"up to {found['spoilt']:.2f} times as long: {repaired} are then within 2 % of the shipped table or "
        f"faster. {where}"
    )
