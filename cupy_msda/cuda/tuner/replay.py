"""The time of some launches on the GPU: a CUDA graph of several calls is replayed between two events."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from ... import arrays

# A replay takes about so many microseconds: much longer than its start.
_REPLAY_US, _MOST_CALLS = 1000, 128


class Replay:
    """Calls of `runs`, one after the other, on `stream`; many of them, with inputs of their own, keep the L2 cache
    cold. `keep` is what must live as long.
    """

    def __init__(self, runs: Sequence[Callable[[], None]], stream: Any, keep: Any) -> None:
        self._cuda, self._stream, self._runs, self._keep = arrays.require_cupy("tune").cuda, stream, runs, keep
        self._begin, self._end = (self._cuda.Event() for _ in range(2))
        with stream:
            runs[0]()  # what a first call allocates, a capture cannot
            stream.synchronize()
            self._capture(len(runs))
            wanted = min(_MOST_CALLS, round(_REPLAY_US / max(self.microseconds(), 1e-3)))
            if wanted > self._count:
                self._capture(-(-wanted // len(runs)) * len(runs))

    def _capture(self, count: int) -> None:
        self._stream.begin_capture()
        try:
            for index in range(count):
                self._runs[index % len(self._runs)]()
        finally:
            self._graph = self._stream.end_capture()
        self._count = count
        self._graph.launch(self._stream)
        self._stream.synchronize()

    def microseconds(self) -> float:
        """Of a call, measured once."""
        self._begin.record(self._stream)
        self._graph.launch(self._stream)
        self._end.record(self._stream)
        self._end.synchronize()
        return float(self._cuda.get_elapsed_time(self._begin, self._end)) * 1000 / self._count
