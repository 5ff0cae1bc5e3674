"""python -m benchmarks.run: validates every implementation, then times all of them in one process.

Prints a table and writes JSON with provenance.
"""

from __future__ import annotations

import argparse
import functools
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cupy_msda.cli.check import TOLERANCE

from . import cases, implementations
from .cases import Inputs, Workload
from .floors import copy_bandwidth, floors
from .provenance import provenance
from .timing import Timer, summary

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32, "float64": torch.float64}
# A timed implementation must be right, but may miss this project's own tolerances: on wide levels float32 coordinates
# put other implementations just beyond them.
TOLERANCE_FACTOR = 4
# The gradient of a location jumps where a sample crosses a pixel centre. Float32 coordinates put a few samples in 10**5
# on the other side than float64 coordinates. The tests measure this gradient away from the jumps.
LOCATION_TOLERANCE = 2e-2


def relative_error(out: Tensor, reference: Tensor) -> float:
    return float((out.double() - reference).norm() / reference.norm())


def reference(inputs: Inputs) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Output and gradients of torch's own ``grid_sample`` in float64."""
    exact = Inputs(*(t.double() if t.is_floating_point() else t for t in inputs))
    grid_sample = implementations.GridSample("reference", implementations.grid_sample_attention)
    return grid_sample.forward(exact), grid_sample.prepare_backward(exact)()


def validate(
    forward: Callable[[], Tensor], backward: Callable[[], Any], inputs: Inputs, exact: tuple, dtype: str
) -> dict[str, Any]:
    """Relative errors of the output and the three gradients, and whether all are within the tolerances."""
    output, grads = exact
    errors = {"output": relative_error(forward(), output)}
    for name, grad, want in zip(("grad_value", "grad_locations", "grad_weights"), backward(), grads, strict=True):
        errors[name] = relative_error(grad, want)
    limits = dict.fromkeys(errors, TOLERANCE_FACTOR * TOLERANCE[dtype]) | {"grad_locations": LOCATION_TOLERANCE}
    return {"errors": errors, "valid": all(errors[name] <= limits[name] for name in errors)}


def measure_workload(
    workload: Workload, dtype: str, device: str, chosen: list[implementations.Implementation], repeats: int
) -> list[dict[str, Any]]:
    """One record per implementation."""
    sets = cases.input_sets(workload, DTYPES[dtype], device)
    first = sets[0]
    exact = reference(first)
    # Autograd runs a backward on the stream of its forward, so both run on the stream of the capture.
    stream = torch.cuda.Stream() if device == "cuda" else None
    records, timers = [], []
    if device == "cuda":
        torch.cuda.synchronize()  # the inputs and the reference come from another stream
    with torch.cuda.stream(stream):
        for implementation in chosen:
            record: dict[str, Any] = {
                "workload": workload.name,
                "dtype": dtype,
                "implementation": implementation.name,
                "input_sets": len(sets),
            }
            records.append(record)
            try:
                backwards = [implementation.prepare_backward(inputs) for inputs in sets]
                forwards = [functools.partial(implementation.forward, inputs) for inputs in sets]
                record |= validate(forwards[0], backwards[0], first, exact, dtype)
                if not record["valid"]:
                    continue
                for direction, calls in (("forward", forwards), ("backward", backwards)):
                    timer = Timer(calls, device, stream)
                    record[direction] = {"method": timer.method}
                    timers.append((record[direction], timer, []))
            except (RuntimeError, TypeError, ValueError) as error:
                record["failed"] = f"{type(error).__name__}: {error}".splitlines()[0]
        for _ in range(repeats):
            random.shuffle(timers)
            for _, timer, samples in timers:
                samples.append(timer.sample())
    for target, _, samples in timers:
        target |= summary(samples)
    return records


def text_table(records: list[dict[str, Any]]) -> str:
    """The records as text for the terminal."""
    lines = [f"{'workload':20} {'dtype':9} {'implementation':22} {'forward':>10} {'backward':>10}  us, median"]
    for record in records:
        head = f"{record['workload']:20} {record['dtype']:9} {record['implementation']:22} "
        if "failed" in record:
            lines.append(head + record["failed"][:80])
        elif not record["valid"]:
            lines.append(head + "not valid: " + ", ".join(f"{k} {v:.1e}" for k, v in record["errors"].items()))
        else:
            lines.append(head + f"{record['forward']['median_us']:10.1f} {record['backward']['median_us']:10.1f}")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.run", description=__doc__)
    parser.add_argument("--workload-file", type=Path, default=cases.WORKLOADS, help="JSON like workloads.json")
    parser.add_argument("--workloads", nargs="+", help="names from the file; default: all")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=["float32"])
    parser.add_argument("--implementations", nargs="+", help="names; default: all except the compiled grid_sample")
    parser.add_argument("--adapter", action="append", default=[], metavar="FILE.py", help="more implementations")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--repeats", type=int, default=15, help="samples per implementation and direction")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    options = parser.parse_args(arguments)

    workloads = cases.load(options.workload_file)
    names = options.workloads or list(workloads)
    if unknown := [name for name in names if name not in workloads]:
        parser.error(f"--workloads: expected names from {', '.join(workloads)}, got {', '.join(unknown)}")
    known = implementations.known() + [i for path in options.adapter for i in implementations.load_adapter(path)]
    wanted = options.implementations or [i.name for i in known if i.name != "grid_sample compiled"]
    if unknown := [name for name in wanted if name not in [i.name for i in known]]:
        parser.error(f"--implementations: expected names from {', '.join(i.name for i in known)}, got {unknown[0]}")
    chosen = []
    for implementation in known:
        if implementation.name in wanted:
            if reason := implementation.unavailable(options.device):
                print(f"left out: {implementation.name}: {reason}")
            else:
                chosen.append(implementation)

    result: dict[str, Any] = {"provenance": provenance(options.device), "floors": [], "records": []}
    bandwidth = None
    if options.device == "cuda":
        bandwidth = result["provenance"]["copy_bytes_per_second"] = copy_bandwidth()
    for name in names:
        workload = cases.on_cpu(workloads[name]) if options.device == "cpu" else workloads[name]
        for dtype in options.dtypes:
            if bandwidth:
                bound = floors(workload, DTYPES[dtype].itemsize, bandwidth, result["provenance"])
                result["floors"].append({"workload": name, "dtype": dtype, **bound})
            records = measure_workload(workload, dtype, options.device, chosen, options.repeats)
            table = text_table(records)
            print(table.partition("\n")[2] if result["records"] else table, flush=True)
            result["records"] += records
            if options.out:
                options.out.write_text(json.dumps(result, indent=1) + "\n")
    return 0 if all(record.get("valid") for record in result["records"]) else 1


if __name__ == "__main__":
    raise SystemExit(main())
