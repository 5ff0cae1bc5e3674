"""python -m tests.fuzz: drawn calls on every path, compared with the contract and with each other.

One seed is one call. `--seed N --cases 1` repeats it and prints it as code; `--shrink` makes it small first.
`--out FILE` writes a record as JSON, which the same command completes after an interruption.

    python -m tests.fuzz --cases 100000 --out FILE             the CPU paths
    python -m tests.fuzz --compiled 100 --out FILE             torch.compile too
    python -m tests.fuzz --emulator 200 --out FILE             the CUDA kernels on the CPU
    python -m tests.fuzz --gpu --specialisations 300 --calls 300 --out FILE
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path
from typing import Any

from .record import Record, check, chunks, key_of, run_chunk, run_tasks

CPU_PATHS = ("array", "eager", "registered", "decomposed", "numpy", "bags", "grid_sample")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.fuzz", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seed", type=int, default=0, help="of the first call")
    parser.add_argument("--cases", type=int, default=1000, help="calls on the paths of the CPU")
    parser.add_argument("--paths", nargs="+", default=CPU_PATHS, choices=(*CPU_PATHS, "compiled"))
    parser.add_argument("--compiled", type=int, metavar="CASES", help="calls on all of these paths, compiled included")
    parser.add_argument("--emulator", type=int, metavar="CASES", help="calls of the CUDA kernels on the CPU")
    parser.add_argument("--gpu", action="store_true", help="calls of drawn specialisations on a GPU")
    parser.add_argument("--specialisations", type=int, default=300)
    parser.add_argument("--calls", type=int, default=300, help="calls of each specialisation")
    parser.add_argument("--minutes", type=float, default=60, help="after which no specialisation begins; default: 60")
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)), help="default: one per core")
    parser.add_argument("--out", type=Path, help="JSON record")
    parser.add_argument("--shrink", action="store_true", help="print the failures of each call, made small, as code")
    options = parser.parse_args(arguments)
    if options.compiled:
        options.cases, options.paths = options.compiled, (*CPU_PATHS, "compiled")
    if options.gpu:
        return run_gpu(options)
    if options.emulator:
        return run_emulator(options)
    if options.cases == 1 or options.shrink:
        return show(options)
    header = {"seed": options.seed, "requested": options.cases, "paths_run": list(options.paths)}
    record = Record(options.out, header | {"workers": options.workers}, lambda: provenance_of("cpu"))
    size = 5 if "compiled" in options.paths else 250
    run_tasks(record, chunks(options.seed, options.cases, size), run_chunk, options.workers, options.paths)
    return report(record, options.cases)


def run_emulator(options: argparse.Namespace) -> int:
    from .emulated import run_emulated_chunk

    header = {"seed": options.seed, "requested": options.emulator, "paths_run": ["emulated"]}
    record = Record(options.out, header | {"workers": options.workers}, lambda: provenance_of("cpu"))
    run_tasks(record, chunks(options.seed, options.emulator, 2), run_emulated_chunk, options.workers)
    return report(record, options.emulator)


def run_gpu(options: argparse.Namespace) -> int:
    from .gpu import run_specialisation

    deadline = time.time() + 60 * options.minutes
    header = {"seed": options.seed, "specialisations": options.specialisations, "calls": options.calls}
    record = Record(options.out, header | {"workers": options.workers}, lambda: provenance_of("cuda"))
    tasks = [(number,) for number in range(options.specialisations)]
    run_tasks(record, tasks, run_specialisation, options.workers, options.seed, options.calls, deadline)
    return report(record, options.specialisations * options.calls)


def provenance_of(device: str) -> dict[str, Any]:
    """Machine, versions, commit and date."""
    from benchmarks.provenance import provenance

    return provenance(device) | {"cores": len(os.sched_getaffinity(0))}


def report(record: Record, requested: int) -> int:
    """Print the failures; 1 where there are any, and where a call was not run."""
    data = record.count.data
    for kind, one in sorted(data["failures"].items(), key=lambda entry: -entry[1]["cases"]):
        print(f"{one['cases']} calls, seeds {one['seeds'][:4]}: {kind}")
    print(f"{data['cases']} of {requested} calls, {data['failing']} of them wrong, {record.content['seconds']} s")
    return 0 if data["cases"] == requested and not data["failing"] else 1


def show(options: argparse.Namespace) -> int:
    """Every failure of some calls; with --shrink as small as it gets."""
    from .draw import draw
    from .shrink import code, shrink

    failing = 0
    for seed in range(options.seed, options.seed + options.cases):
        case = draw(seed)
        _, failures = check(case, options.paths)
        failing += bool(failures)
        for failure in failures:
            print(f"seed {seed}: {failure}")
        if options.cases == 1 and not options.shrink:
            print(f"# seed {seed}: {len(failures)} failures\n{code(case)}")
        for key in dict.fromkeys(map(key_of, failures)) if options.shrink else ():

            def fails(one: Any, key: str = key) -> bool:
                try:
                    return key in map(key_of, check(one, options.paths)[1])
                except (ValueError, IndexError):  # what is left makes no call
                    return False

            print(f"\n# {key}\n{code(shrink(case, fails))}")
    return 1 if failing else 0


if __name__ == "__main__":
    sys.exit(main())
