"""python -m benchmarks.backward: the ways of the backward on a GPU, beside the baseline's.

For every workload and dtype: time with all gradients, deterministic or not, and with only some of them; time where
all samples fall on one pixel, half of the queries are padded to (0, 0), or all lie outside; memory beside the
gradients; and whether 50 deterministic runs beside other work on the GPU gave the same bits.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from cupy_msda import api, validate
from cupy_msda.call import ALL, Arguments, Wanted

from . import cases, implementations
from .cases import Inputs
from .provenance import provenance
from .run import DTYPES
from .timing import summaries

# Which gradients, where not all of them.
SOME = {
    "value": Wanted(True, False, False),
    "locations": Wanted(False, True, False),
    "weights": Wanted(False, False, True),
    "samples": Wanted(False, True, True),
    "value, weights": Wanted(True, False, True),
    "value, locations": Wanted(True, True, False),
}
SKEWS = ("one pixel", "half padded", "outside")
RUNS = 50


def ours(inputs: Inputs, *, deterministic: bool, wanted: Wanted = ALL) -> Callable[[], tuple]:
    """The backward alone, for the gradients that are wanted."""
    value, shapes, starts, *samples = inputs[:5]
    arguments = Arguments(value, shapes, starts, None, *samples, deterministic=deterministic)
    call = validate.read(arguments, inputs.grad_output, wanted)
    return lambda: api.backward(call)[:3]


def skewed(inputs: Inputs, kind: str) -> Inputs:
    """The same inputs with other locations."""
    locations = inputs.sampling_locations.clone()
    if kind == "one pixel":
        locations[:] = 0.4012
    elif kind == "half padded":
        locations[:, ::2] = 0
    else:
        locations[:] = 3
    return inputs._replace(sampling_locations=locations)


def memory(call: Callable[[], tuple]) -> dict[str, int]:
    """Bytes of the gradients, and the most that the call held beside them."""
    call()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    grads = call()
    torch.cuda.synchronize()
    size = sum(grad.numel() * grad.element_size() for grad in grads)
    return {"gradient_bytes": size, "extra_bytes": torch.cuda.max_memory_allocated() - before - size}


def same_bits(call: Callable[[], tuple]) -> bool:
    """Whether every run gives the same, on two streams in turn, with products of matrices on a third."""
    first = call()
    busy, other = torch.cuda.Stream(), torch.cuda.Stream()
    work = torch.randn(2048, 2048, device="cuda")
    torch.cuda.synchronize()
    for run in range(RUNS):
        with torch.cuda.stream(busy):
            torch.mm(work, work)
        with torch.cuda.stream(other if run % 2 else torch.cuda.default_stream()):
            again = call()
        torch.cuda.synchronize()
        if not all(torch.equal(a, b) for a, b in zip(first, again, strict=True)):
            return False
    return True


def measure(workload: cases.Workload, dtype: str, rounds: int) -> dict[str, Any]:
    """One record."""
    sets = cases.input_sets(workload, DTYPES[dtype], "cuda")
    ways = {
        "default": [ours(inputs, deterministic=False) for inputs in sets],
        "deterministic": [ours(inputs, deterministic=True) for inputs in sets],
    }
    for name, wanted in SOME.items():
        ways[name] = [ours(inputs, deterministic=False, wanted=wanted) for inputs in sets]
    for kind in SKEWS:
        inputs = skewed(sets[0], kind)
        ways[f"default, {kind}"] = [ours(inputs, deterministic=False)]
        ways[f"deterministic, {kind}"] = [ours(inputs, deterministic=True)]
    baseline = implementations.torch_ms_deform_attn()
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        if baseline.unavailable("cuda") is None:
            ways["baseline"] = [baseline.prepare_backward(inputs) for inputs in sets]
        times = summaries(ways, "cuda", stream, rounds)
    record: dict[str, Any] = {"workload": workload.name, "dtype": dtype, "ways": times}
    record["memory"] = {
        name: memory(ways[name][0]) for name in ("default", "deterministic", "baseline") if name in ways
    }
    record["same_bits"] = same_bits(ways["deterministic"][0])
    return record


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.backward", description=__doc__)
    parser.add_argument("--workloads", nargs="+", help="names out of workloads.json; default: all")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=["float32", "float16", "bfloat16"])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--out", type=Path, help="JSON file to write")
    options = parser.parse_args(arguments)
    workloads = cases.load(cases.WORKLOADS)
    result: dict[str, Any] = {"provenance": provenance("cuda"), "runs": RUNS, "records": []}
    for name in options.workloads or workloads:
        for dtype in options.dtypes:
            record = measure(workloads[name], dtype, options.rounds)
            result["records"].append(record)
            times = {way: round(found["median_us"], 1) for way, found in record["ways"].items()}
            print(name, dtype, times, "same bits" if record["same_bits"] else "NOT THE SAME BITS", flush=True)
            if options.out:
                options.out.write_text(json.dumps(result, indent=1) + "\n")
    return 0 if all(record["same_bits"] for record in result["records"]) else 1


if __name__ == "__main__":
    raise SystemExit(main())
