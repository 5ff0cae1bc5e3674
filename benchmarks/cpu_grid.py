"""python -m benchmarks.cpu_grid: the CPU path against a composition of torch's grid_sample, on drawn cells.

The seed is the hash of the measured commit, so that nothing is tuned for the cells. Each cell is measured in this
process with the same threads; both implementations are checked against each other first. The command goes on where it
was stopped: cells of the file named by `--out` are not measured again.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import random
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cupy_msda.cpu import tier
from cupy_msda.torch import ms_deform_attn, ms_deform_attn_fused
from cupy_msda.torch.exportable import grid_sample_attention

from .implementations import torch_ms_deform_attn
from .provenance import provenance
from .timing import UNTIMED_SECONDS

LEVELS = (
    ((8, 8),),
    ((36, 36),),
    ((16, 16), (8, 8)),
    ((80, 80), (40, 40), (20, 20)),
    ((100, 134), (50, 67), (25, 34), (13, 17)),
    ((48, 64), (24, 32), (12, 16), (6, 8), (3, 4)),
)
HEADS = ((8, 32), (16, 16), (4, 64), (8, 16), (1, 8))
DTYPES = {"float32": 6, "float64": 1, "bfloat16": 2, "float16": 1}  # how often
GRADIENTS = ("all", "value", "locations", "weights")
# Most elements of a value, and most samples, so that a cell takes seconds.
MAX_ELEMENTS, MAX_SAMPLES = 1 << 25, 1 << 22
# A call may take longer than the composition by a tenth, or by so many seconds. Training is a forward that records and
# its backward: what one of them keeps, or computes again for the other, counts once.
MARGIN = {"forward": 100e-6, "backward": 300e-6, "training": 400e-6}
LEAST_SECONDS, MOST_REPEATS = 0.15, 200
COUNTED_SECONDS = 1e-3
TOLERANCE = {"float64": 1e-9, "float32": 1e-3, "float16": 2e-2, "bfloat16": 1e-1}


@dataclass(frozen=True)
class Cell:
    """One problem. `gradient` says which gradient the backward computes."""

    levels: tuple[tuple[int, int], ...]
    N: int
    Q: int
    M: int
    D: int
    P: int
    dtype: str
    fused: bool
    gradient: str


def drawn(count: int, seed: str) -> list[Cell]:
    """Cells of the space: logarithmic in N and Q, Q = S in a fifth of them."""
    pick, found = random.Random(seed), []
    while len(found) < count:
        levels, (M, D) = pick.choice(LEVELS), pick.choice(HEADS)
        S, P = sum(h * w for h, w in levels), pick.randint(1, 8)
        N = round(math.exp(pick.uniform(0, math.log(3000))))
        Q = S if pick.random() < 0.2 else round(math.exp(pick.uniform(0, math.log(22223))))
        dtype = pick.choices(list(DTYPES), list(DTYPES.values()))[0]
        cell = Cell(levels, N, Q, M, D, P, dtype, pick.random() < 0.3, pick.choice(GRADIENTS))
        if N * S * M * D <= MAX_ELEMENTS and N * Q * M * len(levels) * P <= MAX_SAMPLES:
            found.append(cell)
    return found


def measure(cell: Cell) -> dict[str, Any]:
    """Medians of all implementations in seconds, by direction."""
    calls, leaves, grad_output = calls_of(cell)
    record: dict[str, Any] = {"cell": asdict(cell)}
    with torch.no_grad():
        forward = median_seconds(list(calls.values()))
    outputs = [call() for call in calls.values()]

    def gradients(output: Tensor, kept: bool) -> Any:
        return torch.autograd.grad(output, leaves, grad_output, retain_graph=kept, allow_unused=True)

    seconds = {
        "forward": forward,
        "backward": median_seconds([functools.partial(gradients, output, kept=True) for output in outputs]),
        "training": median_seconds([lambda call=call: gradients(call(), kept=False) for call in calls.values()]),
    }
    for direction, medians in seconds.items():
        record |= {f"{name} {direction}": median for name, median in zip(calls, medians, strict=True)}
    have, want = (output.detach().double() for output in outputs[:2])
    error = float((have - want).norm() / want.norm())
    return record | {"error": error, "valid": error < TOLERANCE[cell.dtype]}


def calls_of(cell: Cell) -> tuple[dict[str, Callable[[], Tensor]], list[Tensor], Tensor]:
    """Ours, the composition, and the C++ of torch-ms-deform-attn if it is installed; leaves; gradient of the output."""
    generator, dtype = torch.Generator().manual_seed(0), getattr(torch, cell.dtype)
    L, S = len(cell.levels), sum(h * w for h, w in cell.levels)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator).to(dtype)

    value = uniform(cell.N, S, cell.M, cell.D)
    shape = (cell.N, cell.Q, cell.M, L, cell.P)
    weights, samples, references = uniform(*shape), uniform(*shape, 2), uniform(cell.N, cell.Q, L, 2)
    if cell.fused:
        samples = (samples - 0.5) * 8  # pixels
    named = {"value": value, "locations": samples, "weights": weights}
    leaves = [tensor.requires_grad_() for name, tensor in named.items() if cell.gradient in ("all", name)]
    sizes = torch.tensor([(w, h) for h, w in cell.levels], dtype=dtype)
    shapes = torch.tensor(cell.levels)
    starts = torch.cat((shapes.new_zeros(1), shapes.prod(1).cumsum(0)[:-1]))
    # torch 2.13's grid_sample of 16 bits may read outside of its memory, and end the process.
    wide = torch.float32 if cell.dtype in ("float16", "bfloat16") else dtype
    extension = torch_ms_deform_attn().function

    def ours() -> Tensor:
        if cell.fused:
            return ms_deform_attn_fused(value, cell.levels, None, references, samples, weights)
        return ms_deform_attn(value, cell.levels, None, samples, weights)

    def plain() -> tuple[Tensor, Tensor]:
        if not cell.fused:
            return samples, weights
        locations = references[:, :, None, :, None] + samples / sizes[:, None]
        return locations, weights.flatten(3).softmax(-1).view(weights.shape)

    def theirs() -> Tensor:
        locations, attention = plain()
        return grid_sample_attention(value.to(wide), cell.levels, locations.to(wide), attention.to(wide)).to(dtype)

    calls = {"ours": ours, "grid_sample": theirs}
    if extension is not None:
        calls["torch-ms-deform-attn"] = lambda: extension(value, shapes, starts, *plain())
    return calls, leaves, uniform(cell.N, cell.Q, cell.M * cell.D)


def median_seconds(calls: list[Callable[[], Any]]) -> list[float]:
    """Medians of calls, each until it took `LEAST_SECONDS`, at least three times.

    One after the other, each after untimed calls: torch's threads spin for some milliseconds after their work, and
    would take a core from the implementation that comes next.
    """
    medians = []
    for call in calls:
        begin, taken = time.perf_counter(), []
        call()
        while time.perf_counter() - begin < UNTIMED_SECONDS:
            call()
        while len(taken) < 3 or (sum(taken) < LEAST_SECONDS and len(taken) < MOST_REPEATS):
            begin = time.perf_counter()
            call()
            taken.append(time.perf_counter() - begin)
        medians.append(statistics.median(taken))
    return medians


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """By implementation that ours is compared with, and direction."""
    names = [name.removesuffix(" forward") for name in rows[0] if name.endswith(" forward") and "ours" not in name]
    return {name: {direction: compared(rows, name, direction) for direction in MARGIN} for name in names}


def compared(rows: list[dict[str, Any]], name: str, direction: str) -> dict[str, Any]:
    """Geometric mean of the speed-up where the other takes more than 1 ms, and the cells in which ours is slower."""
    pairs = [(row[f"ours {direction}"], row[f"{name} {direction}"]) for row in rows]
    ratios = [theirs / ours for ours, theirs in pairs if theirs > COUNTED_SECONDS]
    slower = [ours > max(1.1 * theirs, theirs + MARGIN[direction]) for ours, theirs in pairs]
    return {
        "cells": len(pairs),
        "counted": len(ratios),
        "geometric_mean": round(math.exp(statistics.mean(map(math.log, ratios))), 2) if ratios else None,
        "slower": sum(slower),
        "counted_slower": sum(ratio < 1 for ratio in ratios),
        "worst": round(min((theirs / ours for ours, theirs in pairs), default=math.nan), 3),
    }


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cpu_grid", description=__doc__)
    parser.add_argument("--cells", type=int, default=100)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seconds", type=float, default=480, help="stop after so many")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    result = {"provenance": provenance("cpu"), "tier": tier.describe(), "rows": []}
    if options.out.exists():
        result = json.loads(options.out.read_text())
    seed, begin = result["provenance"]["commit"], time.perf_counter()
    for cell in drawn(options.cells, seed)[len(result["rows"]) :]:
        if time.perf_counter() - begin > options.seconds:
            break
        result["rows"].append(measure(cell))
        result["summary"] = summary(result["rows"])
        options.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result["summary"], indent=1))


if __name__ == "__main__":
    main()
