"""Times of one call on the device, host overhead excluded where the device allows it."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence

import torch

# A replay should be long against the resolution of an event, and short against the patience of its user.
REPLAY_SECONDS = 1e-3
MAX_CALLS = 32
SETTLE_SECONDS = 0.03


class Timer:
    """Times `calls`, one function a set of inputs, in turn: sets larger than the L2 cache keep it cold.

    On CUDA the calls are captured into a graph, so that the gaps between launches are not measured; what cannot be
    captured is launched call by call (`method` says which).
    """

    def __init__(self, calls: Sequence[Callable[[], object]], device: str, stream: torch.cuda.Stream | None) -> None:
        self.calls, self.device, self.stream = list(calls), device, stream
        for call in self.calls:
            call()
        if device == "cpu":
            self.method, self.count = "wall clock", 1
            return
        torch.cuda.synchronize()
        seconds = self._events(self._launch_all) / len(self.calls)
        self.count = max(1, min(MAX_CALLS, round(REPLAY_SECONDS / max(seconds, 1e-6))))
        self.count = -(-self.count // len(self.calls)) * len(self.calls)
        try:
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph, stream=stream):
                for index in range(self.count):
                    self.calls[index % len(self.calls)]()
            self.method = "graph replay"
            self.graph.replay()
        except RuntimeError:
            torch.cuda.synchronize()
            self.method = "events"
        torch.cuda.synchronize()

    def sample(self) -> float:
        """Seconds a call, once."""
        if self.device == "cpu":
            # Untimed first: the threads of what ran before still spin for 10 ms, and its data fills the caches.
            begin = time.perf_counter()
            while time.perf_counter() - begin < SETTLE_SECONDS:
                self._launch_all()
            begin = time.perf_counter()
            self._launch_all()
            return (time.perf_counter() - begin) / len(self.calls)
        if self.method == "graph replay":
            return self._events(self.graph.replay) / self.count
        return self._events(self._launch_all) / len(self.calls)

    def _launch_all(self) -> None:
        for call in self.calls:
            call()

    def _events(self, work: Callable[[], object]) -> float:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        work()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) * 1e-3


def summary(samples: Sequence[float]) -> dict[str, float]:
    """Median and quartiles in microseconds."""
    microseconds = sorted(s * 1e6 for s in samples)
    quartiles = statistics.quantiles(microseconds, n=4) if len(microseconds) > 1 else [microseconds[0]] * 3
    return {"median_us": quartiles[1], "q1_us": quartiles[0], "q3_us": quartiles[2]}
