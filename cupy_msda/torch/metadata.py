"""Metadata as tensors, in which symbols and the sizes of a trace keep standing for the sizes of other inputs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..options import is_sequence
from . import compat


def has_symbols(metadata: Any) -> bool:
    """Whether metadata is a Python sequence some of whose numbers are symbols, or tensors that a trace records."""
    if not is_sequence(metadata):
        return False
    tracing = compat.tracing()
    numbers = [number for row in metadata for number in (row if is_sequence(row) else (row,))]
    return any(isinstance(number, torch.SymInt) or (tracing and isinstance(number, Tensor)) for number in numbers)


def tensor_of(metadata: Any, device: torch.device | str) -> Tensor:
    """Metadata as a tensor on `device`."""
    if not has_symbols(metadata):
        return torch.as_tensor(metadata, device=device)
    return torch.stack([tensor_of(row, device) if is_sequence(row) else _scalar(row, device) for row in metadata])


def _scalar(number: Any, device: torch.device | str) -> Tensor:
    if isinstance(number, Tensor):
        return number.to(device, torch.int64)
    return torch.full((), number, dtype=torch.int64, device=device)
