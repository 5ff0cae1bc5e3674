"""Which tests reach a line: from what `recorder` wrote."""

from __future__ import annotations

import json
import re
import subprocess
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace

import coverage

from cupy_msda.cuda import kernels

from .mutant import ROOT, Mutant

# Tests that quote lines of a source: they fail wherever such a line changes.
QUOTING = (
    "tests/emulator/test_planted_faults.py",
    "tests/emulator/test_races.py::test_a_",
    "tests/emulator/test_races.py::test_the_report",
)
# Few launches that together reach every barrier of the kernels: they run first.
COVERING = "tests/emulator/test_races.py::test_kernels_have_no_data_race"
# Where the tests of a room are; those that run it in a process of its own are not recorded as reaching it.
ROOMS = {"cupy_msda/cli/": "tests/cli/", "cupy_msda/torch/": "tests/with_torch/", "cupy_msda/__main__.py": "tests/cli/"}
# The compilation of one emulated kernel. With a mutant in it, none is in the cache.
SECONDS_PER_KERNEL = 0.8
LINE_OF_CODE = re.compile(r"^<stdin>\s+(\d+)\s", re.MULTILINE)
ORIGIN = re.compile(r"//@([\w/.]+):(\d+)$")


class Reached:
    """The tests of each line, with the seconds that each takes with a mutant in that line."""

    def __init__(self, folder: Path) -> None:
        self.seconds: dict[str, float] = {}
        self.tests: dict[str, dict[int, set[str]]] = defaultdict(lambda: defaultdict(set))
        self.kernels: dict[str, dict[str, tuple[str, int]]] = {}
        # The emulator's builds that have code for a line.
        self.builds: dict[str, dict[int, set[str]]] = defaultdict(lambda: defaultdict(set))
        for file in folder.glob("*.json"):
            found = json.loads(file.read_text())
            for test, seconds in found["seconds"].items():  # a machine that is busy takes longer
                self.seconds[test] = min(seconds, self.seconds.get(test, seconds))
            self.kernels |= found["kernels"]
        for file in folder.glob("*.lines"):
            self._read_python(file)
        self._read_kernels()

    def keep(self, tests: set[str]) -> None:
        """Forget tests that are no longer there."""
        self.seconds = {test: seconds for test, seconds in self.seconds.items() if test in tests}
        for lines in self.tests.values():
            for line in lines:
                lines[line] &= tests

    def _read_python(self, file: Path) -> None:
        data = coverage.CoverageData(str(file))
        data.read()
        for path in data.measured_files():
            lines = self.tests[path[path.index("cupy_msda/") :]]
            for line, contexts in data.contexts_by_lineno(path).items():
                lines[line] |= {context for context in contexts if context}

    def _read_kernels(self) -> None:
        origins = {}
        lines = {}
        for test, built in self.kernels.items():
            if test.startswith(QUOTING):
                continue
            for target, (kernel, prelude) in built.items():
                if kernel not in origins:
                    origins[kernel] = _origins(kernel)
                if target not in lines:
                    lines[target] = _lines_of_code(target)
                for line in lines[target]:
                    at = line - prelude - 2  # the header, and the first line is number 1
                    if 0 <= at < len(origins[kernel]) and origins[kernel][at]:
                        file, number = origins[kernel][at]
                        self.tests[f"cuda_src/{file}"][number].add(test)
                        self.builds[f"cuda_src/{file}"][number].add(target)

    def of(self, mutant: Mutant) -> list[str]:
        """Tests that reach the line, or the nearest lines that have code; then the others of its room."""
        lines = self._lines(mutant)
        first = set().union(*(self.tests[mutant.file][line] for line in lines))
        rooms = tuple(tests for room, tests in ROOMS.items() if mutant.file.startswith(room))
        rest = {test for test in self.seconds if rooms and test.startswith(rooms)} - first
        return [
            *(self._by_builds(mutant, first, lines) if mutant.is_cuda else self._by_functions(mutant, first)),
            *sorted(rest, key=lambda test: self.cost(mutant, test)),
        ]

    def _lines(self, mutant: Mutant) -> list[int]:
        known = {line for line, tests in self.tests.get(mutant.file, {}).items() if tests}
        for distance in (0, 6, 10**9):
            if found := [line for line in known if abs(line - mutant.line) <= distance]:
                return found
        return []

    def _by_builds(self, mutant: Mutant, tests: set[str], lines: list[int]) -> list[str]:
        """The covering set; then, each time, the test that runs the most new builds of these lines in its time."""
        all_builds = set().union(*(self.builds[mutant.file][line] for line in lines))
        builds = {test: all_builds & self.kernels[test].keys() for test in tests}
        of_file = set().union(*self.tests[mutant.file].values())
        found = sorted((t for t in of_file if t.startswith(COVERING)), key=lambda test: self.cost(mutant, test))
        left = tests - set(found)
        seen = set().union(*(builds.get(test, set()) for test in found))
        while left:
            gains = {test: (len(builds[test] - seen) + 0.01) / (1 + self.cost(mutant, test)) for test in left}
            best = max(sorted(left), key=gains.__getitem__)
            found.append(best)
            left.remove(best)
            seen |= builds[best]
        return found

    def _by_functions(self, mutant: Mutant, tests: set[str]) -> list[str]:
        """The shortest test of each function, then the second of each, and so on."""
        of_function, found = defaultdict(list), []
        for test in sorted(tests, key=lambda test: self.cost(mutant, test)):
            of_function[test.partition("[")[0]].append(test)
        for turn in range(max(map(len, of_function.values()), default=0)):
            found += [tests[turn] for tests in of_function.values() if turn < len(tests)]
        return found

    def cost(self, mutant: Mutant, test: str) -> float:
        """Expected seconds of a test."""
        compiled = len(self.kernels.get(test, ())) if mutant.is_cuda else 0
        return self.seconds.get(test, 1.0) + SECONDS_PER_KERNEL * compiled


def _origins(kernel: str) -> list[tuple[str, int] | None]:
    """File and line of each line of a kernel's text."""

    class Folder:
        """cuda_src, with the origin behind each line."""

        def __truediv__(self, name: str) -> SimpleNamespace:
            lines = (ROOT / "cuda_src" / name).read_text().split("\n")
            marked = (line if line.endswith("\\") else f"{line} //@{name}:{i}" for i, line in enumerate(lines, 1))
            return SimpleNamespace(read_text=lambda: "\n".join(marked))

    found = []
    for line in kernels.source_in(Folder(), kernel).split("\n"):
        origin = ORIGIN.search(line)
        found.append((origin[1], int(origin[2])) if origin else None)
    return found


def _lines_of_code(target: str) -> set[int]:
    if not Path(target).exists():
        return set()
    command = ["objdump", "--dwarf=decodedline", target]
    return set(map(int, LINE_OF_CODE.findall(subprocess.run(command, capture_output=True, text=True).stdout)))


def within(tests: Iterable[str], seconds: float, cost) -> list[str]:
    """The first tests that take no longer than this together, one at least."""
    chosen, spent = [], 0.0
    for test in tests:
        if chosen and spent + cost(test) > seconds:
            continue
        chosen.append(test)
        spent += cost(test)
    return chosen
