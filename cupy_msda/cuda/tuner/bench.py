"""Tuning: times launch configurations on the GPU at hand and keeps those that are faster than the default.

Every time is the replay of a CUDA graph of several calls, between two events. A configuration counts only if it is
faster in a comparison with the default, in turn, and has the same results.
"""

from __future__ import annotations

import os
import statistics
import time
import warnings
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import replace

from ... import arrays
from ...call import Problem
from .. import gpu, kernels, session
from ..kernel_spec import KernelSpec
from ..plan import Launch
from ..tuning.tuned import ORDERED, Axes, Entry
from .device_arrays import DeviceArrays
from .replay import Replay
from .search import Outcome, Search
from .targets import Candidate, Planner, Target

# Replays of a configuration, and of each side of a comparison with the default.
_REPLAYS, _COMPARED_REPLAYS = 3, 11
# A configuration whose first replay takes so many times as long as the fastest one is not replayed again.
_HOPELESS = 1.3
# The share of the time for a batch of configurations that is for their compilation.
_COMPILING = 0.7


class Bench:
    """Tunes the targets of one problem on the current device."""

    def __init__(self, problem: Problem) -> None:
        self.cupy, self.problem, self.device = arrays.require_cupy("tune"), problem, problem.device[1]
        self._seen: set[tuple[Launch, ...]] = set()
        on = gpu.of_device(self.device)
        self._on, self.planner = on, Planner(problem, on)
        self.cupy.cuda.runtime.deviceSynchronize()  # other work would count
        self.stream = self.cupy.cuda.Stream(non_blocking=True)
        with self.stream:
            self.arrays = DeviceArrays(problem, on, self.stream)

    def tune(self, target: Target, deadline: float) -> list[Entry]:
        """The best configuration of a target, and that which keeps the order of sums where it is another."""
        default = self.planner.default_axes(target)
        if default is None or time.monotonic() > deadline:
            return []

        self._seen.clear()

        def planned(axes: Axes) -> Candidate:
            return self.planner.candidate(target, None if axes == default else axes)

        def compare(axes: Axes) -> tuple[float, float] | None:
            return self._compared(planned(default), planned(axes))

        def compare_clustered(axes: Axes) -> tuple[float, float] | None:
            with self.arrays.clustered():
                return compare(axes)

        search = Search(target.name, default, self._on, lambda asked: self._measured(map(planned, asked), deadline))
        # Which way is the fastest depends on where samples lie, and they may lie elsewhere in other calls.
        elsewhere = compare_clustered if target.name == "grad_value" and self.arrays.can_cluster else None
        best = search.best(compare, in_order=False, elsewhere=elsewhere)
        if best is None:
            return []
        found = [self._entry(target, best, deterministic=False)]
        if target.name in ORDERED and target.name != "grad_value":
            fixed = search.best(compare, in_order=True)
            if fixed is not None:
                found.append(self._entry(target, fixed, deterministic=True))
        self.planner.choices = self.planner.choices.with_entry(found[0])
        return found

    def _entry(self, target: Target, found: Outcome, *, deterministic: bool) -> Entry:
        entry = self.planner.entry(target, found.axes, found.default_us, found.tuned_us)
        return replace(entry, subject=entry.subject._replace(deterministic=deterministic))

    def _measured(self, asked: Iterable[Candidate], deadline: float) -> list[float | None]:
        """The microseconds of candidates; None for one that launches the same as another, or comes too late."""
        planned = []
        for candidate in asked:
            planned.append(None if candidate.launches in self._seen else candidate)
            self._seen.add(candidate.launches)
        ready = _compiled(planned, self.device, time.monotonic() + _COMPILING * (deadline - time.monotonic()))
        times: list[float | None] = []
        for one, is_ready in zip(planned, ready, strict=True):
            fastest = min((us for us in times if us is not None), default=float("inf"))
            late = times and time.monotonic() > deadline
            times.append(self._time(one, fastest) if one is not None and is_ready and not late else None)
        return times

    def _time(self, candidate: Candidate, fastest: float) -> float:
        replay = self.replay(candidate)
        samples = [replay.microseconds()]
        while len(samples) < _REPLAYS and samples[0] < _HOPELESS * fastest:
            samples.append(replay.microseconds())
        return statistics.median(samples)

    def _compared(self, default: Candidate, candidate: Candidate) -> tuple[float, float] | None:
        with self.stream:
            if not self.arrays.agree(default, candidate):
                name, chosen = default.target.name, [str(launch.spec) for launch in candidate.launches]
                warnings.warn(f"tune: {name}: another result, so this is left out: {chosen}", RuntimeWarning, 2)
                return None
        replays = [self.replay(one) for one in (default, candidate)]
        samples = [[replay.microseconds() for replay in replays] for _ in range(_COMPARED_REPLAYS)]
        before, after = (statistics.median(column) for column in zip(*samples, strict=True))
        return before, after

    def replay(self, candidate: Candidate) -> Replay:
        """A candidate, ready to be timed."""
        with self.stream:
            runs, memory = self.arrays.runs(candidate)
        return Replay(runs, self.stream, memory)


def _compiled(planned: Sequence[Candidate | None], device: int, deadline: float) -> list[bool]:
    """Compiles the kernels of candidates in parallel; which of them are ready when the time is over.

    Nothing is compiled when it returns: loading a kernel would disturb what is timed.
    """

    def compile_one(spec: KernelSpec) -> None:
        with session.on_device(device):
            kernels.function(spec, device)

    specs = dict.fromkeys(launch.spec for one in planned if one is not None for launch in one.launches)
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        futures = {spec: pool.submit(compile_one, spec) for spec in specs}
        try:
            wait(futures.values(), None if deadline == float("inf") else max(0.0, deadline - time.monotonic()))
        finally:
            pool.shutdown(cancel_futures=True)
    errors = [error for future in futures.values() if not future.cancelled() and (error := future.exception())]
    if errors and len(errors) == len(futures):  # no kernel can be compiled here
        raise errors[0]
    failed = {spec for spec, future in futures.items() if future.cancelled() or future.exception() is not None}
    return [one is not None and failed.isdisjoint(launch.spec for launch in one.launches) for one in planned]
