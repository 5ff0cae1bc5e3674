"""python -m benchmarks.backward: the backward on a GPU by its options, and torch-ms-deform-attn.

For every workload and dtype:
- the time with all gradients, deterministic or not, and with some of the gradients;
- the time with skewed locations: all samples on one pixel, half of the queries at (0, 0), or all samples outside;
- the memory in addition to the gradients;
- whether 50 deterministic runs gave the same bits while the GPU did other work.
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
from .timing import interleaved

# Requests for some of the gradients; "samples" are locations and weights.
PARTIAL_GRADIENTS = {
    "value": Wanted(True, False, False),
    "locations": Wanted(False, True, False),
    "weights": Wanted(False, False, True),
    "samples": Wanted(False, True, True),
    "value, weights": Wanted(True, False, True),
    "value, locations": Wanted(True, True, False),
}
# Skewed locations, and how a plot calls them.
SKEWS = {"one pixel": "all on one pixel", "half padded": "half at (0, 0)", "outside": "all outside"}
DETERMINISTIC_RUNS = 50


def prepare_backward(inputs: Inputs, *, deterministic: bool, wanted: Wanted = ALL) -> Callable[[], tuple]:
    """A function that runs only the backward, for the wanted gradients."""
    value, shapes, starts, *samples = inputs[:5]
    arguments = Arguments(value, shapes, starts, None, *samples, deterministic=deterministic)
    call = validate.read(arguments, inputs.grad_output, wanted)
    return lambda: api.backward(call)[:3]


def skewed(inputs: Inputs, kind: str) -> Inputs:
    """The same inputs with the locations of one of :data:`SKEWS`."""
    locations = inputs.sampling_locations.clone()
    if kind == "one pixel":
        locations[:] = 0.4012
    elif kind == "half padded":
        locations[:, ::2] = 0
    else:
        locations[:] = 3
    return inputs._replace(sampling_locations=locations)


def peak_memory(call: Callable[[], tuple]) -> dict[str, int]:
    """Bytes of the gradients, and the peak memory of the call in addition to them."""
    call()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    grads = call()
    torch.cuda.synchronize()
    size = sum(grad.numel() * grad.element_size() for grad in grads)
    return {"gradient_bytes": size, "extra_bytes": torch.cuda.max_memory_allocated() - before - size}


def same_bits(call: Callable[[], tuple]) -> bool:
    """Whether all runs give the same bits, on two alternating streams with matrix products on a third one."""
    first = call()
    busy, other = torch.cuda.Stream(), torch.cuda.Stream()
    work = torch.randn(2048, 2048, device="cuda")
    torch.cuda.synchronize()
    for run in range(DETERMINISTIC_RUNS):
        with torch.cuda.stream(busy):
            torch.mm(work, work)
        with torch.cuda.stream(other if run % 2 else torch.cuda.default_stream()):
            again = call()
        torch.cuda.synchronize()
        if not all(torch.equal(a, b) for a, b in zip(first, again, strict=True)):
            return False
    return True


def measure_backward(workload: cases.Workload, dtype: str, repeats: int) -> dict[str, Any]:
    """The record of one workload and dtype."""
    sets = cases.input_sets(workload, DTYPES[dtype], "cuda")
    calls = {
        "default": [prepare_backward(inputs, deterministic=False) for inputs in sets],
        "deterministic": [prepare_backward(inputs, deterministic=True) for inputs in sets],
    }
    for name, wanted in PARTIAL_GRADIENTS.items():
        calls[name] = [prepare_backward(inputs, deterministic=False, wanted=wanted) for inputs in sets]
    for kind in SKEWS:
        inputs = skewed(sets[0], kind)
        calls[f"default, {kind}"] = [prepare_backward(inputs, deterministic=False)]
        calls[f"deterministic, {kind}"] = [prepare_backward(inputs, deterministic=True)]
    baseline = implementations.torch_ms_deform_attn()
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        if baseline.unavailable("cuda") is None:
            calls["baseline"] = [baseline.prepare_backward(inputs) for inputs in sets]
        times = interleaved(calls, "cuda", stream, repeats)
    record: dict[str, Any] = {"workload": workload.name, "dtype": dtype, "times": times}
    record["memory"] = {
        name: peak_memory(calls[name][0]) for name in ("default", "deterministic", "baseline") if name in calls
    }
    record["same_bits"] = same_bits(calls["deterministic"][0])
    return record


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.backward", description=__doc__)
    parser.add_argument("--workloads", nargs="+", help="names from workloads.json; default: all")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=["float32", "float16", "bfloat16"])
    parser.add_argument("--repeats", type=int, default=9, help="samples per time")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    options = parser.parse_args(arguments)
    workloads = cases.load(cases.WORKLOADS)
    result: dict[str, Any] = {"provenance": provenance("cuda"), "runs": DETERMINISTIC_RUNS, "records": []}
    for name in options.workloads or workloads:
        for dtype in options.dtypes:
            record = measure_backward(workloads[name], dtype, options.repeats)
            result["records"].append(record)
            times = {name: round(found["median_us"], 1) for name, found in record["times"].items()}
            print(name, dtype, times, "same bits" if record["same_bits"] else "NOT THE SAME BITS", flush=True)
            if options.out:
                options.out.write_text(json.dumps(result, indent=1) + "\n")
    return 0 if all(record["same_bits"] for record in result["records"]) else 1


if __name__ == "__main__":
    raise SystemExit(main())
