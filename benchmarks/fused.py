"""python -m benchmarks.fused: the fused operator, and torch's softmax and location arithmetic before the plain one.

For every workload and dtype: the times of forward and backward, and the peak memory of a training step in addition to
its inputs and gradients. The backward leaves out the gradient of reference points, which encoders do not need. With
16-bit inputs torch's arithmetic is measured twice: in 16 bits, which is fastest but too inexact for the locations of a
wide level, and in float32.
"""

from __future__ import annotations

import argparse
import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import cupy_msda.torch
from cupy_msda import api, validate
from cupy_msda.call import ALL, FUSED_NAMES, Arguments

from . import cases
from .cases import FusedInputs
from .provenance import provenance
from .run import DTYPES
from .timing import interleaved

SIXTEEN_BIT_DTYPES = ("float16", "bfloat16")


class Unfused:
    """A model's softmax and location arithmetic in `dtype`, then the plain operator; and the backward of both."""

    def __init__(self, inputs: FusedInputs, dtype: torch.dtype) -> None:
        self.inputs, self.dtype = inputs, dtype
        self.normalizer = inputs.spatial_shapes.flip(-1).to(dtype)[:, None]

    def samples(self) -> tuple[Tensor, Tensor]:
        """Locations and weights from reference points, offsets and logits."""
        references, offsets, logits = (tensor.to(self.dtype) for tensor in self.inputs[3:6])
        weights = F.softmax(logits.flatten(3), -1).view_as(logits)
        references = references[:, :, None, :, None, :]
        if references.shape[-1] == 2:
            return references + offsets / self.normalizer, weights
        return references[..., :2] + offsets / offsets.shape[4] * references[..., 2:] * 0.5, weights

    def forward(self) -> Tensor:
        locations, weights = self.samples()
        return api.forward(validate.read(Arguments(*self.inputs[:3], None, locations, weights)))

    def prepare_backward(self) -> Callable[[], tuple[Tensor, ...]]:
        """A function that computes the gradients of value, offsets and logits, given locations and weights."""
        value, shapes, starts, references, offsets, logits, grad_output = self.inputs
        locations, weights = self.samples()
        flat = weights.flatten(3)
        boxes = references[:, :, None, :, None, 2:].to(self.dtype)

        def gradients() -> tuple[Tensor, ...]:
            call = validate.read(Arguments(value, shapes, starts, None, locations, weights), grad_output)
            of_value, of_locations, of_weights, _ = api.backward(call)
            of_logits = torch._softmax_backward_data(of_weights.flatten(3), flat, -1, self.dtype)
            if boxes.shape[-1]:
                of_offsets = of_locations * 0.5 * boxes / offsets.shape[4]
            else:
                of_offsets = of_locations / self.normalizer
            return of_value, of_offsets.to(offsets.dtype), of_logits.to(logits.dtype)

        return gradients


class Fused:
    """The fused operator; with `packed`, offsets and logits are in one array."""

    def __init__(self, inputs: FusedInputs, packed: bool = False) -> None:
        value, shapes, starts, references, offsets, logits, grad_output = inputs
        if packed:
            offsets, logits = torch.cat((offsets.flatten(3), logits.flatten(3)), -1), None
        arguments = Arguments(value, shapes, starts, references, offsets, logits, names=FUSED_NAMES)
        self.call = validate.read(arguments, grad_output, ALL)

    def forward(self) -> Tensor:
        return api.forward(self.call)

    def prepare_backward(self) -> Callable[[], tuple[Tensor, ...]]:
        return lambda: api.backward(self.call)


def calls_by_name(workload: cases.Workload, dtype: str) -> dict[str, list[Unfused | Fused]]:
    """What is timed: for each name one object per set of inputs."""
    calls: dict[str, list[Unfused | Fused]] = {}
    for references in ("points", "boxes"):
        make = functools.partial(cases.make_fused_inputs, boxes=references == "boxes")
        inputs = cases.input_sets(workload, DTYPES[dtype], "cuda", make)
        calls[f"{references}, unfused"] = [Unfused(one, DTYPES[dtype]) for one in inputs]
        if dtype in SIXTEEN_BIT_DTYPES:
            calls[f"{references}, unfused in float32"] = [Unfused(one, torch.float32) for one in inputs]
        calls[f"{references}, fused"] = [Fused(one) for one in inputs]
        calls[f"{references}, fused, packed"] = [Fused(one, packed=True) for one in inputs]
    return calls


def step_memory(inputs: FusedInputs, fused: bool) -> int:
    """Peak bytes of a forward and a backward, in addition to inputs and gradients."""
    value, shapes, starts, references, offsets, logits, grad_output = inputs
    leaves = [tensor.clone().requires_grad_() for tensor in (value, offsets, logits)]

    def step() -> None:
        if fused:
            output = cupy_msda.torch.ms_deform_attn_fused(leaves[0], shapes, starts, references, *leaves[1:])
        else:
            one = Unfused(
                inputs._replace(value=leaves[0], sampling_offsets=leaves[1], attention_logits=leaves[2]), value.dtype
            )
            output = cupy_msda.torch.ms_deform_attn(leaves[0], shapes, starts, *one.samples())
        output.backward(grad_output)

    step()
    for leaf in leaves:
        leaf.grad = None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    torch.cuda.synchronize()
    size = sum(leaf.numel() * leaf.element_size() for leaf in leaves)
    return torch.cuda.max_memory_allocated() - before - size


def measure_fused(workload: cases.Workload, dtype: str, repeats: int) -> dict[str, Any]:
    """The record of one workload and dtype."""
    record: dict[str, Any] = {"workload": workload.name, "dtype": dtype}
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        named = calls_by_name(workload, dtype)
        forwards = {name: [one.forward for one in calls] for name, calls in named.items()}
        backwards = {name: [one.prepare_backward() for one in calls] for name, calls in named.items()}
        record["forward"] = interleaved(forwards, "cuda", stream, repeats)
        record["backward"] = interleaved(backwards, "cuda", stream, repeats)
    inputs = cases.make_fused_inputs(workload, DTYPES[dtype], "cuda")
    record["step_bytes"] = {name: step_memory(inputs, name == "fused") for name in ("unfused", "fused")}
    return record


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.fused", description=__doc__)
    parser.add_argument("--workloads", nargs="+", help="names from workloads.json; default: all")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=["float32", "float16", "bfloat16"])
    parser.add_argument("--repeats", type=int, default=9, help="samples per time")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    options = parser.parse_args(arguments)
    workloads = cases.load(cases.WORKLOADS)
    result: dict[str, Any] = {"provenance": provenance("cuda"), "records": []}
    for name in options.workloads or workloads:
        for dtype in options.dtypes:
            record = measure_fused(workloads[name], dtype, options.repeats)
            result["records"].append(record)
            for direction in ("forward", "backward"):
                times = {call: round(found["median_us"], 1) for call, found in record[direction].items()}
                print(name, dtype, direction, times, flush=True)
            print(name, dtype, "bytes per step", record["step_bytes"], flush=True)
            if options.out:
                options.out.write_text(json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
