"""A mutant: one small change of one source file."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent


@dataclass(frozen=True)
class Mutant:
    """`before`, at the character `start` of a file, becomes `after`. `line` counts from 1."""

    file: str
    line: int
    start: int
    operator: str
    before: str
    after: str

    @property
    def is_cuda(self) -> bool:
        return self.file.startswith("cuda_src/")

    def __str__(self) -> str:
        shown = (" ".join(text.split()) for text in (self.before, self.after))
        return f"{self.file}:{self.line}: {self.operator}: {' -> '.join(shown)}"

    def applied(self, text: str) -> str:
        """The text of the file with the change."""
        end = self.start + len(self.before)
        if text[self.start : end] != self.before:
            raise LookupError(f"{self.file} is not the file that {self} was made from")
        return text[: self.start] + self.after + text[end:]


def draw(mutants: Iterable[Mutant], seed: int) -> list[Mutant]:
    """All mutants in a drawn order: one of each line, then a second one of each, and so on."""
    pick = random.Random(seed)
    of_line = defaultdict(list)
    for mutant in mutants:
        of_line[mutant.file, mutant.line].append(mutant)
    for found in of_line.values():
        pick.shuffle(found)
    # The first mutants of all lines, then the second ones of those that have two.
    lines = list(of_line.values())
    pick.shuffle(lines)
    longest = max(map(len, lines), default=0)
    return [found[turn] for turn in range(longest) for found in lines if turn < len(found)]
