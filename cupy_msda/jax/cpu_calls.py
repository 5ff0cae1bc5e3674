"""A custom call on the CPU: NumPy arrays over XLA's buffers, validated and computed as every other call."""

from __future__ import annotations

import ctypes
from typing import Any

import ml_dtypes
import numpy as np

from .. import api, validate
from ..call import ALL, FUSED_NAMES, OPERATOR_NAMES, Arguments
from .call_frame import Buffer, CallFrame
from .operation import Operation


def run(frame: CallFrame) -> None:
    """Fills the results."""
    operation, _ = Operation.decode(frame.attribute())
    arrays = [array_of(buffer) for buffer in frame.arguments()]
    results = [array_of(buffer) for buffer in frame.results()]
    for result, computed in zip(results, compute(operation, arrays), strict=True):
        result[...] = computed


def compute(operation: Operation, arrays: list[np.ndarray]) -> list[np.ndarray]:
    """The results for the arrays in the order of the operation's roles."""
    given: dict[str, Any] = dict(zip(operation.roles, arrays, strict=True))
    levels = operation.levels
    shapes, starts = given.get("shapes"), given.get("starts")
    arguments = Arguments(
        value=given["value"],
        spatial_shapes=_sizes(levels) if levels is not None else _int64(shapes),
        level_start_index=[start for *_, start in levels] if levels is not None else _int64(starts),
        reference_points=given.get("references"),
        locations=given["locations"],
        weights=given.get("weights"),
        im2col_step=operation.im2col_step,
        variant=operation.variant,
        query_lengths=_int64(given.get("lengths")),
        deterministic=operation.deterministic,
        names=FUSED_NAMES if operation.coordinates else OPERATOR_NAMES,
    )
    if operation.wanted is None:
        return [api.forward(validate.read(arguments))]
    wanted = operation.wanted
    gradients = api.backward(validate.read(arguments, given["grad_output"], wanted))
    by_name = dict(zip(ALL._fields, gradients, strict=True))
    return [by_name[name] for name in operation.gradients]


def array_of(buffer: Buffer) -> np.ndarray:
    """The memory of a buffer as an array."""
    dtype = np.dtype(ml_dtypes.bfloat16 if buffer.dtype == "bfloat16" else buffer.dtype)
    if 0 in buffer.shape:
        return np.empty(buffer.shape, dtype)
    nbytes = int(np.prod(buffer.shape, dtype=np.int64)) * dtype.itemsize
    memory = memoryview((ctypes.c_char * nbytes).from_address(buffer.data))
    return np.frombuffer(memory, dtype).reshape(buffer.shape)


def _sizes(levels: Any) -> Any:
    return np.array([(h, w) for h, w, _ in levels], np.int64).reshape(-1, 2)


def _int64(words: np.ndarray | None) -> np.ndarray | None:
    """Metadata from pairs of 32-bit words; :func:`cupy_msda.jax.metadata.words` makes them."""
    return None if words is None else np.ascontiguousarray(words).view(np.int64)[..., 0]
