"""Threads of the NumPy path: they share out independent tasks, so the result does not depend on their number."""

from __future__ import annotations

import functools
import os
import threading
from collections.abc import Callable, Sequence
from queue import Empty, SimpleQueue

import numpy as np

from .tasks import Task


def num_threads() -> int:
    """Threads that the NumPy path uses: ``CUPY_MSDA_NUM_THREADS``, or the cores this process may use."""
    setting = os.environ.get("CUPY_MSDA_NUM_THREADS")
    if setting is None:
        return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        count = int(setting)
    except ValueError:
        count = 0
    if count < 1:
        raise ValueError(f"CUPY_MSDA_NUM_THREADS: expected a positive int, got {setting!r}")
    return count


def run_tasks(tasks: Sequence[Task], work: Callable[[Task], None]) -> None:
    """Call `work` with every task; the first exception of any thread reaches the caller."""
    _keep_freed_memory()
    waiting: SimpleQueue[Task] = SimpleQueue()
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
    helpers = _started(min(num_threads(), len(tasks)) - 1, run_until_empty)
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
