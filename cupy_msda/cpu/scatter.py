"""The gradient of value of one task: sums of vectors that are scattered to pixels, in passes without conflicts."""

from __future__ import annotations

import numpy as np

from .sampling import ChannelVectors, from_accumulator
from .tasks import Task


class ValueGradient:
    """Sums of grad_value: in place, or in a buffer where vectors are used often or the dtype has 16 bits."""

    def __init__(self, grad_value: np.ndarray, task: Task, value: ChannelVectors) -> None:
        problem = task.problem
        self.grad_value, self.task = grad_value, task
        self.buffered = value.copied or grad_value.dtype != value.dtype
        if self.buffered:
            self.pixel_stride, self.head_offset = 1, np.arange(task.head_count) * problem.S
            self.flat = np.zeros((task.head_count * problem.S, problem.D), value.dtype)
        else:
            self.pixel_stride, self.head_offset = value.pixel_stride, value.head_offset
            self.flat = grad_value[task.images].reshape(-1, problem.D)
        self.items = as_items(self.flat)
        self.block = 0
        self.first_pass: tuple[int, int] | None = None
        self.all_zero = True

    def next_block(self) -> None:
        """Begin another block of samples: its passes are not those of the block before."""
        self.block += 1

    def add(self, indices: np.ndarray, sums: np.ndarray, scatter_pass: int) -> None:
        """Add `sums` [indices, D], which this changes, at `indices`, which all differ within a block and pass."""
        # Before the first pass all vectors are zero, so that it need not read them.
        if self.first_pass is None:
            self.first_pass = (self.block, scatter_pass)
        self.all_zero = self.all_zero and self.first_pass == (self.block, scatter_pass)
        if not self.all_zero:
            sums += np.take(self.flat, indices, axis=0, mode="clip")
        self.items[indices] = as_items(sums)

    def finish(self) -> None:
        """Cast the buffer into grad_value."""
        if self.buffered:
            by_head = self.flat.reshape(self.task.head_count, -1, self.flat.shape[1])
            cast = from_accumulator(by_head.transpose(1, 0, 2), self.grad_value.dtype, self.task.problem.value_dtype)
            self.task.write(self.grad_value, cast, slice(None))


def as_items(array: np.ndarray) -> np.ndarray:
    """The vectors of a contiguous array as single items, which NumPy scatters faster than vectors.

    docs/performance/decisions.md#cpu-corner-arrays
    """
    return array.view(np.dtype((np.void, array.shape[-1] * array.itemsize)))[..., 0]
