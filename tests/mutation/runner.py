"""Runs the tests on mutants: each worker has a copy of the project and one mutant in it at a time."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

from tests.helpers import emulator

from .mutant import ROOT, Mutant
from .reached import Reached, within

# The tests that are run on a mutant, by their expected seconds: first those that reach it best, then others that do. A
# run that takes so many times as long counts as one that does not end.
SECONDS, MORE_SECONDS = 40.0, 120.0
HANGS_AFTER = 3.0
START_SECONDS = 30.0
PYTEST = [sys.executable, "-m", "pytest", "-q", "-n", "0", "-p", "no:cacheprovider"]
# The compiler's word for what is no program.
NO_PROGRAM = re.compile(r"RuntimeError: <stdin>.*?error: ", re.DOTALL)


@dataclass(frozen=True)
class Outcome:
    """How the tests of a mutant ended: "killed", "survived", or "invalid" where it does not compile."""

    status: str
    by: str
    tests: int = 0
    seconds: float = 0.0


class Worker:
    """A copy of the project in which mutants are planted."""

    def __init__(self, folder: Path) -> None:
        self.root, self.temporary = folder / "project", folder / "tmp"
        self.builds = self.temporary / emulator.CACHE.name
        shutil.rmtree(folder, ignore_errors=True)
        self.builds.mkdir(parents=True)
        listed = ["git", "ls-files", "-co", "--exclude-standard", "-z"]
        for name in subprocess.run(listed, cwd=ROOT, capture_output=True, check=True, text=True).stdout.split("\0"):
            if name and (ROOT / name).is_file():
                (self.root / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(ROOT / name, self.root / name)
        self.kept: set[str] = set()
        for file in emulator.CACHE.iterdir() if emulator.CACHE.is_dir() else ():
            os.link(file, self.builds / file.name)
            self.kept.add(file.name)

    def run(self, mutant: Mutant, reached: Reached) -> Outcome:
        """Plant the mutant, run its tests until one fails, and take it out."""

        def cost(test: str) -> float:
            return reached.cost(mutant, test)

        tests = reached.of(mutant)
        first = within(tests, SECONDS, cost)
        others = within([test for test in tests if test not in set(first)], MORE_SECONDS, cost)
        path = self.root / mutant.file
        text = path.read_text()
        begin, ran = time.monotonic(), 0
        outcome = Outcome("survived", "no test reaches it")
        try:
            self._write(path, mutant.applied(text))
            for part in filter(None, (first, others)):
                ran += len(part)
                outcome = self._outcome(part, sum(map(cost, part)))
                if outcome.status != "survived":
                    break
        finally:
            self._write(path, text)
            self._forget_kernels()
        # Python compiles every mutant: where the text of a kernel does not compile, its Python code was wrong.
        if outcome.status == "invalid" and not mutant.is_cuda:
            outcome = replace(outcome, status="killed")
        return replace(outcome, tests=ran, seconds=round(time.monotonic() - begin, 1))

    def collected(self) -> set[str]:
        """All tests, without any mutant."""
        command = [*PYTEST, "--collect-only", "tests"]
        listed = subprocess.run(command, cwd=self.root, env=self._environment(), capture_output=True, text=True)
        return {line for line in listed.stdout.splitlines() if "::" in line}

    def _environment(self) -> dict[str, str]:
        mine = {"PYTHONPATH": str(self.root), "TMPDIR": str(self.temporary), "OMP_NUM_THREADS": "1"}
        return {name: value for name, value in os.environ.items() if name != "CUPY_MSDA_REACHED"} | mine

    def _write(self, path: Path, text: str) -> None:
        path.write_text(text)
        for compiled in path.parent.glob(f"__pycache__/{path.stem}.*"):
            compiled.unlink()

    def _outcome(self, tests: list[str], expected: float) -> Outcome:
        listed = self.temporary / "tests.txt"
        listed.write_text("\n".join(tests))
        process = subprocess.Popen(
            [*PYTEST, "-x", "--tb=short", f"@{listed}"],
            cwd=self.root,
            env=self._environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        try:
            output, _ = process.communicate(timeout=START_SECONDS + HANGS_AFTER * expected)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
            return Outcome("killed", "does not end")
        if process.returncode == 0:
            return Outcome("survived", "")
        if NO_PROGRAM.search(output):
            return Outcome("invalid", "does not compile")
        failed = re.search(r"^(FAILED|ERROR) (.+?)( - .*)?$", output, re.MULTILINE)
        return Outcome("killed", failed[2] if failed else f"exit status {process.returncode}")

    def _forget_kernels(self) -> None:
        for file in self.builds.iterdir():
            if file.name not in self.kept:
                file.unlink()
