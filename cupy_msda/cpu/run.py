"""A call on the CPU: arrays to NumPy, the plain or the fused operator, results to the caller's framework."""

from __future__ import annotations

from typing import Any

import numpy as np

from .. import arrays
from ..arrays import View
from ..call import Call, Operands
from . import fused, threads


def forward(call: Call) -> Any:
    """Output [N, Q, M*D] in the framework of value."""
    problem, operands = call.problem, call.operands
    inputs, lengths = _inputs(call), _lengths(operands)
    output = (fused if problem.fused else threads).forward(problem, *inputs, lengths=lengths)
    return _in_framework(output, operands.value)


def backward(call: Call) -> tuple[Any, Any, Any, Any]:
    """Gradients of value, locations, weights and references; None for what is not wanted.

    In a packed call, the gradient of offsets and logits is one array, in the place of the locations'.
    """
    problem, operands, wanted = call.problem, call.operands, call.wanted
    assert operands.grad_output is not None
    inputs = (*_inputs(call), arrays.to_numpy(operands.grad_output))
    lengths = _lengths(operands)
    if problem.fused:
        grads = fused.backward(problem, *inputs, lengths=lengths, wanted=wanted)
    else:
        grads = (*threads.backward(problem, *inputs, lengths=lengths, wanted=wanted), None)
    likes = (operands.value, operands.locations, operands.weights, operands.references)
    return tuple(None if g is None else _in_framework(g, like) for g, like in zip(grads, likes, strict=True))


def _inputs(call: Call) -> tuple[Any, ...]:
    problem, operands = call.problem, call.operands
    value, locations = arrays.to_numpy(operands.value), arrays.to_numpy(operands.locations)
    weights = None if problem.packed else arrays.to_numpy(operands.weights)
    if operands.references is None:
        return value, locations, weights
    return value, arrays.to_numpy(operands.references), locations, weights


def _lengths(operands: Operands) -> list[int] | None:
    return None if operands.lengths is None else arrays.to_numpy(operands.lengths).tolist()


def _in_framework(array: np.ndarray, like: View) -> Any:
    return like.framework.from_numpy(array, like.dtype, like.array)
