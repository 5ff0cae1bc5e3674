"""Inputs and gradients of both tiers, and the division of one call into independent tasks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from ..call import Problem

# Heads and images share a task up to this many samples: below it, NumPy's calls cost more than their arithmetic
# (docs/performance/decisions.md#cpu-work-units).
TASK_SAMPLES = 1 << 15
# A call of so many samples is one task: another one, and its thread, would take longer than they save
# (docs/performance/decisions.md#cpu-work-units).
ONE_TASK_SAMPLES = 1 << 14
# Bytes that the sums of grad_value of one task may take where they need a buffer (16-bit dtypes).
TASK_SUM_BYTES = 12 << 20


@dataclass(frozen=True)
class Inputs:
    """The NumPy arrays of one call, in the contract's shapes; bfloat16 arrays as their uint16 bits.

    In a fused call, `locations` are offsets and `weights` are logits, or None where `locations` holds both. `lengths`
    are the query lengths of a ragged call, `threads` how many the framework of the arrays would use.
    """

    problem: Problem
    value: np.ndarray
    locations: np.ndarray
    weights: np.ndarray | None
    references: np.ndarray | None = None
    grad_output: np.ndarray | None = None
    lengths: Sequence[int] | None = None
    threads: int | None = None


class Gradients(NamedTuple):
    """Each in the storage dtype of its input; None for what is not wanted."""

    value: np.ndarray | None = None
    locations: np.ndarray | None = None
    weights: np.ndarray | None = None
    references: np.ndarray | None = None


class Task(NamedTuple):
    """Some heads of one image, or all heads of some images. In a ragged call, Q of `problem` is that of the image."""

    problem: Problem
    images: slice
    heads: slice

    @property
    def image_count(self) -> int:
        return self.images.stop - self.images.start

    @property
    def head_count(self) -> int:
        """Heads of all images of the task, which are worked on alike: image by image."""
        return self.image_count * (self.heads.stop - self.heads.start)

    def read(self, array: np.ndarray, queries: slice, *rest: slice) -> np.ndarray:
        """[queries, head_count, ...] of `array` [N, Q, M, ...]."""
        chosen = array[(self.images, queries, self.heads, *rest)]
        if self.image_count == 1:
            return chosen[0]
        by_query = chosen.swapaxes(0, 1)
        return by_query.reshape(by_query.shape[0], self.head_count, *by_query.shape[3:])

    def write(self, array: np.ndarray, found: np.ndarray, queries: slice, *rest: slice) -> None:
        """Store `found` [queries, head_count, ...] in `array` [N, Q, M, ...]."""
        target = array[(self.images, queries, self.heads, *rest)].swapaxes(0, 1)
        target[...] = found.reshape(target.shape)


def divide(
    problem: Problem, lengths: Sequence[int] | None, samples: int | None = None, one_task: int | None = None
) -> list[Task]:
    """The tasks of a call that is not empty: one of a small call, otherwise at least two, for threads to share.

    `samples` are those up to which heads and images share a task, TASK_SAMPLES unless given; `one_task` those up to
    which a call is one task, ONE_TASK_SAMPLES unless given.
    """
    N, M = problem.N, problem.M
    by_samples = -(-(samples or TASK_SAMPLES) // (problem.Q * problem.K))
    sum_bytes = problem.S * problem.D * np.dtype(problem.accumulator_dtype).itemsize
    by_memory = max(1, TASK_SUM_BYTES // sum_bytes)
    images = min(by_samples // M, by_memory // M, -(-N // 2))
    all_samples = N * M * problem.Q * problem.K
    if all_samples <= (ONE_TASK_SAMPLES if one_task is None else one_task) and lengths is None and by_memory >= N * M:
        return [Task(problem, slice(0, N), slice(0, M))]
    if images > 1 and lengths is None:
        return [Task(problem, part, slice(0, M)) for part in ranges(N, images)]
    heads_per_task = min(by_samples, by_memory, -(-M * N // 2), M)
    per_image = [problem] * N if lengths is None else [replace(problem, Q=length) for length in lengths]
    return [
        Task(of_image, slice(image, image + 1), heads)
        for image, of_image in enumerate(per_image)
        for heads in ranges(M, heads_per_task)
        if of_image.Q
    ]


def ranges(count: int, step: int) -> Iterator[slice]:
    """Slices of `step` that cover `count`, the last one shorter."""
    for begin in range(0, count, step):
        yield slice(begin, min(begin + step, count))
