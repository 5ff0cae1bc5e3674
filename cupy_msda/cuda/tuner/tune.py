"""Tuning of calls: which problems, how long, and where what was found is kept."""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

from ... import arrays
from ...call import ALL, Problem, Wanted
from ...sizes import Sizes, problems_of
from .. import naive, session
from ..recording import RecordedCall
from ..tuning import loaded
from ..tuning.tuned import Entry
from ..workloads import WORKLOADS
from .bench import Bench
from .targets import Target, targets_of


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
