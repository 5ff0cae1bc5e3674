"""Tuning: times launch configurations on the GPU at hand and keeps those that are faster than the default.

Every time is the replay of a CUDA graph of several calls, between two events. A configuration counts only if it is
faster in a comparison with the default, in turn, and has the same results.
"""

from __future__ import annotations

import os
import statistics
import time
import warnings
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import replace
from typing import Any

from ... import arrays
from ...call import ALL, Problem, Wanted
from ...sizes import Sizes, problems_of
from .. import gpu, kernels, naive, session
from ..kernel_spec import KernelSpec
from ..plan import Launch
from ..recording import RecordedCall
from ..tuning import loaded
from ..tuning.tuned import ORDERED, Axes, Entry
from ..workloads import WORKLOADS
from .bench import Candidate, DeviceArrays, Planner, Target, targets_of
from .replay import Replay
from .search import Outcome, Search

# Replays of a configuration, and of each side of a comparison with the default.
_REPLAYS, _COMPARED_REPLAYS = 3, 11
# A configuration whose first replay takes so many times as long as the fastest one is not replayed again.
_HOPELESS = 1.3
# The share of the time for a batch of configurations that is for their compilation.
_COMPILING = 0.7


def tune(
    sizes: Sizes | RecordedCall | Iterable[Sizes | RecordedCall] | None = None,
    dtypes: str | Iterable[str] = ("float32",),
    *,
    backward: bool = True,
    budget: float | None = None,
    device: int | None = None,
    progress: bool | None = None,
) -> list[Entry]:
    """Find the fastest launch configurations for these calls on this GPU, and keep them for all processes.

    Everything is compiled, timed and compared with the default; nothing else should use the GPU meanwhile. The results
    go to one file per GPU model, in the folder that ``CUPY_MSDA_TUNING`` names, and are used by every later call of
    these and of similar sizes. Calls with ``deterministic=True`` have the same bits before and after.

    Parameters
    ----------
    sizes : Sizes, RecordedCall or iterable of them, optional
        Sizes of calls, or the calls of a model that :func:`cupy_msda.record` has recorded. None: typical calls of
        detectors and segmenters.
    dtypes : str or iterable of str
        Of value, for sizes: float16, bfloat16, float32, float64; "float16/float32" is a float16 value with float32
        locations.
    backward : bool
        Tune the backward of sizes too.
    budget : float, optional
        Seconds to take at most, about; None: as long as the search takes.
    device : int, optional
        CUDA device; None: the current one.
    progress : bool, optional
        Whether to show a progress bar (with tqdm); None: on a terminal.

    Returns
    -------
    list of Entry
        What was found: the axes of each kernel, and the times with the default and with them.

    Raises
    ------
    TypeError, ValueError
        For a dtype that the operator does not have, levels without pixels, or a budget that is no positive number.
    RuntimeError
        Without CuPy or a CUDA device, or with ``CUPY_MSDA_KERNELS=naive``.
    KeyboardInterrupt
        After Ctrl-C. What was found before is kept.
    """
    reason = arrays.cuda_unavailable()
    if reason is not None:
        raise RuntimeError(f"tune: {reason}")
    if naive.selected():
        raise RuntimeError("tune: expected CUPY_MSDA_KERNELS=fast, got naive, whose kernels have nothing to tune")
    if budget is not None and not budget > 0:
        raise ValueError(f"budget: expected a positive number of seconds, got {budget!r}")
    number: int = arrays.require_cupy("tune").cuda.runtime.getDevice() if device is None else device
    asked = calls_of(sizes, [dtypes] if isinstance(dtypes, str) else list(dtypes), backward, number)
    found: list[Entry] = []
    with session.on_device(number):
        for problem, entries in _tuned(asked, budget, progress):
            if entries:
                loaded.store(problem.device[1], entries)
            found += entries
    return found


def calls_of(
    sizes: Sizes | RecordedCall | Iterable[Sizes | RecordedCall] | None,
    dtypes: Sequence[str],
    backward: bool,
    device: int,
) -> list[tuple[Problem, list[Wanted | None]]]:
    """The problems to tune, each once, and what is wanted of it: None for a forward."""
    listed: list[Sizes | RecordedCall] = list(WORKLOADS.values()) if sizes is None else []
    if isinstance(sizes, (Sizes, RecordedCall)):
        listed = [sizes]
    elif sizes is not None:
        listed = list(sizes)
    found: dict[Problem, list[Wanted | None]] = {}
    for one in listed:
        if isinstance(one, RecordedCall):
            calls = [(one.problem, one.wanted)]
        else:
            problems = problems_of([one], dtypes, device)
            calls = [(p, wanted) for p in problems for wanted in ((None, _all(p)) if backward else (None,))]
        for problem, wanted in calls:
            problem = replace(problem, deterministic=False, device=("cuda", device))
            if not problem.empty and wanted not in found.setdefault(problem, []):
                found[problem].append(wanted)
    return list(found.items())


def _all(problem: Problem) -> Wanted:
    return problem.computed(ALL._replace(references=problem.fused is not None))


def _tuned(
    asked: list[tuple[Problem, list[Wanted | None]]], budget: float | None, progress: bool | None
) -> Iterator[tuple[Problem, list[Entry]]]:
    """What is found for each problem, also where Ctrl-C ends the search."""
    deadline = time.monotonic() + budget if budget else float("inf")
    targets = [(problem, _distinct(problem, wanted)) for problem, wanted in asked]
    with _Bar(sum(len(of_problem) for _, of_problem in targets), progress) as bar:
        for index, (problem, of_problem) in enumerate(targets):
            if time.monotonic() > deadline:
                return
            later = sum(len(others) for _, others in targets[index + 1 :])
            entries: list[Entry] = []
            try:
                for found in _of_problem(problem, of_problem, later, deadline, bar):
                    entries += found
            except BaseException as stopped:
                yield problem, entries
                if not _is_out_of_memory(stopped):
                    raise
                warnings.warn(f"tune: {problem.value_shape} is left out: {stopped}", RuntimeWarning, stacklevel=2)
            else:
                yield problem, entries


def _of_problem(
    problem: Problem, targets: list[Target], later: int, deadline: float, bar: _Bar
) -> Iterator[list[Entry]]:
    """What is found for each target of a problem, while as many are to come `later`."""
    bench = Bench(problem)
    for number, target in enumerate(targets):
        bar.show(f"{target.name} {problem.value_dtype} N={problem.N} Q={problem.Q} D={problem.D}")
        share = (deadline - time.monotonic()) / (len(targets) - number + later)
        yield bench.tune(target, time.monotonic() + share)
        bar.advance()


def _distinct(problem: Problem, wanted: list[Wanted | None]) -> list[Target]:
    return list(dict.fromkeys(target for one in wanted for target in targets_of(problem, one)))


def _is_out_of_memory(error: BaseException) -> bool:
    return isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"


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


class _Bar:
    """A progress bar, where tqdm is installed."""

    def __init__(self, count: int, progress: bool | None) -> None:
        self._bar: Any = None
        if progress is not False:
            try:
                from tqdm.auto import tqdm
            except ImportError:
                return
            self._bar = tqdm(total=count, desc="tuning", disable=None if progress is None else False)

    def __enter__(self) -> _Bar:
        return self

    def __exit__(self, *exception: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def show(self, text: str) -> None:
        if self._bar is not None:
            self._bar.set_postfix_str(text)

    def advance(self) -> None:
        if self._bar is not None:
            self._bar.update()
