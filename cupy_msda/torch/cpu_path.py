"""Eager calls on the CPU: by torch's own functions where these are estimated to be faster, otherwise by the CPU path.

The first call of a layout is validated and leaves its :class:`Problem` here. The key holds all that validation reads.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..call import Arguments, Problem, Wanted
from ..cpu import run as cpu
from ..cpu.tasks import Inputs
from ..cpu.tier import compiled_tier
from . import compat, composition
from .composition_costs import Way, cheapest
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


class RecordedPlan:
    """The backward of a call whose output is a composition that autograd has recorded.

    What is recorded is freed by a backward that is the last one.
    """

    def __init__(self, problem: Problem, arguments: Arguments, recorded: composition.Recorded) -> None:
        self._problem = problem
        self._recorded: composition.Recorded | None = recorded
        levels = problem.levels or ()
        # Metadata is the problem's: the caller may change the lists that it came in.
        self._settings = replace(
            arguments, value=None, reference_points=None, locations=None, weights=None,
            spatial_shapes=[(h, w) for h, w, _ in levels], level_start_index=[start for *_, start in levels],
        )  # fmt: skip

    def arguments(
        self, value: Tensor, shapes: Any, starts: Any, locations: Tensor, weights: Any, references: Tensor | None
    ) -> Arguments:
        """The arguments of the call."""
        return replace(self._settings, value=value, locations=locations, weights=weights, reference_points=references)

    def backward(self, wanted: Wanted) -> Callable[..., Gradients | None]:
        """``backward(grad_output, value, shapes, starts, locations, weights, references=None)`` -> the gradients that
        are wanted, or None where something is not finite.
        """

        def backward(grad_output: Tensor, *operands: Any) -> Gradients | None:
            arguments = self.arguments(*operands)
            recorded, kept = self._recorded, compat.graph_is_kept()
            if not kept:
                self._recorded = None
            return recorded and composition.gradients(recorded, arguments, grad_output, wanted, kept)

        return backward


def chosen_way(problem: Problem, wanted: Wanted | None) -> Way | None:
    """How torch's own functions compute a call with these gradients, or none; None where the CPU path is faster."""
    if problem.device[0] != "cpu" or compiled_tier() is not None:
        return None
    return cheapest(problem, wanted, composition.ways(problem, wanted))


def composed(
    problem: Problem, arguments: Arguments, wanted: Wanted | None, way: Way
) -> tuple[Tensor, RecordedPlan | None] | None:
    """The output by torch's own functions, and its backward if one is wanted; None where the contract differs."""
    recorded = composition.record(problem, arguments, wanted or _NO_GRADIENT, way)
    if recorded is None:
        return None
    output = recorded.output.detach().to(arguments.value.dtype)
    return output, RecordedPlan(problem, arguments, recorded) if wanted else None


_NO_GRADIENT = Wanted(False, False, False)


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
