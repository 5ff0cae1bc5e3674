"""The implementations that are compared.

``--adapter FILE.py`` adds others: the file defines ``IMPLEMENTATIONS``, a list of objects with the members of
:class:`Implementation`.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

import cupy_msda
from cupy_msda.torch.exportable import grid_sample_attention

from .cases import Inputs

Gradients = tuple[Tensor, Tensor, Tensor]


class Implementation(Protocol):
    """`name` labels the records. Everything runs on torch's current stream and returns torch tensors."""

    name: str

    def unavailable(self, device: str) -> str | None:
        """The reason why it cannot run here, or None."""

    def forward(self, inputs: Inputs) -> Tensor:
        """The output [N, Q, M*D], without recording a gradient."""

    def prepare_backward(self, inputs: Inputs) -> Callable[[], Gradients]:
        """A function that runs only the backward: gradients of value, locations and weights."""


class CupyMsda:
    name = "cupy_msda"

    def unavailable(self, device: str) -> str | None:
        return None

    def forward(self, inputs: Inputs) -> Tensor:
        return cupy_msda.ms_deform_attn_forward(*inputs[:5], 64)

    def prepare_backward(self, inputs: Inputs) -> Callable[[], Gradients]:
        return lambda: cupy_msda.ms_deform_attn_backward(*inputs, 64)


class Autograd:
    """A differentiable function of (value, shapes, starts, locations, weights)."""

    def __init__(self, name: str, function: Callable[..., Tensor] | None, reason: str | None = None) -> None:
        self.name, self.function, self.reason = name, function, reason

    def unavailable(self, device: str) -> str | None:
        return self.reason

    def forward(self, inputs: Inputs) -> Tensor:
        with torch.no_grad():
            return self.function(*inputs[:5])

    def prepare_backward(self, inputs: Inputs) -> Callable[[], Gradients]:
        value, shapes, starts, locations, weights, grad_output = inputs
        leaves = tuple(t.detach().requires_grad_() for t in (value, locations, weights))
        output = self.function(leaves[0], shapes, starts, *leaves[1:])
        return lambda: torch.autograd.grad(output, leaves, grad_output, retain_graph=True)


class GridSample(Autograd):
    """A function that takes the shapes as Python numbers. They are read once, outside the timing."""

    def __init__(self, name: str, function: Callable[..., Tensor]) -> None:
        super().__init__(name, None)
        # By id; the tensor is kept so that no other tensor gets its id.
        self.shapes: dict[int, tuple[Tensor, list[tuple[int, int]]]] = {}

        def call(value: Tensor, shapes: Tensor, _starts: Tensor, locations: Tensor, weights: Tensor) -> Tensor:
            if id(shapes) not in self.shapes:
                self.shapes[id(shapes)] = (shapes, [tuple(row) for row in shapes.tolist()])
            return function(value, self.shapes[id(shapes)][1], locations, weights)

        self.function = call


def torch_ms_deform_attn() -> Autograd:
    """The PyPI package torch-ms-deform-attn, if it is installed."""
    name = "torch-ms-deform-attn"
    if importlib.util.find_spec("torch_ms_deform_attn") is None:
        return Autograd(name, None, "torch_ms_deform_attn is not installed")
    from torch_ms_deform_attn import ms_deform_attn

    return Autograd(name, ms_deform_attn)


def deformops(*, float32_sums: bool = False) -> Autograd:
    """The PyPI package deformops, in its own choice of backend, or with float32 sums of 16-bit gradients."""
    name = "deformops, float32 sums" if float32_sums else "deformops"
    if importlib.util.find_spec("deformops") is None:
        return Autograd(name, None, "deformops is not installed")
    from deformops.registry import Backend, msda

    options = {"backend": Backend.TRITON, "fp32acc": True} if float32_sums else {}

    def call(value: Tensor, shapes: Tensor, starts: Tensor, locations: Tensor, weights: Tensor) -> Tensor:
        return msda(value, shapes, starts, locations, weights.flatten(-2), **options)

    return Autograd(name, call)


def load_adapter(path: str) -> list[Implementation]:
    """The ``IMPLEMENTATIONS`` of an adapter file."""
    spec = importlib.util.spec_from_file_location(f"adapter_{Path(path).stem}", path)
    if spec is None or spec.loader is None or not Path(path).is_file():
        raise ValueError(f"--adapter: expected a Python file, got {path}")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return list(module.IMPLEMENTATIONS)


def known() -> list[Implementation]:
    """All implementations without adapters."""
    return [
        CupyMsda(),
        torch_ms_deform_attn(),
        GridSample("grid_sample", grid_sample_attention),
        GridSample("grid_sample compiled", torch.compile(grid_sample_attention)),
    ]
