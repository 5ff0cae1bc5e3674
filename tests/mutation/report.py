"""The report of a mutation run, as JSON: rewritten after each mutant, so that a run can be resumed."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .mutant import Mutant
from .runner import Outcome

COUNTED = ("killed", "survived")


class Report:
    """Mutants and what became of them. Survivors get their `verdict` by hand; "neutral: ..." is not counted."""

    def __init__(self, path: Path, seed: int, provenance: dict[str, Any]) -> None:
        self.path = path
        self.content: dict[str, Any] = {"seed": seed, "provenance": provenance, "rates": {}, "mutants": []}
        if path.exists():
            self.content = json.loads(path.read_text())
            if self.content["seed"] != seed:
                raise SystemExit(f"{path} has the seed {self.content['seed']}, got {seed}")
        self.known = {one["mutant"] for one in self.content["mutants"]}

    def has(self, mutant: Mutant) -> bool:
        return _name(mutant) in self.known

    def counted(self, language: str) -> int:
        """Mutants of a language that have been killed or have survived."""
        return sum(one["language"] == language and one["status"] in COUNTED for one in self.content["mutants"])

    def add(self, language: str, mutant: Mutant, outcome: Outcome, equivalent: bool) -> None:
        entry = {
            "mutant": _name(mutant),
            "language": language,
            "status": "equivalent" if equivalent else outcome.status,
            "by": outcome.by,
            "tests": outcome.tests,
            "seconds": round(outcome.seconds, 1),
        }
        print(f"{entry['status']}: {entry['mutant']} ({entry['by']}, {entry['seconds']} s)", flush=True)
        self.content["mutants"].append(entry)
        self.known.add(entry["mutant"])
        self.write()

    def write(self) -> None:
        self.content["rates"] = {language: self.rate(language) for language in ("cuda", "python")}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text(json.dumps(self.content, indent=1) + "\n")

    def rate(self, language: str) -> dict[str, Any]:
        """Killed mutants, survivors and neutral ones; the rate is of those that are not neutral."""
        mutants = [one for one in self.content["mutants"] if one["language"] == language]
        killed = sum(one["status"] == "killed" for one in mutants)
        neutral = sum(one.get("verdict", "").startswith("neutral") for one in mutants)
        survived = sum(one["status"] == "survived" for one in mutants) - neutral
        share = round(killed / (killed + survived), 3) if killed + survived else None
        return {"killed": killed, "survived": survived, "neutral": neutral, "kill_rate": share}

    def lines(self) -> Iterator[str]:
        self.write()
        for language, rate in self.content["rates"].items():
            yield f"{language}: {rate}"
        for one in self.content["mutants"]:
            if one["status"] == "survived":
                yield f"survived: {one['mutant']}{'; ' + one['verdict'] if 'verdict' in one else ''}"


def _name(mutant: Mutant) -> str:
    return f"{mutant} @{mutant.start}"
