"""Level sizes that are known on the host, as arrays on the device: copied once per list of levels and device.

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


_tables: dict[tuple[int, Levels], LevelTable] = {}
_memory: list[Any] = []  # what keeps the tables alive
_lock = threading.Lock()


def level_table(levels: Levels, device: int, stream: int) -> LevelTable:
    """The table of (H, W, start) of each level on the current device, number `device`, ready for use on any stream.

    Raises
    ------
    RuntimeError
        For a list of levels that is not on the device yet while `stream` is captured into a CUDA graph.
    """
    table = _tables.get((device, levels))
    if table is None:
        streams.refuse_capture(stream, "copy the sizes of the levels to the GPU")
        with _lock:
            table = _tables.get((device, levels))
            if table is None:
                table = _tables[device, levels] = _upload(levels)
    return table


def _upload(levels: Levels) -> LevelTable:
    """Copies on a stream of its own, and waits for that alone: no work of the caller is waited for."""
    cupy = arrays.require_cupy("an array on a CUDA device")
    columns = np.array(levels, np.int64).reshape(-1, 3)
    words = np.concatenate((columns[:, :2].ravel(), columns[:, 2]))
    with cupy.cuda.Stream(non_blocking=True) as stream:
        copied = cupy.empty(max(words.size, 1), np.int64)
        copied[: words.size].set(words, stream=stream)
        stream.synchronize()
    _memory.append(copied)
    return LevelTable(copied.data.ptr, copied.data.ptr + 16 * len(levels))
