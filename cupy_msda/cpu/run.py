"""A call on the CPU: arrays to NumPy, the tier that runs, results to the caller's framework."""

from __future__ import annotations

from typing import Any

import numpy as np

from .. import arrays
from ..arrays import View
from ..call import Call, Wanted
from .backward import plain_backward
from .forward import plain_forward
from .fused import fused_backward, fused_forward
from .tasks import Gradients, Inputs
from .tier import compiled_tier


def forward(call: Call) -> Any:
    """Output [N, Q, M*D] in the framework of value."""
    return _to_framework(run_forward(_inputs(call)), call.operands.value)


def backward(call: Call) -> tuple[Any, Any, Any, Any]:
    """Gradients of value, locations, weights and references; None for what is not wanted.

    In a packed call, the gradient of offsets and logits is one array, in the place of the locations'.
    """
    gradients, operands = run_backward(_inputs(call), call.wanted), call.operands
    return (
        _to_framework(gradients.value, operands.value),
        _to_framework(gradients.locations, operands.locations),
        _to_framework(gradients.weights, operands.weights),
        _to_framework(gradients.references, operands.references),
    )


def run_forward(inputs: Inputs) -> np.ndarray:
    """Output [N, Q, M*D] in the storage dtype of value, by the tier that runs."""
    compiled = compiled_tier()
    run = compiled.forward if compiled else fused_forward if inputs.problem.fused else plain_forward
    with np.errstate(all="ignore"):  # NaN and infinity are legal inputs
        return run(inputs)


def run_backward(inputs: Inputs, wanted: Wanted) -> Gradients:
    """The gradients that are wanted, each in the storage dtype of its input, by the tier that runs."""
    compiled = compiled_tier()
    run = compiled.backward if compiled else fused_backward if inputs.problem.fused else plain_backward
    with np.errstate(all="ignore"):
        return run(inputs, wanted)


def _inputs(call: Call) -> Inputs:
    problem, operands = call.problem, call.operands
    return Inputs(
        problem=problem,
        value=arrays.to_numpy(operands.value),
        locations=arrays.to_numpy(operands.locations),
        weights=None if problem.packed else arrays.to_numpy(operands.weights),
        references=None if operands.references is None else arrays.to_numpy(operands.references),
        grad_output=None if operands.grad_output is None else arrays.to_numpy(operands.grad_output),
        lengths=None if operands.lengths is None else arrays.to_numpy(operands.lengths).tolist(),
        threads=operands.value.framework.threads(),
    )


def _to_framework(array: np.ndarray | None, like: View | None) -> Any:
    if array is None or like is None:
        return None
    return like.framework.from_numpy(array, like.dtype, like.array)
