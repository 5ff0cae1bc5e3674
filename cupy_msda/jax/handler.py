"""The handlers that XLA calls: C functions made by ctypes, registered under the names of the custom calls.

XLA finds a handler by name and platform. Each call has one attribute, an encoded
:class:`~cupy_msda.jax.operation.Operation`.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import jax

from . import cpu_calls, cuda_calls
from .call_frame import EXECUTE, CallFrame

# A call whose workspace is one of its results may be recorded into a CUDA graph. One that allocates may not.
TARGET = "cupy_msda"
ALLOCATING_TARGET = "cupy_msda.allocating"
_Handler = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p)
_handlers: list[Any] = []  # XLA keeps addresses alone


def register() -> None:
    """Makes the custom calls known to XLA in this process."""
    for name, in_command_buffers in ((TARGET, True), (ALLOCATING_TARGET, False)):
        for platform, run in (("cpu", cpu_calls.run), ("CUDA", cuda_calls.run)):
            handler = _Handler(_handler_of(run, in_command_buffers and platform == "CUDA"))
            _handlers.append(handler)
            capsule = jax.ffi.pycapsule(ctypes.cast(handler, ctypes.c_void_p).value)
            jax.ffi.register_ffi_target(name, capsule, platform=platform)


def _handler_of(run: Callable[[CallFrame], None], in_command_buffers: bool) -> Callable[[int], int | None]:
    def handle(address: int) -> int | None:
        frame = CallFrame(address)
        try:
            if frame.stage == EXECUTE and not frame.answer_metadata(in_command_buffers):
                run(frame)
        except Exception as exception:  # an exception cannot leave a C function
            return frame.error(exception)
        return None

    return handle
