"""Eager calls on the CPU whose layout is known: from tensors to the CPU path and back without validation.

The first call of a layout is validated and leaves its :class:`Problem` here. The key holds all that validation looks at.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..call import Arguments, Problem, Wanted
from ..cpu import run as cpu
from ..cpu.tasks import Inputs
from .reference import Gradients

# A model comes back to few layouts. One that never does must not fill the memory.
_MOST_PROBLEMS = 4096
# The problems that are known, by layout.
problems: dict[tuple[Any, ...] | None, Problem] = {}


def remember(key: tuple[Any, ...] | None, problem: Problem) -> None:
    """Later calls with this key are of this problem."""
    if key is not None and problem.device[0] == "cpu":
        if len(problems) >= _MOST_PROBLEMS:
            problems.clear()
        problems[key] = problem


def forward(problem: Problem, arguments: Arguments) -> Tensor:
    """The output, recording no gradient."""
    return _to_tensor(cpu.run_forward(_inputs(problem, arguments)), problem.value_dtype)


def backward(problem: Problem, arguments: Arguments, grad_output: Tensor, wanted: Wanted) -> Gradients:
    """The gradients that are wanted."""
    found = cpu.run_backward(_inputs(problem, arguments, grad_output), wanted)
    references = problem.fused.dtype if problem.fused else ""
    dtypes = (problem.value_dtype, problem.location_dtype, problem.location_dtype, references)
    of_value, of_locations, of_weights, of_references = (
        None if array is None else _to_tensor(array, dtype) for array, dtype in zip(found, dtypes, strict=True)
    )
    return of_value, of_locations, of_weights, of_references


def _inputs(problem: Problem, arguments: Arguments, grad_output: Tensor | None = None) -> Inputs:
    return Inputs(
        problem=problem,
        value=_to_array(arguments.value),
        locations=_to_array(arguments.locations),
        weights=None if arguments.weights is None else _to_array(arguments.weights),
        references=None if arguments.reference_points is None else _to_array(arguments.reference_points),
        grad_output=None if grad_output is None else _to_array(grad_output),
        threads=torch.get_num_threads(),
    )


def _to_array(tensor: Tensor) -> np.ndarray:
    """The same memory as an array; bfloat16 as its uint16 bits."""
    tensor = tensor.detach()
    if tensor.dtype is torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(np.uint16)
    return tensor.numpy()


def _to_tensor(array: np.ndarray, dtype: str) -> Tensor:
    if dtype == "bfloat16":
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)
