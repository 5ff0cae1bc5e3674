"""Workloads: sizes from a JSON file, and inputs of these sizes as torch tensors."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

WORKLOADS = Path(__file__).with_name("workloads.json")


@dataclass(frozen=True)
class Workload:
    """Sizes of one workload; see ``workloads.json`` for what the fields mean."""

    name: str
    N: int
    M: int
    D: int
    levels: tuple[tuple[int, int], ...]
    P: int
    queries: int | None
    sampling: str
    sigma: float = 1.0
    model: str = ""

    @property
    def S(self) -> int:
        return sum(h * w for h, w in self.levels)

    @property
    def Q(self) -> int:
        return self.S if self.queries is None else self.queries

    @property
    def samples(self) -> int:
        return self.N * self.Q * self.M * len(self.levels) * self.P


class Inputs(NamedTuple):
    """One set of arguments of the operator."""

    value: Tensor
    spatial_shapes: Tensor
    level_start_index: Tensor
    sampling_locations: Tensor
    attention_weights: Tensor
    grad_output: Tensor


class FusedInputs(NamedTuple):
    """One set of arguments of the fused operator, offsets in pixels."""

    value: Tensor
    spatial_shapes: Tensor
    level_start_index: Tensor
    reference_points: Tensor
    sampling_offsets: Tensor
    attention_logits: Tensor
    grad_output: Tensor


AnyInputs = TypeVar("AnyInputs", Inputs, FusedInputs)


def load(path: Path = WORKLOADS) -> dict[str, Workload]:
    """The workloads of a file in the form of ``workloads.json``."""
    workloads = {}
    for name, fields in json.loads(Path(path).read_text())["workloads"].items():
        levels = tuple(tuple(level) for level in fields.pop("levels"))
        workloads[name] = Workload(name=name, levels=levels, **fields)
    return workloads


# Images per call on the CPU; one where a workload is not listed.
_CPU_IMAGES = {"rtdetr_640": 2}


def on_cpu(workload: Workload) -> Workload:
    """The same workload with the number of images that is measured on a CPU."""
    return replace(workload, N=_CPU_IMAGES.get(workload.name, 1))


def make_inputs(workload: Workload, dtype: torch.dtype, device: str, seed: int = 0) -> Inputs:
    """Random inputs as the workload file describes them, all in `dtype`."""
    draw = Draw(device, seed)
    N, Q, M, P, L = workload.N, workload.Q, workload.M, workload.P, len(workload.levels)
    shapes = torch.tensor(workload.levels, device=device)
    if workload.sampling == "uniform":
        locations = draw.uniform(N, Q, M, L, P, 2)
    else:
        reference = _reference_points(workload, draw)
        locations = reference[..., None, None, None, :] + local_offsets(workload, draw) / shapes.flip(-1)[:, None, :]
    weights = draw.normal(N, Q, M, L * P).softmax(-1).view(N, Q, M, L, P)
    value, grad_output = draw.normal(N, workload.S, M, workload.D), draw.normal(N, Q, M * workload.D)
    samples = locations.to(dtype), weights.to(dtype)
    return Inputs(value.to(dtype), shapes, _starts(shapes), *samples, grad_output.to(dtype))


def make_fused_inputs(
    workload: Workload, dtype: torch.dtype, device: str, seed: int = 0, *, boxes: bool = False
) -> FusedInputs:
    """Samples like those of `make_inputs` as a model's projections give them: offsets and logits, all in `dtype`."""
    draw = Draw(device, seed)
    N, Q, M, P, L = workload.N, workload.Q, workload.M, workload.P, len(workload.levels)
    shapes = torch.tensor(workload.levels, device=device)
    if workload.sampling == "uniform":
        references, offsets = draw.uniform(N, Q, 2), draw.uniform(N, Q, M, L, P, 2) - 0.5
        offsets = offsets * shapes.flip(-1)[:, None, :]
    else:
        references, offsets = _reference_points(workload, draw).expand(N, Q, 2), local_offsets(workload, draw)
    references = references[:, :, None].expand(N, Q, L, 2)
    if boxes:
        sizes = (0.05 + 0.2 * draw.uniform(N, Q, 1, 2)).expand(N, Q, L, 2)
        references, offsets = torch.cat((references, sizes), -1), offsets / P
    logits = draw.normal(N, Q, M, L, P)
    value, grad_output = draw.normal(N, workload.S, M, workload.D), draw.normal(N, Q, M * workload.D)
    samples = references.to(dtype).contiguous(), offsets.to(dtype), logits.to(dtype)
    return FusedInputs(value.to(dtype), shapes, _starts(shapes), *samples, grad_output.to(dtype))


class Draw:
    """Random numbers on a device, from a seed."""

    def __init__(self, device: str, seed: int) -> None:
        self.device = device
        self._generator = torch.Generator(device).manual_seed(seed)

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self._generator, device=self.device)

    def uniform(self, *shape: int) -> Tensor:
        return torch.rand(shape, generator=self._generator, device=self.device)


def _reference_points(workload: Workload, draw: Draw) -> Tensor:
    if workload.queries is None:
        return pixel_centres(workload.levels, draw.device)
    return draw.uniform(workload.N, workload.Q, 2)


def local_offsets(workload: Workload, draw: Draw) -> Tensor:
    """Offsets of local sampling in pixels."""
    N, Q, M, P, L = workload.N, workload.Q, workload.M, workload.P, len(workload.levels)
    angle = torch.arange(M, device=draw.device) * (2 * math.pi / M)
    direction = torch.stack((angle.cos(), angle.sin()), -1)
    direction = direction / direction.abs().amax(-1, keepdim=True)
    steps = torch.arange(1, P + 1, device=draw.device)
    offsets = direction[:, None, None, :] * steps[:, None]
    return offsets + workload.sigma * draw.normal(N, Q, M, L, P, 2)


def _starts(shapes: Tensor) -> Tensor:
    sizes = shapes.prod(1)
    return sizes.cumsum(0) - sizes


# Successive calls of a timing use different inputs, in all more bytes than any L2 cache holds.
INPUT_SET_BYTES = 256 << 20


def input_sets(
    workload: Workload, dtype: torch.dtype, device: str, make: Callable[..., AnyInputs] = make_inputs
) -> list[AnyInputs]:
    """Inputs with seeds 0, 1, ...: on a GPU up to six, enough to keep the L2 cache cold; on a CPU one."""
    first = make(workload, dtype, device)
    size = sum(t.numel() * t.element_size() for t in first)
    count = 1 if device == "cpu" else max(1, min(6, -(-INPUT_SET_BYTES // size)))
    return [first] + [make(workload, dtype, device, seed) for seed in range(1, count)]


def pixel_centres(levels: Iterable[Sequence[int]], device: str | torch.device) -> Tensor:
    """Normalised centres (x, y) of all pixels [1, S, 2], level by level; `levels` are (H, W)."""
    centres = []
    for h, w in levels:
        y, x = torch.meshgrid(torch.arange(h, device=device), torch.arange(w, device=device), indexing="ij")
        centres.append(torch.stack(((x + 0.5) / w, (y + 0.5) / h), -1).view(-1, 2))
    return torch.cat(centres)[None]
