"""Numbers that the host knows, such as level sizes, as arrays on the device: copied once per list and device.

The kernels read levels from device memory alone, so that one compiled kernel serves metadata from the host and from the
device. Tables are never freed: a captured CUDA graph may read them at any later time.
"""

from __future__ import annotations

import threading
from typing import Any, NamedTuple

import numpy as np

from .. import arrays
from . import streams

Levels = tuple[tuple[int, int, int], ...]


class LevelTable(NamedTuple):
    """Device addresses of int64 arrays: (H, W) of each level [L, 2], and its first pixel [L]."""

    shapes: int
    starts: int


_tables: dict[tuple[int, tuple[int, ...]], int] = {}
_memory: list[Any] = []  # what keeps the tables alive
_lock = threading.Lock()


def level_table(levels: Levels, device: int, stream: int) -> LevelTable:
    """The table of (H, W, start) of each level on the current device, number `device`, ready for use on any stream.

    Raises
    ------
    RuntimeError
        For a list of levels that is not on the device yet while `stream` is captured into a CUDA graph.
    """
    sizes = tuple(number for h, w, _ in levels for number in (h, w))
    address = device_table((*sizes, *(start for _, _, start in levels)), device, stream)
    return LevelTable(address, address + 8 * len(sizes))


def device_table(numbers: tuple[int, ...], device: int, stream: int) -> int:
    """Address of these numbers as int64 on the current device, number `device`; as :func:`level_table`."""
    table = _tables.get((device, numbers))
    if table is None:
        streams.refuse_capture(stream, "copy the sizes of the levels to the GPU")
        with _lock:
            table = _tables.get((device, numbers))
            if table is None:
                table = _tables[device, numbers] = _upload(numbers)
    return table


def _upload(numbers: tuple[int, ...]) -> int:
    """Copies on a stream of its own, and waits for that alone: no work of the caller is waited for."""
    cupy = arrays.require_cupy("an array on a CUDA device")
    with cupy.cuda.Stream(non_blocking=True) as stream:
        copied = cupy.empty(max(len(numbers), 1), np.int64)
        copied[: len(numbers)].set(np.array(numbers, np.int64), stream=stream)
        stream.synchronize()
    _memory.append(copied)
    return copied.data.ptr
