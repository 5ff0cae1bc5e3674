"""python -m benchmarks.several_gpus_record --out FILE: what several GPUs gain, and what they must show, as one record.

Runs benchmarks.several_gpus with 1, 2, ... processes, the first call of eight processes at once with an empty kernel
cache, and the tests that need two GPUs. The file is rewritten after each result; what it has already is not run again.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from .provenance import provenance
from .several_gpus_report import several_gpus_table

ROOT = Path(__file__).parent.parent
MODES = ("ddp", "fsdp", "compiled")
RANKS_OF_FIRST_CALL = 8
# Those that skip themselves with one GPU.
TESTS = (
    "tests/cuda/test_operator.py::test_second_device_while_the_first_is_current",
    "tests/with_torch/test_on_cuda.py::test_tensors_on_another_device_than_the_current_one",
    "tests/with_jax/test_on_cuda.py::test_two_gpus_against_one",
)
_SUMMARY = re.compile(r"=* ?(\d+ (?:passed|failed|skipped|error).*?) in [\d.]+s.*")


class Record:
    """The JSON file: `records` of the programs, and `tests`."""

    def __init__(self, path: Path, device: str) -> None:
        self.path = path
        self.content: dict[str, Any] = {"provenance": provenance(device), "records": [], "tests": None}
        if path.exists():
            self.content = json.loads(path.read_text())

    def has(self, mode: str, processes: int) -> bool:
        return any((one["mode"], one["processes"]) == (mode, processes) for one in self.content["records"])

    def add(self, record: Mapping[str, Any]) -> None:
        self.content["records"].append(record)
        self.write()

    def write(self) -> None:
        self.path.write_text(json.dumps(self.content, indent=1) + "\n")


def launched(module: str, processes: int, arguments: Sequence[str], environment: Mapping[str, str]) -> Iterator[Any]:
    """The JSON records that a program prints, as they come. Its other output goes to standard error."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    program = subprocess.Popen(
        [*command, "-m", module, *arguments], stdout=subprocess.PIPE, text=True, cwd=ROOT, env=os.environ | environment
    )
    assert program.stdout is not None
    for line in program.stdout:
        if line.startswith("{"):
            yield json.loads(line)
        else:
            print(line, end="", file=sys.stderr)
    if program.wait() != 0:
        raise SystemExit(f"{module} with {processes} processes: exit {program.returncode}")


def run_tests() -> dict[str, Any]:
    """The tests that need two GPUs. One that skips has not shown anything."""
    begin = time.perf_counter()
    command = [sys.executable, "-m", "pytest", "-q", "--color=no", "-p", "no:cacheprovider", "-m", "", *TESTS]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    lines = [found[1] for line in done.stdout.splitlines() if (found := _SUMMARY.match(line))]
    if done.returncode:
        print(done.stdout, file=sys.stderr)
    seconds = round(time.perf_counter() - begin, 1)
    return {"tests": list(TESTS), "exit": done.returncode, "summary": lines[-1:], "seconds": seconds}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.several_gpus_record", description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--processes", nargs="+", type=int, help="default: 1 and every GPU")
    parser.add_argument("program", nargs="*", help="arguments of benchmarks.several_gpus, after --")
    options = parser.parse_args(arguments)
    gpus = torch.cuda.device_count()
    record = Record(options.out, "cuda" if gpus else "cpu")
    # A thread per process, unless the caller says otherwise: torchrun would warn.
    threads = {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "4")}
    for processes in options.processes or sorted({1, max(gpus, 1)}):
        missing = [mode for mode in MODES if not record.has(mode, processes)]
        if missing:
            program = ["--modes", *missing, *options.program]
            for one in launched("benchmarks.several_gpus", processes, program, threads):
                record.add(one)
    if not record.has("first call", RANKS_OF_FIRST_CALL):
        with tempfile.TemporaryDirectory() as cache:
            for one in launched("benchmarks.first_call", RANKS_OF_FIRST_CALL, [], threads | {"CUPY_CACHE_DIR": cache}):
                record.add(one)
    if gpus > 1 and record.content["tests"] is None:
        record.content["tests"] = run_tests()
        record.write()
    print(several_gpus_table(record.content, f"In {options.out}."))
    return (record.content["tests"] or {"exit": 0})["exit"]


if __name__ == "__main__":
    raise SystemExit(main())
