"""The NumPy path: forward and backward over units of a few heads of one image, shared out to threads.

Units are independent, so the result does not depend on how many threads there are. Arithmetic is float32, or float64
for float64; pixel coordinates are float64, a chunk at a time, because x * W - 0.5 loses log2(W) bits of the fraction in
float32. bfloat16 arrays come as their uint16 bits.
"""

from __future__ import annotations

import functools
import os
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from queue import Empty, SimpleQueue

import numpy as np

from ..call import ALL, Problem, Wanted
from .backward import Gradients, backward_unit
from .forward import forward_unit
from .sampling import chunks

# Samples of a unit up to which heads are joined: NumPy's calls cost more than the work of fewer.
UNIT_SAMPLES = 1 << 15
# Bytes that the sums of grad_value of joined heads may take where they are kept apart (16-bit dtypes).
UNIT_SUM_BYTES = 12 << 20


def num_threads() -> int:
    """Threads that the NumPy path uses: ``CUPY_MSDA_NUM_THREADS``, or the cores this process may use."""
    setting = os.environ.get("CUPY_MSDA_NUM_THREADS")
    if setting is None:
        return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if not setting.isdigit() or int(setting) == 0:
        raise ValueError(f"CUPY_MSDA_NUM_THREADS: expected a positive int, got {setting!r}")
    return int(setting)


def forward(
    problem: Problem,
    value: np.ndarray,
    locations: np.ndarray,
    weights: np.ndarray,
    lengths: Sequence[int] | None = None,
) -> np.ndarray:
    """Output [N, Q, M*D] in value's storage dtype (uint16 bits for bfloat16); `lengths` are the queries that count."""
    output = np.zeros((problem.N, problem.Q, problem.M, problem.D), value.dtype)
    if not problem.empty:
        arrays = (value, locations, weights, output)
        _each_unit(problem, lengths, lambda of_image, n, heads: forward_unit(of_image, *arrays, n, heads))
    return output.reshape(problem.output_shape)


def backward(
    problem: Problem,
    value: np.ndarray,
    locations: np.ndarray,
    weights: np.ndarray,
    grad_output: np.ndarray,
    lengths: Sequence[int] | None = None,
    wanted: Wanted = ALL,
) -> Gradients:
    """Gradients of value, locations and weights, each in its input's storage dtype; None for what is not wanted."""
    inputs = zip((value, locations, weights), wanted[:3], strict=True)
    grads = tuple(np.zeros(array.shape, array.dtype) if asked else None for array, asked in inputs)
    if not problem.empty and any(wanted):
        arrays = (value, locations, weights, grad_output.reshape(problem.N, problem.Q, problem.M, problem.D))
        _each_unit(problem, lengths, lambda of_image, n, heads: backward_unit(of_image, *arrays, grads, n, heads))
    return grads


@functools.cache
def _keep_freed_memory() -> None:
    """Let glibc keep what a call frees for the next call: 8 MB of page faults were half of decoder_300's forward.

    It raises the size from which memory goes back at once to that of the largest block freed so far, 32 MiB at most;
    this one is never touched.
    """
    np.empty(31 << 20, np.uint8)


def _each_unit(problem: Problem, lengths: Sequence[int] | None, work: Callable[[Problem, int, slice], None]) -> None:
    """Call `work` with every image and range of heads, and the problem of the queries of that image which count.

    Two units at least, so that threads share a single image too.
    """
    _keep_freed_memory()
    M = problem.M
    few = -(-UNIT_SAMPLES // (problem.Q * problem.K))
    small = max(1, UNIT_SUM_BYTES // (problem.S * problem.D * np.dtype(problem.accumulator_dtype).itemsize))
    together = min(few, small, -(-M * problem.N // 2), M)
    of_images = [problem] * problem.N if lengths is None else [replace(problem, Q=length) for length in lengths]
    units = [(of_images[n], n, heads) for n in range(problem.N) for heads in chunks(M, together) if of_images[n].Q]
    waiting: SimpleQueue[tuple[Problem, int, slice]] = SimpleQueue()
    for unit in units:
        waiting.put(unit)
    errors: list[BaseException] = []

    def drain() -> None:
        with np.errstate(invalid="ignore", over="ignore"):  # NaN and infinity are the caller's business
            while not errors:
                try:
                    unit = waiting.get_nowait()
                except Empty:
                    return
                try:
                    work(*unit)
                except BaseException as error:
                    errors.append(error)

    # The caller works too: a pool of two threads takes 0.26 ms to start, one thread 0.1. Made anew each call, so that
    # nothing is left over in a child after a fork.
    helpers = [threading.Thread(target=drain) for _ in range(min(num_threads(), len(units)) - 1)]
    for helper in helpers:
        helper.start()
    drain()
    for helper in helpers:
        helper.join()
    if errors:
        raise errors[0]
