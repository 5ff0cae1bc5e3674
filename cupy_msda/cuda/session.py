"""The device, stream, inputs and outputs of one call, as addresses."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import numpy as np

from .. import arrays
from ..arrays import View
from ..call import Call
from .axes import VECTOR_BYTES
from .level_tables import level_table


class Result:
    """Uninitialised device memory that becomes an array of the caller."""

    def __init__(self, shape: tuple[int, ...], dtype: str, like: View) -> None:
        self.shape, self.dtype, self.like = shape, dtype, like
        self.size = int(np.prod(shape, dtype=np.int64))
        self.data, self.array = like.framework.empty_cuda(shape, dtype, like.device)

    @property
    def nbytes(self) -> int:
        return self.size * arrays.item_size(self.dtype)

    def finish(self) -> Any:
        return self.like.framework.finish(self.array, self.dtype, self.like.array)


class Session:
    """The device and stream of one call, and its inputs as contiguous device arrays."""

    def __init__(self, call: Call) -> None:
        self.cupy = arrays.require_cupy("an array on a CUDA device")
        self.problem, self.operands = call.problem, call.operands
        self.device = call.problem.device[1]
        self.framework = call.operands.value.framework

    def __enter__(self) -> Session:
        operands = self.operands
        with contextlib.ExitStack() as stack:  # leaves the device again should a copy fail
            stack.enter_context(on_device(self.device))
            self.stream = self.framework.stream(self.problem.device)
            # Copied only where its channels are not contiguous.
            self.value = operands.value if self.problem.value_strides else _contiguous(operands.value)
            self.locations = _contiguous(operands.locations)
            self.references = _contiguous(operands.references) if operands.references else None
            if self.problem.packed:
                self.weights = self.logits_in(self.locations)
            else:
                self._weights = _contiguous(operands.weights)  # keeps a copy alive
                self.weights = self._weights.data
            self.grad_output = _contiguous(operands.grad_output) if operands.grad_output else None
            self._entered = stack.pop_all()
        return self

    def __exit__(self, *exception: object) -> None:
        self._entered.close()

    def metadata(self) -> tuple[int, ...]:
        """The words of the kernels' `metadata`: addresses of int64 device arrays, of shapes and of starts."""
        levels = self.problem.levels
        if levels is not None:
            return level_table(levels, self.device, self.stream)
        parts = (self.operands.shapes, self.operands.starts)
        convert = self.framework.int64_on_cuda
        self.kept = [(0, None) if part is None else convert(part, self.problem.device) for part in parts]
        return tuple(address for address, _ in self.kept)

    def alignment(self, output: int) -> int:
        """Alignment of all arrays that the forward reads several numbers at a time of."""
        samples = () if self.problem.fused else (self.locations.data, self.weights)
        return alignment_of(self.value.data, output, *samples)

    def logits_in(self, packed: View | Result) -> int:
        """Address of the first logits in an array that holds offsets and logits."""
        return packed.data + 2 * self.problem.K * arrays.item_size(self.problem.location_dtype)

    def lengths(self) -> int:
        """Address of the valid queries of each image, int64 on the device; 0 where all are."""
        lengths: Any = self.operands.lengths
        if lengths is None:
            return 0
        if lengths.device[0] == "cpu":  # a NumPy array, which value's framework copies on the stream of this call
            lengths = np.ascontiguousarray(arrays.to_numpy(lengths), np.int64)
        address, self.kept_lengths = self.framework.int64_on_cuda(lengths, self.problem.device)
        return address

    def zero(self, result: Result) -> None:
        if result.size:
            self.cupy.cuda.runtime.memsetAsync(result.data, 0, result.nbytes, self.stream)


@contextlib.contextmanager
def on_device(device: int) -> Iterator[None]:
    """Make `device` current, in a thread that has never used CUDA too, and the caller's device again afterwards."""
    runtime = arrays.require_cupy("an array on a CUDA device").cuda.runtime
    before = runtime.getDevice()
    runtime.setDevice(device)
    try:
        yield
    finally:
        if before != device:
            runtime.setDevice(before)


def _contiguous(view: View) -> View:
    """`view`, or a copy of it on its device; the kernels read locations in pairs, so these are aligned too."""
    if view.contiguous and view.data % (2 * arrays.item_size(view.dtype)) == 0:
        return view
    return view.framework.contiguous(view)


def alignment_of(*addresses: int) -> int:
    """Largest power of two up to 16 that divides every address; 0 is no address."""
    return min(address & -address or VECTOR_BYTES for address in (*addresses, VECTOR_BYTES))
