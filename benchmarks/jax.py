"""python -m benchmarks.jax: kernel time, host time and a training step with JAX, and with torch, on a GPU."""

from __future__ import annotations

import argparse
import json
import os
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import jax
import jax.numpy as jnp
import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile

import cupy_msda.jax
import cupy_msda.torch

from . import cases, jax_layers
from .provenance import provenance
from .timing import summary

WORKLOADS = ("encoder_800x1333", "decoder_300", "rtdetr_640")
DTYPES = ("float32", "bfloat16")
CALLS = 20


def to_jax(tensor: torch.Tensor) -> jax.Array:
    return jnp.asarray(tensor.float().cpu().numpy()).astype(str(tensor.dtype).removeprefix("torch."))


def kernel_seconds(call: Callable[[], Any]) -> dict[str, float]:
    """Seconds per call of each kernel."""
    call()
    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        for _ in range(CALLS):
            result = call()
        jax.block_until_ready(result)
        torch.cuda.synchronize()
    found: dict[str, float] = defaultdict(float)
    for event in profiled.events():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            found[event.name] += event.device_time / CALLS * 1e-6
    return dict(found)


def operator_calls(workload: cases.Workload, dtype: str) -> dict[str, Callable[[], Any]]:
    """A forward and a backward of one problem, in torch and in JAX."""
    value, shapes, starts, locations, weights, grad_output = cases.make_inputs(workload, getattr(torch, dtype), "cuda")
    leaves = [tensor.clone().requires_grad_() for tensor in (value, locations, weights)]

    def in_torch() -> Any:
        output = cupy_msda.torch.ms_deform_attn(leaves[0], shapes, starts, *leaves[1:])
        return torch.autograd.grad(output, leaves, grad_output)

    arrays = [to_jax(tensor) for tensor in (value, locations, weights, grad_output)]

    @jax.jit
    def both(value: Any, locations: Any, weights: Any, grad_output: Any) -> Any:
        def function(*given: Any) -> Any:
            return cupy_msda.jax.ms_deform_attn(given[0], workload.levels, None, *given[1:])

        output, pullback = jax.vjp(function, value, locations, weights)
        return output, pullback(grad_output)

    return {"torch": in_torch, "jax": lambda: both(*arrays)}


def kernels(repeats: int) -> list[dict[str, Any]]:
    """The kernel time of each workload, and of the kernels that both have."""
    records = []
    for name, workload in cases.load().items():
        if name not in WORKLOADS:
            continue
        for dtype in DTYPES:
            calls = operator_calls(workload, dtype)
            samples: dict[str, list[dict[str, float]]] = {"torch": [], "jax": []}
            for _ in range(repeats):
                for framework, call in calls.items():
                    samples[framework].append(kernel_seconds(call))
            common = set(samples["torch"][0]) & set(samples["jax"][0])
            medians = {
                framework: {kernel: float(np.median([one.get(kernel, 0.0) for one in found])) for kernel in found[0]}
                for framework, found in samples.items()
            }
            of_operator = {
                framework: 1e6 * sum(seconds for kernel, seconds in found.items() if kernel in common)
                for framework, found in medians.items()
            }
            others = {
                framework: {kernel[:80]: 1e6 * s for kernel, s in found.items() if kernel not in common}
                for framework, found in medians.items()
            }
            records.append({"workload": name, "dtype": dtype, "operator_us": of_operator, "others_us": others})
            print(records[-1], flush=True)
    return records


def host_times(repeats: int) -> list[dict[str, Any]]:
    """Host time of a jitted call, of an empty jitted function and of the array function, in samples that alternate."""
    workload = cases.load()["tiny_call"]
    value, _, _, locations, weights, grad_output = map(to_jax, cases.make_inputs(workload, torch.float32, "cuda"))

    def function(*given: Any) -> Any:
        return cupy_msda.jax.ms_deform_attn(given[0], workload.levels, None, *given[1:])

    def gradients(value: Any, locations: Any, weights: Any, grad_output: Any) -> Any:
        return jax.vjp(function, value, locations, weights)[1](grad_output)

    forward, backward = jax.jit(function), jax.jit(gradients)
    empty = jax.jit(lambda value, locations, weights: weights[:, :, :, 0, 0])
    empty_gradients = jax.jit(lambda value, locations, weights, grad_output: (-value, -locations, -weights))
    calls: dict[str, Callable[[], Any]] = {
        "empty": lambda: empty(value, locations, weights),
        "forward": lambda: forward(value, locations, weights),
        "empty with three results": lambda: empty_gradients(value, locations, weights, grad_output),
        "backward": lambda: backward(value, locations, weights, grad_output),
        "eager": lambda: function(value, locations, weights),
        "array function": lambda: cupy_msda.ms_deform_attn(value, workload.levels, None, locations, weights),
    }
    samples: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(repeats):
        for name, call in calls.items():
            jax.block_until_ready(call())
            begin = time.perf_counter()
            for _ in range(100):
                result = call()
            samples[name].append((time.perf_counter() - begin) / 100)
            jax.block_until_ready(result)
    return [{"call": name, **summary(found)} for name, found in samples.items()]


def steps(repeats: int) -> dict[str, Any]:
    """Seconds of a training step of an encoder layer; the three layers have the same parameters and inputs."""
    torch.backends.cuda.matmul.allow_tf32 = True
    workload = cases.load()["encoder_800x1333"]
    torch.manual_seed(0)
    layer = jax_layers.TorchLayer(workload.levels).cuda()
    features = torch.randn(workload.N, workload.S, jax_layers.CHANNELS, device="cuda")
    points = jax_layers.reference_points(workload.levels)
    given, of_jax = jax_layers.parameters_of(layer), to_jax(features)
    references, of_torch = jnp.asarray(points), torch.from_numpy(points.copy()).cuda()
    compiled = {
        "jax": jax_layers.jax_step(jax_layers.with_kernels, workload.levels),
        "jax, gather": jax_layers.jax_step(jax_layers.with_gather, workload.levels),
    }
    in_torch = jax_layers.torch_step(layer, workload.levels)
    losses = {name: float(step(given, of_jax, references)[1]) for name, step in compiled.items()}
    losses["torch"] = float(in_torch(features, of_torch))
    samples: dict[str, list[float]] = {name: [] for name in losses}
    for _ in range(repeats):
        for name in samples:
            count = 3 if name == "jax, gather" else 10
            torch.cuda.synchronize()
            begin = time.perf_counter()
            for _ in range(count):
                if name == "torch":
                    in_torch(features, of_torch)
                else:
                    result = compiled[name](given, of_jax, references)
            jax.block_until_ready(result)
            torch.cuda.synchronize()
            samples[name].append((time.perf_counter() - begin) / count)
    return {"losses": losses, "steps": [{"layer": name, **summary(found)} for name, found in samples.items()]}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.jax", description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--repeats", type=int, default=5, help="samples per time")
    options = parser.parse_args()
    result: dict[str, Any] = {"provenance": provenance("cuda")}
    for name, measure in (("host", host_times), ("layers", steps), ("kernels", kernels)):
        result[name] = measure(options.repeats)
        print(name, json.dumps(result[name], indent=1), flush=True)
        options.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
