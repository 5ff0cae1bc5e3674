"""python -m benchmarks.grid: the operator against its peers on a GPU, on drawn cells.

The seed is the hash of the measured commit, so that nothing is tuned for the cells (``grid_cells.py``). In each cell
all implementations run in this process, their samples alternate, and their results are compared with this package's in
float64. Of its backward, every way to sum the gradient of value is timed too: `ours` is what a user gets.

The command goes on where it was stopped: cells in the file named by `--out` are not measured again. `--compile N` only
compiles, with N processes, what the cells need. `--repeat` measures the cells of a complete file once more in which a
peer was faster.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from multiprocessing import get_context
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from cupy_msda import api, validate
from cupy_msda.call import ALL, FUSED_NAMES, OPERATOR_NAMES, Arguments
from cupy_msda.cuda import cost_model, run

from .cases import FusedInputs, Inputs
from .grid_cells import Cell, drawn, inputs_of
from .grid_report import WAYS, slower_cells, summary
from .implementations import deformops, torch_ms_deform_attn
from .provenance import provenance
from .timing import interleaved

COLD_BYTES, MAX_INPUTS = 192 << 20, 4
REPEATS = 7


class Ours:
    """The operator of this package on the inputs of a cell."""

    def __init__(self, inputs: Inputs | FusedInputs, *, way: str | None = None, deterministic: bool = False) -> None:
        fused = isinstance(inputs, FusedInputs)
        value, shapes, starts, *samples, grad_output = inputs
        references = samples.pop(0) if fused else None
        arguments = Arguments(
            value,
            shapes,
            starts,
            references,
            *samples,
            deterministic=deterministic,
            names=FUSED_NAMES if fused else OPERATOR_NAMES,
        )
        self.call = validate.read(arguments, grad_output, ALL._replace(references=fused))
        self.way = way
        self.prepared: dict[Any, Any] = {}

    def forward(self) -> Tensor:
        return api.forward(self.call)

    def backward(self) -> tuple[Tensor, ...]:
        """Gradients of value, locations or offsets, weights or logits, and of reference points in a fused call."""
        if self.way is None:
            gradients = api.backward(self.call)
        else:
            with (
                mock.patch.object(cost_model, "fastest_way", return_value=self.way),
                mock.patch.object(run, "_prepared", self.prepared),
            ):
                gradients = api.backward(self.call)
        return tuple(gradient for gradient in gradients if gradient is not None)


class Peer:
    """Another operator, a differentiable function of (value, shapes, starts, locations, weights)."""

    def __init__(self, inputs: Inputs | FusedInputs, function: Callable[..., Tensor]) -> None:
        value, shapes, starts, *samples, self.grad_output = inputs
        fused = isinstance(inputs, FusedInputs)
        if fused:
            samples = [*samples[1:], samples[0]]
        self.leaves = [tensor.detach().requires_grad_() for tensor in (value, *samples)]
        sizes = shapes.flip(-1)[:, None].to(value.dtype)

        def operator() -> Tensor:
            value, locations, weights = self.leaves[:3]
            if fused:
                locations = self.leaves[3][:, :, None, :, None] + locations / sizes
                weights = weights.flatten(3).softmax(-1).view(weights.shape)
            return function(value, shapes, starts, locations, weights)

        self.operator, self.output = operator, operator()

    def forward(self) -> Tensor:
        with torch.no_grad():
            return self.operator()

    def backward(self) -> tuple[Tensor, ...]:
        """The same gradients, in the same order."""
        return torch.autograd.grad(self.output, self.leaves, self.grad_output, retain_graph=True)


def peers() -> dict[str, Callable[..., Tensor]]:
    """What is installed, by its name."""
    known = (deformops(), deformops(float32_sums=True), torch_ms_deform_attn())
    return {peer.name: peer.function for peer in known if peer.unavailable("cuda") is None}


def implementations(inputs: Inputs | FusedInputs, ways: bool = True) -> dict[str, Ours | Peer]:
    """All of them on these inputs, by name."""
    found: dict[str, Ours | Peer] = {"ours": Ours(inputs), "deterministic": Ours(inputs, deterministic=True)}
    if ways:
        found |= {way: Ours(inputs, way=way) for way in WAYS}
    for name, function in peers().items():
        try:
            found[name] = Peer(inputs, function)
        except Exception as refused:  # of whatever class: not every peer takes every size
            print(f"{name}: {type(refused).__name__}: {refused}"[:200])
    return found


def errors_of(found: Ours | Peer, want: list[Tensor]) -> dict[str, float]:
    """The norm of the difference over the norm, in float64, of the output and of each gradient.

    The gradient of a single logit is nothing but rounding, and left out.
    """
    have = [found.forward(), *found.backward()]
    names = ("output", "value", "locations", "weights", "references")
    return {
        name: float((a.double().flatten() - b.flatten()).norm() / b.norm())
        for name, a, b in zip(names, have, want, strict=False)
        if b.norm() > 1e-9 * b.numel() ** 0.5
    }


def measure(cell: Cell) -> dict[str, Any]:
    """Times in microseconds and errors of all implementations."""
    bytes_of_value = cell.elements * (4 if cell.dtype == "float32" else 2)
    count = max(1, min(MAX_INPUTS, -(-COLD_BYTES // bytes_of_value)))
    # torch's backward runs on the stream of its forward, which is to be captured.
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        sets = [implementations(inputs_of(cell, "cuda", seed)) for seed in range(count)]
    torch.cuda.synchronize()
    inputs = inputs_of(cell, "cuda")
    exact = Ours(type(inputs)(*(t.double() if t.is_floating_point() else t for t in inputs)))
    want = [exact.forward(), *exact.backward()]
    record: dict[str, Any] = {"cell": asdict(cell), "name": str(cell)}
    record["errors"] = {name: errors_of(found, want) for name, found in sets[0].items()}
    del exact, want
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        names = [name for name in sets[0] if name not in WAYS and name != "deterministic"]
        forward = {name: [one[name].forward for one in sets] for name in names}
        backward = {name: [one[name].backward for one in sets] for name in sets[0]}
        for direction, calls in (("forward", forward), ("backward", backward)):
            times = interleaved(calls, "cuda", stream, REPEATS)
            record[direction] = {name: round(time["median_us"], 2) for name, time in times.items()}
    torch.cuda.empty_cache()
    return record


def compile_cell(cell: Cell) -> str | None:
    """Compiles what a cell needs, into the caches on the disk; the reason where that fails."""
    try:
        for found in implementations(inputs_of(cell, "cuda")).values():
            found.forward()
            found.backward()
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
    except Exception as error:
        return f"{cell}: {type(error).__name__}: {error}"[:300]
    return None


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.grid", description=__doc__)
    parser.add_argument("--cells", type=int, default=200)
    parser.add_argument("--seed", help="instead of the commit")
    parser.add_argument("--seconds", type=float, default=480, help="stop after so many")
    parser.add_argument("--compile", type=int, default=0, metavar="N", help="only compile, in N processes")
    parser.add_argument("--repeat", action="store_true", help="measure again where a peer was faster")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args(arguments)
    begin = time.perf_counter()
    result: dict[str, Any] = {"provenance": provenance("cuda"), "rows": []}
    if options.out.exists():
        result = json.loads(options.out.read_text())
    cells = drawn(options.cells, options.seed or result["provenance"]["commit"])
    record = result
    if options.repeat:
        cells = [cell for cell in cells if str(cell) in slower_cells(result["rows"])]
        record = result.setdefault("repeat", {"provenance": provenance("cuda"), "rows": []})
    if options.compile:
        with ProcessPoolExecutor(options.compile, get_context("spawn")) as pool:
            for problem in filter(None, pool.map(compile_cell, cells)):
                print(problem)
        print(f"compiled in {time.perf_counter() - begin:.0f} s")
        return
    for cell in cells[len(record["rows"]) :]:
        if time.perf_counter() - begin > options.seconds:
            break
        record["rows"].append(measure(cell))
        options.out.write_text(json.dumps(result) + "\n")
    result["summary"] = summary(result)
    options.out.write_text(json.dumps(result) + "\n")
    print(json.dumps(result["summary"], indent=1))


if __name__ == "__main__":
    main()
