"""python -m benchmarks.checks: the tests on this machine's GPU, plain and under compute-sanitizer, as a JSON record.

Files run side by side, each in a process of its own, those that need much memory after the others.
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
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from .provenance import provenance

ROOT = Path(__file__).parent.parent
TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
# The files whose tests reach every kernel.
SANITIZED = (
    "test_operator.py",
    "test_gpu.py",
    "test_deterministic.py",
    "test_layouts.py",
    "test_query_lengths.py",
    "test_torch.py",
    "test_torch_cuda.py",
    "test_front_end.py",
    "test_torch_front_end.py",
)
# Those whose tests reach the GPU at all; the others say nothing more there than on any machine.
ON_THE_GPU = (
    *SANITIZED,
    "test_torch_variants.py",
    "test_torch_operator.py",
    "test_torch_modules.py",
    "test_random_problems.py",
    "test_golden.py",
    "test_errors.py",
    "test_interop.py",
    "test_readme.py",
    "test_cli.py::test_demo_on_the_gpu",
)
# Files that need most of a GPU's memory: after the others, one by one.
ALONE = ("test_gpu.py",)
# Every array in an allocation of its own: inside a pool the sanitizer takes a neighbour's bytes for ours.
EXACT_ALLOCATIONS = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "CUPY_MSDA_TEST_EXACT_ALLOCATIONS": "1"}


def run(name: str, command: list[str], environment: dict[str, str], log: Path, timeout: float | None) -> dict[str, Any]:
    """Run `command`, keep its output in `log`, and return what it said last; without an exit where it took too long."""
    exit_status: int | None = None
    with log.open("w") as output, contextlib.suppress(subprocess.TimeoutExpired):
        exit_status = subprocess.run(
            command, stdout=output, stderr=subprocess.STDOUT, cwd=ROOT, env=os.environ | environment, timeout=timeout
        ).returncode
    lines = [line for line in log.read_text().splitlines() if line.strip()]
    words = (" passed", " failed", "ERROR SUMMARY", "RACECHECK SUMMARY")
    summaries = [line for line in lines if any(word in line for word in words)]
    ended = "ran out of time" if exit_status is None else f"exit {exit_status}"
    print(f"{name}: {ended}: {'; '.join(summaries)}", flush=True)
    return {"check": name, "command": command[command.index("-m") :], "exit": exit_status, "summary": summaries}


def commands(sanitizers: list[str]) -> Iterator[tuple[str, list[str], dict[str, str]]]:
    """Name, command and environment of every check."""
    tests = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    for file in ON_THE_GPU:
        # Compiling for this machine's CPU says nothing about its GPU, and takes a minute.
        chosen = ["-k", "not cpu"] if file == "test_torch_operator.py" else []
        yield f"tests, {file}", [*tests, *chosen, f"tests/{file}"], {}
    # Without JAX: instrumenting its kernels takes longer than all the rest. Without what needs torch's allocator: CUDA
    # graphs and peak memory.
    suite = [*tests, "-k", "not jax and not graph and not capture and not float32_copies and not fifty and not bounded"]
    for tool in sanitizers:
        # Our kernels only; but initcheck must also see what others write. There the largest test would take minutes,
        # and the tool itself synchronises.
        sanitizer = ["compute-sanitizer", f"--tool={tool}", "--error-exitcode=9"]
        left_out = []
        if tool == "initcheck":
            for name in (
                "test_gpu.py::test_more_than_2_31_elements",
                "test_gpu.py::test_nothing_synchronises",
                "test_torch_cuda.py::test_nothing_synchronises",
            ):
                left_out += ["--deselect", f"tests/{name}"]
        else:
            if tool == "racecheck":
                # Threads that launch at once: every other run ends in the tool's own "Internal Sanitizer Error: failure
                # to track a kernel launch", with no hazard reported. Memcheck runs it.
                left_out += ["--deselect", "tests/test_torch_cuda.py::test_threads_on_streams_of_their_own"]
            sanitizer += ["--kernel-name", "kernel_substring=msda_"]
        for file in SANITIZED:
            yield f"{tool}, {file}", [*sanitizer, *suite, *left_out, f"tests/{file}"], EXACT_ALLOCATIONS


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.checks", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder for checks.json and the logs")
    parser.add_argument("--sanitizer", nargs="*", choices=TOOLS, default=[], help="tools of compute-sanitizer")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="files that run at the same time")
    parser.add_argument("--timeout", type=float, help="seconds after which a file is given up")
    options = parser.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)

    every = list(commands(options.sanitizer))
    alone = [described for described in every if described[0].endswith(ALONE)]
    described_by = provenance("cuda")
    records: dict[str, dict[str, Any]] = {}
    lock = threading.Lock()

    def check(described: tuple[str, list[str], dict[str, str]]) -> None:
        log = options.out / f"{re.sub('[^a-z_]+', '_', described[0])}.txt"
        record = run(*described, log, options.timeout)
        # After each: what has been seen stays on record should the machine go.
        with lock:
            records[described[0]] = record
            seen = [records[name] for name, *_ in every if name in records]
            left = [name for name, *_ in every if name not in records]
            result = {"provenance": described_by, "checks": seen, "unfinished": left}
            (options.out / "checks.json").write_text(json.dumps(result, indent=1) + "\n")

    with ThreadPoolExecutor(options.jobs) as pool:
        list(pool.map(check, [described for described in every if described not in alone]))
    for described in alone:
        check(described)
    return 0 if all(record["exit"] == 0 for record in records.values()) else 1


if __name__ == "__main__":
    raise SystemExit(main())
