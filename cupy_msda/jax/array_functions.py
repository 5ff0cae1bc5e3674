"""The array functions with JAX arrays on a GPU: compiled calls of the same kernels, without a step through DLPack."""

from __future__ import annotations

from typing import Any

import jax
from jax.core import Tracer

from ..call import ALL, Arguments, Wanted
from . import lowering
from .functional import read
from .primitives import backward_p, forward_p


def forward(arguments: Arguments) -> jax.Array | None:
    """The output; None for what the general path does."""
    if not _served(arguments):
        return None
    operation, problem, operands = read(arguments)
    return None if problem.empty else forward_p.bind(*operands, operation=operation)


def backward(
    arguments: Arguments, grad_output: Any, wanted: Wanted
) -> tuple[jax.Array | None, jax.Array | None, jax.Array | None, jax.Array | None] | None:
    """Gradients of value, locations, weights and references; None for what the general path does."""
    if not _served(arguments, grad_output):
        return None
    operation, problem, operands = read(arguments)
    if problem.empty or grad_output.shape != problem.output_shape or grad_output.dtype != operands[0].dtype:
        return None
    asked = [name for name in operation.differentiable if getattr(wanted, name)]
    backward = operation.backward(asked)
    gradients = backward_p.bind(grad_output, *operands, operation=backward)
    found = dict(zip(backward.gradients, gradients, strict=True))
    of_value, of_locations, of_weights, of_references = (found.get(name) for name in ALL._fields)
    return of_value, of_locations, of_weights, of_references


def _served(arguments: Arguments, *others: Any) -> bool:
    """Whether all arrays are on one GPU and nothing is to be read back."""
    if arguments.validate or not lowering.handled():
        return False
    operands = [arguments.value, arguments.locations, *others]
    operands += [part for part in (arguments.weights, arguments.reference_points) if part is not None]
    metadata = (arguments.spatial_shapes, arguments.level_start_index, arguments.query_lengths)
    if not all(isinstance(array, jax.Array) for array in operands):
        return False
    given = [*operands, *(part for part in metadata if isinstance(part, jax.Array))]
    if any(isinstance(array, Tracer) or array.is_deleted() for array in given):
        return False
    devices = arguments.value.devices()
    (device, *rest) = devices
    return not rest and device.platform == "gpu" and all(array.devices() == devices for array in given)
