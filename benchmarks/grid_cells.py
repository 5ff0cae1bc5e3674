"""Cells of the GPU grid: problems drawn from what detectors, segmenters and bird's-eye views ask for."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass

import torch

from .cases import Draw, FusedInputs, Inputs, Workload, local_offsets, pixel_centres

SCALES_640 = ((80, 80), (40, 40), (20, 20))
SCALES_800 = ((100, 167), (50, 84), (25, 42), (13, 21))
HEADS = ((8, 32), (16, 16), (4, 64), (6, 64), (8, 64), (8, 128), (6, 48))
#: Of 20 cells, so many have these sampling points.
SAMPLING = {"local": 12, "clustered": 4, "uniform": 3, "degenerate": 1}
DTYPES = ("float32", "float16", "bfloat16")
CLUSTER_SIDE = math.sqrt(0.1)  # all queries in a tenth of the image
# Most elements of value, and most products of samples and channels, so that a cell takes less than a second.
MAX_ELEMENTS, MAX_PRODUCTS = 1 << 28, 1 << 31


@dataclass(frozen=True)
class Cell:
    """One problem; `kind` names the levels."""

    kind: str
    levels: tuple[tuple[int, int], ...]
    N: int
    Q: int
    M: int
    D: int
    P: int
    dtype: str
    sampling: str
    fused: bool

    @property
    def S(self) -> int:
        return sum(h * w for h, w in self.levels)

    @property
    def elements(self) -> int:
        """Of value."""
        return self.N * self.S * self.M * self.D

    @property
    def products(self) -> int:
        """Samples times channels."""
        return self.N * self.Q * self.M * len(self.levels) * self.P * self.D

    def __str__(self) -> str:
        front = " fused" if self.fused else ""
        return f"{self.kind} N={self.N} Q={self.Q} M={self.M} D={self.D} P={self.P} {self.sampling} {self.dtype}{front}"


def drawn(count: int, seed: str) -> list[Cell]:
    """So many cells. The shares of the sampling are exact in every 20 of them."""
    pick, found = random.Random(seed), []
    while len(found) < count:
        kinds = [name for name, times in SAMPLING.items() for _ in range(times)]
        pick.shuffle(kinds)
        found += [_cell(pick, sampling) for sampling in kinds]
    return found[:count]


def _cell(pick: random.Random, sampling: str) -> Cell:
    while True:
        kind, levels = _levels(pick)
        M, D = pick.choice(HEADS)
        S = sum(h * w for h, w in levels)
        N = _logarithmic(pick, 1, 64)
        Q = S if pick.random() < 0.2 else _logarithmic(pick, 50, 40_000)
        fused = pick.random() < 0.3
        cell = Cell(kind, levels, N, Q, M, D, pick.randint(1, 8), pick.choice(DTYPES), sampling, fused)
        if cell.elements <= MAX_ELEMENTS and cell.products <= MAX_PRODUCTS:
            return cell


def _levels(pick: random.Random) -> tuple[str, tuple[tuple[int, int], ...]]:
    kind = pick.choice(("640x640", "800x1333", "800x1333, five scales", "one level", "bird's-eye view", "series"))
    if kind == "640x640":
        return kind, SCALES_640
    if kind.startswith("800x1333"):
        return kind, ((200, 334), *SCALES_800) if "five" in kind else SCALES_800
    if kind == "series":
        return kind, ((1, _logarithmic(pick, 500, 20_000)),)
    side = pick.randint(20, 64) if kind == "one level" else pick.randint(100, 200)
    return kind, ((side, side),)


def _logarithmic(pick: random.Random, low: int, high: int) -> int:
    return round(math.exp(pick.uniform(math.log(low), math.log(high))))


def inputs_of(cell: Cell, device: str, seed: int = 0) -> Inputs | FusedInputs:
    """Random inputs, all in the cell's dtype."""
    draw, dtype = Draw(device, seed), getattr(torch, cell.dtype)
    N, Q, M, L, P = cell.N, cell.Q, cell.M, len(cell.levels), cell.P
    shapes = torch.tensor(cell.levels, device=device)
    starts = shapes.prod(1).cumsum(0) - shapes.prod(1)
    sizes = shapes.flip(-1)[:, None]  # (W, H) of each level
    pixels = Q == cell.S
    references = pixel_centres(cell.levels, device).expand(N, Q, 2) if pixels else draw.uniform(N, Q, 2)
    offsets = local_offsets(Workload("", N, M, cell.D, cell.levels, P, Q, cell.sampling), draw)
    if cell.sampling == "clustered":
        references = (1 - CLUSTER_SIDE) * draw.uniform(N, 1, 2) + CLUSTER_SIDE * references
    elif cell.sampling == "uniform":
        offsets = (draw.uniform(N, Q, M, L, P, 2) - references[:, :, None, None, None]) * sizes
    elif cell.sampling == "degenerate":
        references, offsets = torch.full_like(references, 0.4012), torch.zeros_like(offsets)
    value, grad_output = draw.normal(N, cell.S, M, cell.D).to(dtype), draw.normal(N, Q, M * cell.D).to(dtype)
    logits = draw.normal(N, Q, M, L, P)
    if cell.fused:
        per_level = references[:, :, None].expand(N, Q, L, 2).contiguous()
        samples = (per_level.to(dtype), offsets.to(dtype), logits.to(dtype))
        return FusedInputs(value, shapes, starts, *samples, grad_output)
    locations = references[:, :, None, None, None] + offsets / sizes
    weights = logits.flatten(3).softmax(-1).view(N, Q, M, L, P)
    return Inputs(value, shapes, starts, locations.to(dtype), weights.to(dtype), grad_output)
