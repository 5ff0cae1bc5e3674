"""The handlers that XLA calls: C functions made by ctypes, registered under the names of the custom calls.

XLA finds a handler by name and platform. Each call has one attribute, an encoded
:class:`~cupy_msda.jax.operation.Operation`.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import time
from collections.abc import Callable
from typing import Any

import jax

from . import cpu_calls, cuda_calls
from .call_frame import EXECUTE, CallFrame, answer_metadata

# A call whose workspace is one of its results may be recorded into a CUDA graph. One that allocates may not.
TARGET = "cupy_msda"
ALLOCATING_TARGET = "cupy_msda.allocating"
_Handler = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p)
_handlers: list[Any] = []  # XLA keeps addresses alone
# One entry per call that runs now, and when the last one ended, or was compiled.
_running: list[None] = []
_last_time = float("-inf")
_QUIET_SECONDS = 0.2


def register() -> None:
    """Makes the custom calls known to XLA in this process."""
    for name, in_command_buffers in ((TARGET, True), (ALLOCATING_TARGET, False)):
        for platform, run in (("cpu", cpu_calls.run), ("CUDA", cuda_calls.run)):
            handler = _Handler(_handler_of(run, in_command_buffers and platform == "CUDA"))
            _handlers.append(handler)
            capsule = jax.ffi.pycapsule(ctypes.cast(handler, ctypes.c_void_p).value)
            jax.ffi.register_ffi_target(name, capsule, platform=platform)
    atexit.register(_wait_for_calls)


def expect_calls() -> None:
    """A call has been compiled."""
    global _last_time
    _last_time = time.monotonic()


def _wait_for_calls() -> None:
    """Waits until XLA is likely to make no further call: one that began while Python ends would wait forever.

    JAX computes asynchronously, and does not say what it still has to compute. Its live arrays are waited for; results
    that nobody holds are taken for computed when no handler has been called for a while.
    """
    if _last_time == float("-inf") and not _running:
        return
    begin = time.monotonic()
    for array in jax.live_arrays():
        with contextlib.suppress(Exception):  # deleted, or the result of a failed call, which others report
            array.block_until_ready()
    while _running or time.monotonic() - max(begin, _last_time) < _QUIET_SECONDS:
        time.sleep(_QUIET_SECONDS / 10)


def _handler_of(run: Callable[[CallFrame], None], in_command_buffers: bool) -> Callable[[int], int | None]:
    begin, end, now = _running.append, _running.pop, time.monotonic

    def handle(address: int) -> int | None:
        global _last_time
        if answer_metadata(address, in_command_buffers):  # where there may be no table of functions yet
            return None
        frame = CallFrame(address)
        if frame.stage != EXECUTE:
            return None
        begin(None)
        try:
            run(frame)
        except Exception as exception:  # an exception cannot leave a C function
            return frame.error(exception)
        finally:
            end()
            _last_time = now()
        return None

    return handle
