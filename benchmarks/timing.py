"""The time of one call on the device, without host overhead where the device allows it."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence

import torch

# A replay must take much longer than the start of a graph, about 10 us.
REPLAY_SECONDS = 1e-3
MAX_CALLS = 128
UNTIMED_SECONDS = 0.03


class Timer:
    """Times `calls`, one function per set of inputs, one after the other; many sets keep the L2 cache cold.

    On CUDA the calls are captured into a graph, which excludes the gaps between launches. Calls that cannot be captured
    are launched one by one. `method` says which of the two happened.
    """

    def __init__(self, calls: Sequence[Callable[[], object]], device: str, stream: torch.cuda.Stream | None) -> None:
        self.calls, self.device, self.stream = list(calls), device, stream
        for call in self.calls:
            call()
        if device == "cpu":
            self.method, self.count = "wall clock", 1
            return
        torch.cuda.synchronize()
        self.count = len(self.calls)
        try:
            self.method = "graph replay"
            self._capture()
            # The number of calls follows from their time on the device, not on the host.
            wanted = min(MAX_CALLS, round(REPLAY_SECONDS / max(self.sample(), 1e-6)))
            if wanted > self.count:
                self.count = -(-wanted // len(self.calls)) * len(self.calls)
                self._capture()
        except RuntimeError:
            self.method = "events"
        torch.cuda.synchronize()

    def _capture(self) -> None:
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph, stream=self.stream):
            for index in range(self.count):
                self.calls[index % len(self.calls)]()
        self.graph.replay()
        torch.cuda.synchronize()

    def sample(self) -> float:
        """Seconds per call, measured once."""
        if self.device == "cpu":
            # Untimed calls first: threads of other work still spin for 10 ms, and its data fills the caches.
            begin = time.perf_counter()
            while time.perf_counter() - begin < UNTIMED_SECONDS:
                self._launch_all()
            begin = time.perf_counter()
            self._launch_all()
            return (time.perf_counter() - begin) / len(self.calls)
        if self.method == "graph replay":
            return self._device_seconds(self.graph.replay) / self.count
        return self._device_seconds(self._launch_all) / len(self.calls)

    def _launch_all(self) -> None:
        for call in self.calls:
            call()

    def _device_seconds(self, work: Callable[[], object]) -> float:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        work()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) * 1e-3


def summary(samples: Sequence[float]) -> dict[str, float]:
    """Median and quartiles in microseconds; `samples` are seconds."""
    microseconds = sorted(s * 1e6 for s in samples)
    quartiles = statistics.quantiles(microseconds, n=4) if len(microseconds) > 1 else [microseconds[0]] * 3
    return {"median_us": quartiles[1], "q1_us": quartiles[0], "q3_us": quartiles[2]}


def interleaved(
    calls: Mapping[str, Sequence[Callable[[], object]]], device: str, stream: torch.cuda.Stream | None, repeats: int
) -> dict[str, dict[str, float]]:
    """The :func:`summary` of each entry of `calls`. Their samples alternate, so the device affects all alike."""
    timers = {name: Timer(functions, device, stream) for name, functions in calls.items()}
    samples: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(repeats):
        for name, timer in timers.items():
            samples[name].append(timer.sample())
    return {name: summary(times) for name, times in samples.items()}
