"""python -m benchmarks.tuning: what tuning gains on drawn cells, and whether it repairs a spoilt launch table.

The cells are those of ``grid_cells.py`` for a seed. Each is tuned, in this process. A second process then times the
default and the tuned calls in turn, on the inputs of the cell, which tuning has not seen. Of the first cells, tuning
also starts from a table with half the warps and twice the blocks, and is compared with the shipped table.

The command goes on where it was stopped: what the file named by `--out` has is not done again.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from cupy_msda import Sizes, tune
from cupy_msda.call import ALL, Problem
from cupy_msda.cuda import gpu, kernels, launch_tables, run, session
from cupy_msda.cuda.kernel_spec import KernelSpec
from cupy_msda.cuda.recording import RecordedCall
from cupy_msda.cuda.tuner import candidates
from cupy_msda.cuda.tuner.targets import Planner, targets_of
from cupy_msda.cuda.tuning import loaded
from cupy_msda.cuda.tuning.file_format import Key, TuningFile, decode, encode
from cupy_msda.cuda.tuning.tuned import Choices, Entry
from cupy_msda.sizes import problems_of

from .grid import Ours
from .grid_cells import Cell, drawn, inputs_of
from .provenance import provenance
from .timing import interleaved

REPEATS = 9
# A cell is slower than the default by more than both of these.
SLOWER, SLOWER_US = 0.02, 0.5
COLD_BYTES, MAX_INPUTS = 192 << 20, 4
# Shares of the time for the kernels of all cells, for tuning, and for tuning from the spoilt table.
COMPILING, TUNING, REPAIRING = 0.28, 0.4, 0.18
_KEY = Key("", "", 1, 1)


def problem_of(cell: Cell) -> Problem:
    """The problem of a cell, all of it in the cell's dtype."""
    sizes = Sizes(
        cell.levels, N=cell.N, Q=cell.Q, M=cell.M, D=cell.D, P=cell.P, reference_coordinates=2 if cell.fused else None
    )
    return problems_of([sizes], [cell.dtype], 0)[0]


def calls_of(cell: Cell) -> list[RecordedCall]:
    """The forward and the backward of a cell."""
    problem = problem_of(cell)
    wanted = problem.computed(ALL._replace(references=cell.fused))
    return [RecordedCall(problem, None), RecordedCall(problem, wanted)]


# ---- tuning ----------------------------------------------------------------------------------------------------------


def spoilt(entry: Any) -> Any:
    """A launch table, or a part of it, with half the warps and twice the blocks."""
    if isinstance(entry, launch_tables.Bounds):
        return replace(entry, warps=max(1, entry.warps // 2), min_blocks=2 * entry.min_blocks)
    if hasattr(entry, "__dataclass_fields__"):
        return replace(entry, **{name: spoilt(getattr(entry, name)) for name in entry.__dataclass_fields__})
    return entry


@contextmanager
def spoilt_table() -> Iterator[None]:
    """Every GPU takes the spoilt table of its architecture."""
    original = launch_tables.table_of
    with ExitStack() as stack:
        for module in ("heuristics", "sorted_heuristics"):
            name = f"cupy_msda.cuda.{module}.table_of"
            stack.enter_context(mock.patch(name, lambda on: spoilt(original(on))))
        yield


def tuned(cell: Cell, budget: float) -> str:
    """What tuning finds for a cell, as text."""
    try:
        return encode(TuningFile("", {_KEY: tune(calls_of(cell), budget=budget, progress=False)}))
    finally:
        loaded.reload()


def entries_of(text: str) -> list[Entry]:
    return decode(text).tuned[_KEY]


def first_specs(cell: Cell) -> set[KernelSpec]:
    """The kernels that the first measurements of a cell need."""
    found: set[KernelSpec] = set()
    on = gpu.of_device(0)
    for call in calls_of(cell):
        planner = Planner(call.problem, on)
        for target in targets_of(call.problem, call.wanted):
            default = planner.default_axes(target)
            for axes in () if default is None else candidates.first(target.name, default, on):
                found |= {launch.spec for launch in planner.candidate(target, axes).launches}
    return found


def compile_spec(spec: KernelSpec) -> None:
    """Compiles a kernel into the cache on the disk. Tuning finds out what cannot be compiled."""
    try:
        with session.on_device(0):
            kernels.function(spec, 0)
    except RuntimeError:
        return


def compile_all(cells: list[Cell], spoilt_too: list[Cell], processes: int, seconds: float) -> int:
    """Compiles what the first measurements need, in parallel, while there is time; how many kernels.

    `spoilt_too` are the cells that are tuned from the spoilt table as well.
    """
    specs = [spec for cell in cells for spec in sorted(first_specs(cell), key=str)]
    with spoilt_table():
        specs += [spec for cell in spoilt_too for spec in sorted(first_specs(cell), key=str)]
    specs = list(dict.fromkeys(specs))
    end, done = time.perf_counter() + seconds, 0
    with ProcessPoolExecutor(processes, get_context("spawn")) as pool:
        for start in range(0, len(specs), 8 * processes):
            if time.perf_counter() > end:
                break
            part = specs[start : start + 8 * processes]
            list(pool.map(compile_spec, part, chunksize=2))
            done += len(part)
    return done


# ---- timing, in the second process -----------------------------------------------------------------------------------


def with_choices(function: Callable[[], object], text: str | None, *, spoil: bool = False) -> Callable[[], object]:
    """`function` with the entries of a text, or without any, and perhaps with the spoilt table."""
    choices, prepared = Choices(entries_of(text) if text else ()), dict[Any, Any]()

    def call() -> object:
        with ExitStack() as stack:
            stack.enter_context(mock.patch.object(loaded, "_choices", {0: choices}))
            stack.enter_context(mock.patch.object(run, "_prepared", prepared))
            if spoil:
                stack.enter_context(spoilt_table())
            return function()

    return call


def times_of(cell: Cell, row: dict[str, Any], device: str) -> dict[str, dict[str, float]]:
    """Microseconds of the default, of the tuned and of the repaired calls, in turn, by direction."""
    nbytes = cell.elements * (4 if cell.dtype == "float32" else 2)
    count = max(1, min(MAX_INPUTS, -(-COLD_BYTES // nbytes))) if device == "cuda" else 1
    stream = torch.cuda.Stream() if device == "cuda" else None
    with torch.cuda.stream(stream) if stream else ExitStack():
        sets = [Ours(inputs_of(cell, device, seed)) for seed in range(count)]
        variants = {"default": (None, False), "tuned": (row["entries"], False)}
        if "repaired" in row:
            variants |= {"spoilt": (None, True), "repaired": (row["repaired"], True)}
        found = {}
        for direction in ("forward", "backward"):
            calls = {
                name: [with_choices(getattr(one, direction), text, spoil=spoil) for one in sets]
                for name, (text, spoil) in variants.items()
            }
            times = interleaved(calls, device, stream, REPEATS)
            found[direction] = {name: round(value["median_us"], 2) for name, value in times.items()}
    if device == "cuda":
        torch.cuda.empty_cache()
    return found


def slower(after: float, before: float) -> bool:
    """Whether `after` is slower by more than the tolerance."""
    return after > before + max(SLOWER * before, SLOWER_US)


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """How many are slower and faster, and by how much."""
    timed = [times for row in rows for times in row.get("times", {}).values()]
    if not timed:
        return {}
    ratios = [times["tuned"] / times["default"] for times in timed]
    repaired = [times for times in timed if "repaired" in times]
    return {
        "calls": len(timed),
        "slower": sum(slower(times["tuned"], times["default"]) for times in timed),
        "default_was_not_the_best": sum(slower(times["default"], times["tuned"]) for times in timed),
        "worst": round(max(ratios), 4),
        "best": round(min(ratios), 4),
        "geometric_mean": round(math.exp(sum(map(math.log, ratios)) / len(ratios)), 4),
        "repaired_calls": len(repaired),
        "not_repaired": sum(slower(times["repaired"], times["default"]) for times in repaired),
        "spoilt": round(max((times["spoilt"] / times["default"] for times in repaired), default=1.0), 4),
        "repaired": round(max((times["repaired"] / times["default"] for times in repaired), default=1.0), 4),
    }


# ---- command ---------------------------------------------------------------------------------------------------------


class Record:
    """The JSON of a run, written after each step."""

    def __init__(self, path: Path, cells: int, seed: str | None, device: str) -> None:
        self.path = path
        if path.exists():
            self.data: dict[str, Any] = json.loads(path.read_text())
        else:
            self.data = {"provenance": provenance(device)}
            self.data["seed"] = seed or self.data["provenance"]["commit"]
            self.data["rows"] = [{"name": str(cell), "cell": asdict(cell)} for cell in drawn(cells, self.data["seed"])]
        self.rows: list[dict[str, Any]] = self.data["rows"]
        self.cells = drawn(len(self.rows), self.data["seed"])

    def write(self) -> None:
        self.data["summary"] = summary(self.rows)
        self.path.write_text(json.dumps(self.data, indent=1) + "\n")


def tune_all(record: Record, options: argparse.Namespace) -> None:
    """Tunes what is not tuned yet."""
    left = [cell for cell, row in zip(record.cells, record.rows, strict=True) if "entries" not in row]
    if options.compile and left:
        begin = time.perf_counter()
        again = [cell for cell in left if cell in record.cells[: options.repaired]]
        count = compile_all(left, again, options.compile, COMPILING * options.seconds)
        print(f"compiled {count} kernels in {time.perf_counter() - begin:.0f} s", flush=True)
    for number, (cell, row) in enumerate(zip(record.cells, record.rows, strict=True)):
        if "entries" not in row:
            row["entries"] = tuned(cell, TUNING * options.seconds / len(record.rows))
            record.write()
        if number < options.repaired and "repaired" not in row:
            with spoilt_table():
                row["repaired"] = tuned(cell, REPAIRING * options.seconds / options.repaired)
            record.write()


def time_all(record: Record, device: str) -> None:
    """Times what is tuned and not timed yet."""
    for cell, row in zip(record.cells, record.rows, strict=True):
        if "times" not in row and "entries" in row:
            row["times"] = times_of(cell, row, device)
            record.write()


def in_another_process(arguments: list[str]) -> None:
    """The same command with these arguments."""
    subprocess.run([sys.executable, "-m", "benchmarks.tuning", *arguments], check=True)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tuning", description=__doc__)
    parser.add_argument("--cells", type=int, default=20)
    parser.add_argument("--repaired", type=int, default=3, help="cells that are tuned from the spoilt table too")
    parser.add_argument("--seed", help="instead of the commit")
    parser.add_argument("--seconds", type=float, default=400, help="about so many in all")
    parser.add_argument("--compile", type=int, default=0, metavar="N", help="first compile, with N processes")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="what the second process runs on")
    parser.add_argument("--only-time", action="store_true", help="what the second process does")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args(arguments)
    os.environ["CUPY_MSDA_TUNING"] = "off"  # nothing that somebody has tuned here, and nothing for others
    record = Record(options.out, options.cells, options.seed, options.device)
    if options.only_time:
        time_all(record, options.device)
        return
    record.write()
    tune_all(record, options)
    in_another_process(["--only-time", "--device", options.device, "--out", str(options.out)])
    print(json.dumps(json.loads(options.out.read_text())["summary"], indent=1))


if __name__ == "__main__":
    main()
