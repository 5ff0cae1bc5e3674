"""python -m tests.gpu --out FOLDER: all GPU tests of this machine in parallel, as a JSON record.

Workers share the GPU and CuPy's disk cache, so that kernels compile in parallel. Tests marked `exclusive` follow in one
process. `--sanitizer` repeats the tests marked `sanitizer` under tools of compute-sanitizer. `--tests` names files, to
run no others.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import subprocess
import sys
import threading
import time
import xml.etree.ElementTree
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.provenance import provenance

ROOT = Path(__file__).parent.parent
TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
# What a worker may hold: the contexts of torch, CuPy and JAX and the largest test that is not exclusive.
WORKER_BYTES = 4 << 30
# The workers fill the cores, so each of them computes in one thread.
ONE_THREAD = dict.fromkeys(
    (
        "OMP_NUM_THREADS",
        "MKL_NUM_THREADS",
        "OPENBLAS_NUM_THREADS",
        "CUPY_MSDA_NUM_THREADS",
        "TORCHINDUCTOR_COMPILE_THREADS",
    ),
    "1",
)
# Each array has its own allocation: inside a pool the sanitizer cannot tell an array from its neighbour.
EXACT_ALLOCATIONS = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "CUPY_MSDA_TEST_EXACT_ALLOCATIONS": "1"}
SUMMARY = re.compile(r"=====.* (\d+ (passed|failed|skipped|errors?)\b|(ERROR|RACECHECK) SUMMARY)")


@dataclass(frozen=True)
class Test:
    """A collected GPU test: its node id, whether it must run without others, and the processes of its file."""

    __test__ = False

    node: str
    exclusive: bool = False
    processes: int = 1

    @property
    def file(self) -> str:
        return self.node.partition("::")[0]


@dataclass(frozen=True)
class Check:
    """One command. `junit` is the file to which it writes the outcomes of its tests, if it does."""

    name: str
    command: list[str]
    environment: Mapping[str, str] = field(default_factory=dict)
    junit: Path | None = None


class _Collector:
    """A pytest plugin that keeps what was collected."""

    def __init__(self) -> None:
        self.tests: list[Test] = []

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        self.tests = [_described(item) for item in session.items]


def _described(item: pytest.Item) -> Test:
    processes = item.get_closest_marker("processes")
    exclusive = item.get_closest_marker("exclusive") is not None
    return Test(item.nodeid, exclusive, processes.args[0] if processes else 1)


def collect(paths: Iterable[str], *arguments: str) -> list[Test]:
    """The GPU tests of these files, by their markers and parameters; `arguments` are pytest's."""
    collector = _Collector()
    command = ["--collect-only", "-qq", "--no-summary", "-p", "no:cacheprovider", "-m", "gpu"]
    with contextlib.redirect_stdout(sys.stderr):
        status = pytest.main([*command, *arguments, *paths], plugins=[collector])
    if status != pytest.ExitCode.OK:
        raise SystemExit(f"tests.gpu: the tests cannot be collected (pytest: {status})")
    return collector.tests


def files(tests: Iterable[Test], exclusive: bool) -> list[str]:
    """Files of the tests that share the GPU, or of the exclusive ones."""
    return list(dict.fromkeys(test.file for test in tests if test.exclusive == exclusive))


def slices(tests: Iterable[Test], exclusive: bool) -> dict[str, int]:
    """Processes of each of these files under a sanitizer: no more than the file has tests."""
    found: dict[str, list[int]] = {}
    for test in tests:
        if test.exclusive == exclusive:
            found.setdefault(test.file, []).append(test.processes)
    return {file: min(len(asked), max(asked)) for file, asked in found.items()}


def worker_count() -> int:
    """A worker per core, as many as the free memory of the GPU holds."""
    cores = len(os.sched_getaffinity(0))
    command = ["nvidia-smi", "--query-gpu=memory.free", "--format=csv,noheader,nounits", "--id=0"]
    try:
        free = int(subprocess.run(command, capture_output=True, text=True, check=True).stdout) << 20
    except (OSError, ValueError, subprocess.CalledProcessError):
        return cores
    return max(1, min(cores, free // WORKER_BYTES))


def _pytest(markers: str, *arguments: str) -> list[str]:
    return [sys.executable, "-m", "pytest", "--color=no", "-p", "no:cacheprovider", "-m", markers, *arguments]


def plain_checks(tests: list[Test], workers: int, out: Path) -> Iterator[Check]:
    """Two commands that come one after the other: tests that share the GPU, and exclusive ones."""
    if shared := files(tests, exclusive=False):
        junit = out / "shared.xml"
        # A worker begins with neighbouring tests, which share kernels; an idle worker takes tests from a busy one.
        parallel = ["-v", "-n", str(workers), "--dist", "worksteal", f"--junitxml={junit}"]
        yield Check("shared", _pytest("gpu and not exclusive", *parallel, *shared), ONE_THREAD, junit)
    if exclusive := files(tests, exclusive=True):
        junit = out / "exclusive.xml"
        yield Check("exclusive", _pytest("gpu and exclusive", f"--junitxml={junit}", *exclusive), {}, junit)


def sanitizer_checks(tool: str, tests: list[Test], exclusive: bool) -> Iterator[Check]:
    """One command per file, or more where it is marked `processes`, each in a process of its own under `tool`."""
    sanitizer = ["compute-sanitizer", f"--tool={tool}", "--error-exitcode=9"]
    if tool != "initcheck":  # which must see what the kernels of others write
        sanitizer += ["--kernel-name", "kernel_substring=msda_"]
    markers = "gpu and exclusive" if exclusive else "gpu and not exclusive"
    for file, count in slices(tests, exclusive).items():
        for number in range(1, count + 1):
            part = [] if count == 1 else [f"--slice={number}/{count}"]
            command = [*sanitizer, *_pytest(markers, f"--sanitizer={tool}", *part, file)]
            name = ", ".join([tool, file, *part, *(["exclusive"] if exclusive else [])])
            yield Check(name, command, EXACT_ALLOCATIONS | ONE_THREAD)


def run_check(check: Check, out: Path, timeout: float | None) -> dict[str, Any]:
    """Run the command, keep its output as a log, and describe its end. After a timeout the exit status is None."""
    log = out / f"{re.sub('[^a-z0-9_]+', '_', check.name)}.txt"
    begin, status = time.monotonic(), None
    with log.open("w") as output, contextlib.suppress(subprocess.TimeoutExpired):
        status = subprocess.run(
            check.command,
            stdout=output,
            stderr=subprocess.STDOUT,
            cwd=ROOT,
            env=os.environ | check.environment,
            timeout=timeout,
        ).returncode
    seconds = time.monotonic() - begin
    summary = [line for line in log.read_text().splitlines() if SUMMARY.match(line)]
    ended = "timed out" if status is None else f"exit {status}"
    print(f"{check.name}: {ended} after {seconds:.0f} s: {'; '.join(summary)}", flush=True)
    return {"check": check.name, "exit": status, "seconds": round(seconds, 1), "summary": summary}


def read_junit(path: Path) -> list[dict[str, Any]]:
    """Test, room, outcome and seconds of each test of a JUnit file."""
    found = []
    for case in xml.etree.ElementTree.parse(path).iter("testcase"):
        module = case.get("classname", "")
        kinds = {child.tag for child in case}
        outcome = "failed" if kinds & {"failure", "error"} else "skipped" if "skipped" in kinds else "passed"
        room = module.split(".")[1] if module.count(".") > 1 else module
        test = f"{module.replace('.', '/')}.py::{case.get('name')}"
        found.append({"test": test, "room": room, "outcome": outcome, "seconds": float(case.get("time", 0))})
    return found


def describe(outcomes: list[dict[str, Any]]) -> dict[str, Any]:
    """Counts and seconds by room, what failed, and the slowest tests."""
    rooms: dict[str, dict[str, float]] = {}
    for one in outcomes:
        room = rooms.setdefault(one["room"], {"passed": 0, "failed": 0, "skipped": 0, "seconds": 0.0})
        room[one["outcome"]] += 1
        room["seconds"] = round(room["seconds"] + one["seconds"], 1)
    slowest = sorted(outcomes, key=lambda one: -one["seconds"])[:15]
    return {
        "rooms": rooms,
        "failed": [one["test"] for one in outcomes if one["outcome"] == "failed"],
        "slowest": {one["test"]: round(one["seconds"], 1) for one in slowest},
    }


class Record:
    """The JSON file. It is rewritten after each command, so results survive if the machine is lost."""

    def __init__(self, path: Path, workers: int, begin: float) -> None:
        self.path, self.begin, self.lock = path, begin, threading.Lock()
        self.outcomes: list[dict[str, Any]] = []
        self.content: dict[str, Any] = {"provenance": provenance("cuda"), "workers": workers, "checks": []}

    def add(self, check: Check, ended: dict[str, Any]) -> None:
        with self.lock:
            if check.junit and check.junit.exists():
                self.outcomes += read_junit(check.junit)
            self.content["checks"].append(ended)
            self.content |= describe(self.outcomes) | {"seconds": round(time.monotonic() - self.begin, 1)}
            self.path.write_text(json.dumps(self.content, indent=1) + "\n")

    def complete(self, planned: int) -> bool:
        """Whether every planned test has an outcome and every command ended well."""
        self.content["planned"] = planned
        self.path.write_text(json.dumps(self.content, indent=1) + "\n")
        return len(self.outcomes) == planned and all(check["exit"] == 0 for check in self.content["checks"])


def has_gpu() -> bool:
    """Whether there is a GPU to test on."""
    return torch.cuda.is_available()


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.gpu", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder for gpu_tests.json and the logs")
    parser.add_argument("--workers", type=int, help="processes that share the GPU; default: by cores and memory")
    parser.add_argument("--sanitizer", nargs="*", choices=TOOLS, default=[], help="tools of compute-sanitizer")
    parser.add_argument("--tests", nargs="+", default=[str(ROOT / "tests")], help="files or folders; default: all")
    parser.add_argument("--timeout", type=float, default=300, help="seconds after which a command is given up")
    parser.add_argument("--dry-run", action="store_true", help="print the commands and the number of their tests")
    options = parser.parse_args(arguments)
    if not options.dry_run and not has_gpu():
        parser.error("expected an NVIDIA GPU and a torch for CUDA, got none: python -m cupy_msda info says more")
    out, workers = options.out.resolve(), options.workers or worker_count()
    begin = time.monotonic()
    tests = collect(options.tests)
    plain = list(plain_checks(tests, workers, out))
    sanitized = {tool: collect(options.tests, f"--sanitizer={tool}") for tool in options.sanitizer}
    parallel = [check for tool, chosen in sanitized.items() for check in sanitizer_checks(tool, chosen, False)]
    exclusive = [check for tool, chosen in sanitized.items() for check in sanitizer_checks(tool, chosen, True)]
    counts = {"GPU tests": len(tests), "exclusive": sum(test.exclusive for test in tests)}
    counts |= {tool: len(chosen) for tool, chosen in sanitized.items()}
    print(", ".join(f"{name}: {count}" for name, count in counts.items()), flush=True)
    if options.dry_run:
        for check in (*plain, *parallel, *exclusive):
            print(f"{check.name}: {' '.join(check.command)}")
        return 0

    out.mkdir(parents=True, exist_ok=True)
    for junit in out.glob("*.xml"):
        junit.unlink()
    record = Record(out / "gpu_tests.json", workers, begin)

    def run(check: Check) -> None:
        record.add(check, run_check(check, out, options.timeout))

    for check in plain:
        run(check)
    with ThreadPoolExecutor(workers) as pool:
        list(pool.map(run, parallel))
    for check in exclusive:
        run(check)
    complete = record.complete(len(tests))
    print(json.dumps({name: record.content[name] for name in ("seconds", "rooms", "failed", "slowest")}, indent=1))
    return 0 if complete else 1


if __name__ == "__main__":
    raise SystemExit(main())
