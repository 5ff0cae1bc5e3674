"""The table of models that have been served, for docs/models.md."""

from __future__ import annotations

from typing import Any


def served_table(result: dict[str, Any], file: str) -> str:
    """Markdown: code base, version, the line to write, calls of the operator, and how far outputs and gradients are."""
    lines = [
        "| code base | version | model | line | calls | outputs | gradients |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in result["rows"]:
        cells = [row["package"], row["version"], row["model"], f"`{row['line']}`", str(row["calls"])]
        cells += [f"{row[name]:.0e}" for name in ("outputs", "gradients")]
        lines.append(f"| {' | '.join(cells)} |")
    where = result["provenance"]
    text = (
        "A stand-in is a function of ours with the parameters of code bases that have no package. Recorded "
        f"{where['date'][:10]} in `benchmarks/results/{file}`: torch {where['packages']['torch']}, on a CPU."
    )
    return "\n".join([*lines, "", text])
