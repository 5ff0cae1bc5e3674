"""python -m benchmarks.overhead: what a call of the torch operator costs on the host, and where the microseconds go.

Wall time a call on tiny_call, whose kernels are shorter than the host's work, so that the GPU's queue is never full.
Every implementation in the same process, in turn.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cupy_msda.cuda import run as cuda
from cupy_msda.torch import fast_path, functional, ms_deform_attn, ms_deform_attn_fused

from . import cases, implementations
from .cases import Inputs
from .front_end import Unfused
from .provenance import provenance
from .timing import summary

CALLS = 200


def seconds(call: Callable[[], Any]) -> float:
    """Seconds of the host a call; what the GPU still has to do is waited for outside the clock."""
    torch.cuda.synchronize()
    begin = time.perf_counter()
    for _ in range(CALLS):
        call()
    elapsed = time.perf_counter() - begin
    torch.cuda.synchronize()
    return elapsed / CALLS


def usages(function: Callable[..., Tensor], tensors: Sequence[Tensor], grad_output: Tensor) -> dict[str, Callable]:
    """The three ways of calling that are measured; `function` is differentiated by `tensors`."""
    leaves = [t.detach().clone().requires_grad_() for t in tensors]

    def without_gradient() -> None:
        with torch.no_grad():
            function(*tensors)

    def with_gradient() -> None:
        function(*leaves)

    def both() -> None:
        torch.autograd.grad(function(*leaves), leaves, grad_output)

    return {"forward, no_grad": without_gradient, "forward, with grad": with_gradient, "forward and backward": both}


def implementations_of(workload: cases.Workload) -> dict[str, dict[str, Callable]]:
    """The usages of each implementation."""
    inputs = cases.make_inputs(workload, torch.float32, "cuda")
    value, shapes, starts, locations, weights, grad_output = inputs
    functions = {"cupy_msda": ms_deform_attn, "cupy_msda, registered operator": operator}
    theirs = implementations.torch_ms_deform_attn()
    if theirs.unavailable("cuda") is None:
        functions[theirs.name] = theirs.function
    found = {
        name: usages(
            lambda v, x, w, function=function: function(v, shapes, starts, x, w),
            (value, locations, weights),
            grad_output,
        )
        for name, function in functions.items()
    }
    front = cases.make_front_inputs(workload, torch.float32, "cuda")
    metadata, references, samples = front[1:3], front.reference_points, front[4:6]

    def unfused(value: Tensor, offsets: Tensor, logits: Tensor) -> Tensor:
        changed = front._replace(sampling_offsets=offsets, attention_logits=logits)
        return ms_deform_attn(value, *metadata, *Unfused(changed, torch.float32).samples())

    def fused(value: Tensor, offsets: Tensor, logits: Tensor) -> Tensor:
        return ms_deform_attn_fused(value, *metadata, references, offsets, logits)

    for name, function in {"softmax, locations, cupy_msda": unfused, "cupy_msda, fused": fused}.items():
        found[name] = usages(function, (front.value, *samples), front.grad_output)
    return found


def steps(inputs: Inputs) -> dict[str, Callable[[], Any]]:
    """What a forward under no_grad is made of, one by one."""
    value, shapes, starts, locations, weights, _ = inputs
    arguments = (value, shapes, starts, locations, weights, 64, None)
    ms_deform_attn(*arguments[:5])
    output = ms_deform_attn(*arguments[:5])  # the second call is the first that is found among the recent ones
    matches, recipe, *_ = fast_path.recent[0]
    problem, device = recipe.problem, value.device.index
    stream = torch.cuda.current_stream().cuda_stream
    at = [t.data_ptr() for t in (value, shapes, starts, locations, weights, output)]
    run = cuda.prepare_forward(problem, fast_path._ALIGNMENT, stream).run
    like_output = value.new_empty(()).expand(output.shape)
    get_device, set_device = fast_path._device_functions()

    def switch() -> None:
        get_device()
        set_device(device)
        torch._C._cuda_getCurrentRawStream(device)

    return {
        "whole call": lambda: ms_deform_attn(*arguments[:5]),
        "does anything observe": lambda: torch.compiler.is_compiling() or functional.observed(),
        "same layout as before": lambda: matches(value, locations, weights, shapes, starts),
        "output": lambda: torch.empty_like(like_output),
        "addresses": lambda: [t.data_ptr() for t in (value, shapes, starts, locations, weights, output)],
        "device and stream": switch,
        "launch": lambda: run(stream, *at[:5], 0, 0, at[5], *problem.kernel_sizes),
    }


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.overhead", description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=101)
    options = parser.parse_args()
    workload = cases.load()["tiny_call"]
    calls = {
        (name, usage): call for name, found in implementations_of(workload).items() for usage, call in found.items()
    }
    parts = steps(cases.make_inputs(workload, torch.float32, "cuda"))
    for call in (*calls.values(), *parts.values()):
        seconds(call)
    timed: dict[Any, list[float]] = {name: [] for name in (*calls, *parts)}
    for _ in range(options.rounds):
        for name, call in calls.items():
            timed[name].append(seconds(call))
        for name, call in parts.items():
            with torch.no_grad():
                timed[name].append(seconds(call))
    found = {name: summary(samples) for name, samples in timed.items()}
    result = {
        "provenance": provenance("cuda"),
        "records": [{"implementation": name, "usage": usage, **found[name, usage]} for name, usage in calls],
        "steps": [{"step": name, **found[name]} for name in parts],
    }
    options.out.write_text(json.dumps(result, indent=1) + "\n")
    for entry in (*result["records"], *result["steps"]):
        label = entry.get("step") or f"{entry['implementation']}: {entry['usage']}"
        print(f"{label:55} {entry['median_us']:8.1f} us")


def operator(*inputs: Tensor) -> Tensor:
    """The dispatcher's way, which compiled code takes."""
    return torch.ops.cupy_msda.ms_deform_attn.default(*inputs, 64, None)


if __name__ == "__main__":
    main()
