"""Threads of the CPU path: they share out independent tasks, so the result does not depend on their number."""

from __future__ import annotations

import functools
import os
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import TypeVar

import numpy as np

from .. import variables

_Task = TypeVar("_Task")
CONTROL_GROUP = Path("/sys/fs/cgroup")


def num_threads(of_framework: int | None = None) -> int:
    """Threads of a call on the CPU.

    ``CUPY_MSDA_NUM_THREADS`` decides. Without it, what the arrays' framework uses (``torch.set_num_threads``), or
    ``OMP_NUM_THREADS``; and no more than the cores that the process may use, by its affinity and its control group.
    """
    setting = variables.setting("CUPY_MSDA_NUM_THREADS")
    if setting is None:
        cores = _cores()
        return min(of_framework or _omp_threads() or cores, cores)
    count = _positive(setting)
    if count is None:
        raise ValueError(f"CUPY_MSDA_NUM_THREADS: expected a positive int, got {setting!r}")
    return count


def _omp_threads() -> int | None:
    """Of the outermost level of ``OMP_NUM_THREADS``, which may list several."""
    return _positive(os.environ.get("OMP_NUM_THREADS", "").partition(",")[0])


def _positive(setting: str) -> int | None:
    try:
        count = int(setting)
    except ValueError:
        return None
    return count if count > 0 else None


def _cores() -> int:
    found = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(found, _quota() or found)


@functools.cache
def _quota() -> int | None:
    """Cores that the control group of a container grants, by either version of Linux' interface; None: no limit."""
    for files in (("cpu.max",), ("cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us")):
        try:
            words = " ".join((CONTROL_GROUP / file).read_text() for file in files).split()
            quota, period = int(words[0]), int(words[1])
        except (OSError, ValueError, IndexError):  # not there, or "max"
            continue
        if quota > 0 and period > 0:
            return -(-quota // period)
    return None


def run_tasks(tasks: Sequence[_Task], work: Callable[[_Task], None], of_framework: int | None = None) -> None:
    """Call `work` with every task; the first exception of any thread reaches the caller."""
    _keep_freed_memory()
    if len(tasks) == 1:
        work(tasks[0])
        return
    waiting: SimpleQueue[_Task] = SimpleQueue()
    for task in tasks:
        waiting.put(task)
    errors: list[BaseException] = []

    def run_until_empty() -> None:
        with np.errstate(all="ignore"):  # NaN and infinity are legal inputs; a new thread has NumPy's default
            while not errors:
                try:
                    task = waiting.get_nowait()
                except Empty:
                    return
                try:
                    work(task)
                except BaseException as error:
                    errors.append(error)

    # The caller's thread works too, and there is no pool: threads that are made anew in each call leave nothing in a
    # forked child (docs/performance/decisions.md#cpu-threads).
    helpers = _started(min(num_threads(of_framework), len(tasks)) - 1, run_until_empty)
    run_until_empty()
    for helper in helpers:
        helper.join()
    if errors:
        raise errors[0]


def _started(count: int, work: Callable[[], None]) -> list[threading.Thread]:
    """Threads that do `work`: `count` of them, or as many as start.

    At the end of the interpreter none starts, and at the limit of the process no more. The caller does their work.
    """
    helpers: list[threading.Thread] = []
    for _ in range(count):
        helper = threading.Thread(target=work)
        try:
            helper.start()
        except RuntimeError:
            break
        helpers.append(helper)
    return helpers


@functools.cache
def _keep_freed_memory() -> None:
    """Let glibc keep what a call frees for the next call, instead of page faults in each.

    glibc returns blocks to the system above a size that grows to the largest block freed so far, 32 MiB at most. This
    block is never touched (docs/performance/decisions.md#cpu-freed-memory).
    """
    np.empty(31 << 20, np.uint8)
