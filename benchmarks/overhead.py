"""python -m benchmarks.overhead: the host time of a torch call, and the time of its steps.

The workload is tiny_call: its kernels take less time than the host's work, so the GPU's queue is never full. All
implementations run in one process, and their samples alternate.
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

from cupy_msda.cuda import plan as planner
from cupy_msda.cuda import run as cuda
from cupy_msda.torch import compat, fast_path, ms_deform_attn, ms_deform_attn_fused

from . import cases, implementations
from .cases import Inputs
from .fused import Unfused
from .provenance import provenance
from .timing import summary

CALLS = 200


def host_seconds(call: Callable[[], Any]) -> float:
    """Host seconds per call. The wait for the GPU is not included."""
    torch.cuda.synchronize()
    begin = time.perf_counter()
    for _ in range(CALLS):
        call()
    elapsed = time.perf_counter() - begin
    torch.cuda.synchronize()
    return elapsed / CALLS


def usages(function: Callable[..., Tensor], tensors: Sequence[Tensor], grad_output: Tensor) -> dict[str, Callable]:
    """The three measured usages of `function`, whose gradients are those of `tensors`."""
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
    value, shapes, starts, locations, weights, grad_output = cases.make_inputs(workload, torch.float32, "cuda")
    functions = {"cupy_msda": ms_deform_attn, "cupy_msda, registered operator": registered_operator}
    baseline = implementations.torch_ms_deform_attn()
    if baseline.unavailable("cuda") is None:
        functions[baseline.name] = baseline.function
    calls = {
        name: usages(
            lambda v, x, w, function=function: function(v, shapes, starts, x, w),
            (value, locations, weights),
            grad_output,
        )
        for name, function in functions.items()
    }
    inputs = cases.make_fused_inputs(workload, torch.float32, "cuda")
    metadata, references, samples = inputs[1:3], inputs.reference_points, inputs[4:6]

    def unfused(value: Tensor, offsets: Tensor, logits: Tensor) -> Tensor:
        changed = inputs._replace(sampling_offsets=offsets, attention_logits=logits)
        return ms_deform_attn(value, *metadata, *Unfused(changed, torch.float32).samples())

    def fused(value: Tensor, offsets: Tensor, logits: Tensor) -> Tensor:
        return ms_deform_attn_fused(value, *metadata, references, offsets, logits)

    for name, function in {"softmax, locations, cupy_msda": unfused, "cupy_msda, fused": fused}.items():
        calls[name] = usages(function, (inputs.value, *samples), inputs.grad_output)
    return calls


def steps(inputs: Inputs) -> dict[str, Callable[[], Any]]:
    """The steps of a forward under no_grad, each as a call."""
    value, shapes, starts, locations, weights, _ = inputs
    arguments = (value, shapes, starts, locations, weights)
    ms_deform_attn(*arguments)
    output = ms_deform_attn(*arguments)  # the second call of a layout adds it to the recent ones
    matches, plan, *_ = fast_path.recent[fast_path.WITH_WEIGHTS][0]
    problem, device = plan.problem, value.device.index
    stream = compat.current_stream(device)
    addresses = [t.data_ptr() for t in (value, shapes, starts, locations, weights, output)]
    launch = cuda.prepare_forward(problem, fast_path.ALIGNMENT, stream).run
    like_output = value.new_empty(()).expand(output.shape)
    get_device, set_device = fast_path.device_functions()

    def select_device_and_stream() -> None:
        get_device()
        set_device(device)
        compat.current_stream(device)

    return {
        "whole call": lambda: ms_deform_attn(*arguments),
        "check for observers": lambda: torch.compiler.is_compiling() or compat.observed(),
        "layout guards": lambda: matches(value, locations, weights, shapes, starts),
        "output allocation": lambda: torch.empty_like(like_output),
        "data pointers": lambda: [t.data_ptr() for t in (value, shapes, starts, locations, weights, output)],
        "device and stream": select_device_and_stream,
        "launch": lambda: launch(stream, *addresses[:5], 0, 0, addresses[5], *planner.size_words(problem)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.overhead", description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--repeats", type=int, default=101, help="samples per time")
    options = parser.parse_args()
    workload = cases.load()["tiny_call"]
    calls = {
        (name, usage): call for name, found in implementations_of(workload).items() for usage, call in found.items()
    }
    parts = steps(cases.make_inputs(workload, torch.float32, "cuda"))
    for call in (*calls.values(), *parts.values()):
        host_seconds(call)
    timed: dict[Any, list[float]] = {name: [] for name in (*calls, *parts)}
    for _ in range(options.repeats):
        for name, call in calls.items():
            timed[name].append(host_seconds(call))
        for name, call in parts.items():
            with torch.no_grad():
                timed[name].append(host_seconds(call))
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


def registered_operator(*inputs: Tensor) -> Tensor:
    """The operator through torch's dispatcher, as compiled code calls it."""
    return torch.ops.cupy_msda.ms_deform_attn.default(*inputs, 64, None)


if __name__ == "__main__":
    main()
