"""Many drawn calls in several processes, counted into a JSON record that a second run completes."""

from __future__ import annotations

import itertools
import json
import multiprocessing
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from .compare import Failure, Outcome, compare
from .draw import Case, draw

# Calls of one task: few enough for a record that is nearly complete when a run is interrupted.
CHUNK = 250
# Seeds that a record names per kind of failure.
NAMED_SEEDS = 20


class Count:
    """What happened to many calls: plain data that adds up."""

    def __init__(self, data: dict[str, Any] | None = None) -> None:
        self.data: dict[str, Any] = data or {
            "cases": 0,
            "failing": 0,
            "paths": {},
            "pairs": {},
            "features": {},
            "failures": {},
        }

    def add(self, case: Case, outcomes: dict[str, Outcome], failures: Sequence[Failure]) -> None:
        """One call."""
        self.data["cases"] += 1
        self.data["failing"] += bool(failures)
        _increment(self.data["features"], case.features())
        for path, outcome in outcomes.items():
            names = [*(f"{result} compared" for result in outcome.results), *(["refused"] if outcome.error else [])]
            _increment(self.data["paths"].setdefault(path, {}), ["calls", *names])
        for (one, left), (other, right) in itertools.combinations(outcomes.items(), 2):
            both = len(left.results.keys() & right.results.keys())
            _increment(self.data["pairs"], [f"{one}, {other}: results compared"] * both)
        for failure in failures:
            kind = key_of(failure)
            one = self.data["failures"].setdefault(kind, {"cases": 0, "seeds": [], "example": str(failure)})
            if case.seed not in one["seeds"]:
                one["cases"] += 1
                one["seeds"] = [*one["seeds"], case.seed][:NAMED_SEEDS]

    def merge(self, other: dict[str, Any]) -> None:
        """Those of another process."""
        for name in ("cases", "failing"):
            self.data[name] += other[name]
        if "kernels" in other:
            self.data["kernels"] = sorted({*self.data.get("kernels", ()), *other["kernels"]})
            self.data["slowest_call"] = max(self.data.get("slowest_call", 0), other["slowest_call"])
        for counts in ("features", "pairs"):
            for name, number in other[counts].items():
                self.data[counts][name] = self.data[counts].get(name, 0) + number
        for path, counts in other["paths"].items():
            mine = self.data["paths"].setdefault(path, {})
            for name, number in counts.items():
                mine[name] = mine.get(name, 0) + number
        for kind, one in other["failures"].items():
            mine = self.data["failures"].setdefault(kind, {"cases": 0, "seeds": [], "example": one["example"]})
            mine["cases"] += one["cases"]
            mine["seeds"] = sorted({*mine["seeds"], *one["seeds"]})[:NAMED_SEEDS]


def _increment(counts: dict[str, int], names: Sequence[str]) -> None:
    for name, number in Counter(names).items():
        counts[name] = counts.get(name, 0) + number


def key_of(failure: Failure) -> str:
    """Failures that look alike, as one line."""
    what = failure.detail[:60] if failure.kind in ("error", "property", "refusal") else failure.detail.split(" at ")[0]
    return f"{failure.kind} [{failure.paths}] {failure.result}: {what}"


def check(case: Case, paths: Sequence[str]) -> tuple[dict[str, Outcome], list[Failure]]:
    """The outcomes of one call, and how they break the contract."""
    from .expected import expected
    from .paths import run_paths

    outcomes = run_paths(case, paths)
    return outcomes, compare(case, outcomes, None if case.invalid else expected(case))


def run_chunk(first: int, count: int, paths: Sequence[str]) -> dict[str, Any]:
    """The counts of the calls of these seeds."""
    found = Count()
    for seed in range(first, first + count):
        case = draw(seed)
        found.add(case, *check(case, paths))
    return found.data


def _one_thread() -> None:
    """Processes fill the cores, so each of them computes in one thread."""
    import torch

    torch.set_num_threads(1)
    os.environ["CUPY_MSDA_NUM_THREADS"] = "1"


class Record:
    """The JSON file of a run. It is rewritten after each task, and a run of the same command completes it."""

    def __init__(self, path: Path | None, header: dict[str, Any], provenance: Callable[[], dict[str, Any]]) -> None:
        self.path, self.begin = path, time.monotonic()
        self.content: dict[str, Any] = {"provenance": provenance()} | header | {"seconds": 0.0, "done": []}
        self.count = Count()
        if path and path.exists():
            before = json.loads(path.read_text())
            if {name: before.get(name) for name in header} == json.loads(json.dumps(header)):
                before.setdefault("done", [])
                self.content = before
                counted = (*self.count.data, "kernels", "slowest_call")
                self.count = Count({name: before[name] for name in counted if name in before})
        self.before = self.content["seconds"]

    def add(self, task: Any, counts: dict[str, Any]) -> None:
        """The counts of one task, after which the file is written."""
        self.count.merge(counts)
        self.content["done"] = sorted([*self.content["done"], task])
        self.write()

    def complete(self) -> None:
        """Every task is done: the record needs no names of them any more."""
        if "kernels" in self.count.data:
            self.count.data["kernels"] = len(self.count.data["kernels"])
        self.content.pop("done")
        self.content["complete"] = True
        self.write()

    def write(self) -> None:
        failures = dict(sorted(self.count.data["failures"].items(), key=lambda entry: -entry[1]["cases"]))
        features = dict(sorted(self.count.data["features"].items()))
        self.content["seconds"] = round(self.before + time.monotonic() - self.begin, 1)
        self.content |= self.count.data | {"failures": failures, "features": features}
        if self.path:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            temporary = self.path.with_suffix(".partial")
            temporary.write_text(json.dumps(self.content, indent=1) + "\n")
            temporary.replace(self.path)


def run_tasks(
    record: Record, tasks: Sequence[Any], work: Callable[..., dict[str, Any] | None], workers: int, *shared: Any
) -> None:
    """``work(*task, *shared)`` for all tasks that the record does not have yet, in processes."""
    if record.content.get("complete"):
        return
    waiting = [task for task in tasks if task[0] not in record.content["done"]]
    for number, (task, counts) in enumerate(_in_processes(waiting, work, workers, shared), start=1):
        if counts is None:  # left for another run
            continue
        record.add(task[0], counts)
        failing = record.count.data["failing"]
        if number % max(1, len(waiting) // 20) == 0:
            print(f"{record.count.data['cases']} calls, {failing} wrong", flush=True)
    if len(record.content["done"]) == len(tasks):
        record.complete()


def _in_processes(
    tasks: Sequence[Any], work: Callable[..., dict[str, Any] | None], workers: int, shared: tuple[Any, ...]
) -> Iterator[tuple[Any, dict[str, Any] | None]]:
    if workers <= 1:
        for task in tasks:
            yield task, work(*task, *shared)
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context, initializer=_one_thread) as pool:
        running = {pool.submit(work, *task, *shared): task for task in tasks}
        for ended in as_completed(running):
            yield running[ended], ended.result()


def chunks(seed: int, cases: int, size: int = CHUNK) -> list[tuple[int, int]]:
    """(first seed, number of calls) of each task."""
    return [(first, min(size, seed + cases - first)) for first in range(seed, seed + cases, size)]
