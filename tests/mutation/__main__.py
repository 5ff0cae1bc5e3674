"""python -m tests.mutation --seed N --count K: how many drawn changes of the sources the tests find.

Half of the mutants are of the CUDA sources, run in the emulator, and half of the Python sources. A change that compiles
to the same code is not counted, nor is a survivor whose verdict in the report, which is written by hand, begins with
"neutral": after it every result and every launch is still right.
The report says which test killed each mutant and which survive. "@" is the place in the file; what is "invalid" does
not compile. The same command goes on where it was stopped. To run a mutant again, delete its entry of the report.

Which tests reach a line is recorded by one run of all tests, `--record`, which takes twice as long as the tests.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from benchmarks.provenance import provenance

from . import cuda_operators, python_operators
from .equivalence import is_equivalent
from .mutant import ROOT, Mutant, draw
from .reached import Reached
from .report import Report
from .runner import Worker

HOME = Path(tempfile.gettempdir()) / f"cupy_msda_mutation_{os.getuid()}"
LANGUAGES = {"cuda": ("cuda_src", "*.cu*", cuda_operators), "python": ("cupy_msda", "*.py", python_operators)}


def changed_lines(revision: str) -> dict[str, set[int]]:
    """Lines of each file that differ from a revision of git."""
    command = ["git", "diff", "--unified=0", revision, "--", *(folder for folder, *_ in LANGUAGES.values())]
    text = subprocess.run(command, cwd=ROOT, capture_output=True, check=True, text=True).stdout
    found: dict[str, set[int]] = {}
    for line in text.splitlines():
        if line.startswith("+++ b/"):
            lines = found.setdefault(line.removeprefix("+++ b/"), set())
        elif hunk := re.match(r"@@ -\S+ \+(\d+)(?:,(\d+))? @@", line):
            first, count = int(hunk[1]), int(hunk[2] or 1)
            lines.update(range(first, first + count))
    return found


def drawn(language: str, seed: int, revision: str | None) -> list[Mutant]:
    """All mutants of a language in a drawn order; with a revision those of lines that differ from it."""
    folder, pattern, operators = LANGUAGES[language]
    # What config.cuh says is for readers: the prelude of a specialisation takes its place.
    files = [path for path in sorted((ROOT / folder).rglob(pattern)) if path.name != "config.cuh"]
    found = [m for file in files for m in operators.mutants_of(str(file.relative_to(ROOT)), file.read_text())]
    if revision is not None:
        changed = changed_lines(revision)
        found = [mutant for mutant in found if mutant.line in changed.get(mutant.file, ())]
    return draw(found, seed)


def record(reached: Path) -> None:
    """Run all tests and write what each reaches."""
    reached.mkdir(parents=True, exist_ok=True)
    for old in reached.iterdir():
        old.unlink()
    command = [sys.executable, "-m", "pytest", "-q", "-n", str(os.cpu_count()), "--dist", "loadfile"]
    command += ["-p", "tests.mutation.recorder", "-p", "no:cacheprovider"]
    environment = {"PYTHONPATH": str(ROOT), "CUPY_MSDA_REACHED": str(reached), "OMP_NUM_THREADS": "1"}
    subprocess.run([*command, "tests"], cwd=ROOT, env=os.environ | environment, check=True)


def run(
    language: str, mutants: list[Mutant], count: int, report: Report, reached: Reached, workers: list[Worker]
) -> None:
    """Run drawn mutants until `count` of them have been killed or have survived."""
    waiting = (mutant for mutant in mutants if not report.has(mutant))
    lock, running = threading.Lock(), set()

    def work(worker: Worker) -> None:
        while True:
            with lock:
                enough = report.counted(language) + len(running) >= count
                mutant = None if enough else next(waiting, None)
                if mutant is None:
                    return
                running.add(mutant)
            outcome = worker.run(mutant, reached)
            equivalent = outcome.status == "survived" and is_equivalent(mutant)
            with lock:
                running.remove(mutant)
                report.add(language, mutant, outcome, equivalent)

    with ThreadPoolExecutor(len(workers)) as pool:
        list(pool.map(work, workers))


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.mutation", description=__doc__)
    parser.add_argument("--seed", type=int, help="of the draw")
    parser.add_argument("--count", type=int, default=100, help="mutants; default 100")
    parser.add_argument("--languages", nargs="+", choices=LANGUAGES, default=list(LANGUAGES))
    parser.add_argument("--changed", metavar="REVISION", help="draw lines that differ from this revision of git alone")
    parser.add_argument("--out", type=Path, help="the report, a JSON file that is completed where it exists")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="copies of the project; default: the cores")
    parser.add_argument("--record", action="store_true", help="record which tests reach which line, and end")
    parser.add_argument("--reached", type=Path, default=HOME / "reached", help="folder of that record")
    options = parser.parse_args(arguments)
    if options.record:
        record(options.reached)
        return 0
    if options.seed is None:
        parser.error("expected --seed N, or --record")
    if not options.reached.is_dir():
        parser.error(f"{options.reached} has no record of what the tests reach: run with --record first")
    report = Report(options.out or HOME / f"mutation_{options.seed}.json", options.seed, provenance("cpu"))
    workers = [Worker(HOME / f"worker{number}") for number in range(options.workers)]
    reached = Reached(options.reached)
    reached.keep(workers[0].collected())
    for language in options.languages:
        mutants = drawn(language, options.seed, options.changed)
        run(language, mutants, options.count // len(options.languages), report, reached, workers)
    print("\n".join(report.lines()))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
