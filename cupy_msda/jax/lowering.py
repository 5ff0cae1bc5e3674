"""From a primitive to a custom call of one platform: divided between devices, with its workspace, or a callback."""

from __future__ import annotations

import functools
from typing import Any

import jax
import numpy as np

from . import compat, cpu_calls, cuda_calls, handler
from .compat import mlir
from .operation import Operation
from .sharding import partitioned

_handled = compat.follows_handlers(jax.__version_info__)
if _handled:
    handler.register()


def handled() -> bool:
    """Whether XLA calls the handlers of this package."""
    return _handled


def lowering(platform: str, *, multiple_results: bool) -> Any:
    """The lowering rule of the forward or of the backward."""

    def run(*arrays: jax.Array, operation: Operation) -> Any:
        execute = functools.partial(_execute, platform, operation)
        results = partitioned(operation, execute)(*arrays)
        return list(results) if multiple_results else results[0]

    return mlir.lower_fun(run, multiple_results=multiple_results)


def _execute(platform: str, operation: Operation, *arrays: jax.Array) -> list[jax.Array]:
    """The results for arrays on one device."""
    shapes = {name: array.shape for name, array in zip(operation.roles, arrays, strict=True)}
    dtypes = {name: array.dtype.name for name, array in zip(operation.roles, arrays, strict=True)}
    results = [jax.ShapeDtypeStruct(*result) for result in operation.results(shapes, dtypes)]
    if not _handled:
        return list(jax.pure_callback(functools.partial(_on_the_host, operation), results, *arrays))
    handler.expect_calls()
    target, workspace = handler.TARGET, 0
    if platform == "cuda":
        target, workspace = _prepared(operation, shapes, dtypes)
    made = [*results, jax.ShapeDtypeStruct((workspace,), np.uint8)] if workspace else results
    call = jax.ffi.ffi_call(target, made)
    known = None if _symbolic(shapes) else [(shapes[role], dtypes[role]) for role in operation.roles]
    return list(call(*arrays, operation=operation.encode(known, workspace)))[: len(results)]


def _on_the_host(operation: Operation, *arrays: Any) -> list[np.ndarray]:
    return cpu_calls.compute(operation, [np.asarray(array) for array in arrays])


def _prepared(operation: Operation, shapes: dict[str, Any], dtypes: dict[str, str]) -> tuple[str, int]:
    """The name of the custom call, and its workspace in bytes, after its kernels are loaded on all GPUs.

    What has symbolic sizes, or is exported on a machine without a GPU, asks XLA for its workspace in each call.
    """
    gpus = [] if _symbolic(shapes) else _local_gpus()
    needs = [cuda_calls.prepare(operation, operation.problem(shapes, dtypes, ("cuda", gpu))) for gpu in gpus]
    if not gpus:
        return handler.ALLOCATING_TARGET, 0
    return handler.TARGET, max(needs)


def _symbolic(shapes: dict[str, Any]) -> bool:
    return any(not isinstance(size, int) for shape in shapes.values() for size in shape)


def _local_gpus() -> list[int]:
    """The CUDA numbers of this process's GPUs."""
    try:
        return [device.local_hardware_id for device in jax.local_devices(backend="cuda")]
    except RuntimeError:  # no such backend
        return []
