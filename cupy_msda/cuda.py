"""The CUDA path: allocate, plan, launch. Works on addresses, on the caller's device and current stream."""

from __future__ import annotations

import contextlib
import functools
from typing import Any, NamedTuple

import numpy as np

from . import interop, kernels, plan
from .interop import View
from .problem import SIXTEEN_BIT, Operands, Problem


class Gradients(NamedTuple):
    """Of value, locations and weights, in the caller's framework; None where not asked for."""

    value: Any
    locations: Any
    weights: Any


def forward(problem: Problem, operands: Operands) -> Any:
    """Output [N, Q, M*D] in the framework of value."""
    output = _Result(problem.output_shape, problem.value_dtype, operands.value)
    with _Session(problem, operands) as session:
        if problem.empty:
            session.zero(output)
        else:
            launch = plan.forward(problem, _alignment(session.value, output), session.multiprocessors)
            session.launch(
                launch,
                session.value.data,
                session.metadata(launch),
                session.locations.data,
                session.weights.data,
                output.data,
                problem.S,
                problem.Q,
            )
    return output.finish()


def backward(problem: Problem, operands: Operands, *, grad_value: bool = True, grad_samples: bool = True) -> Gradients:
    """The gradients that are wanted; `grad_samples` is those of locations and weights, which come together."""
    if problem.deterministic and grad_value:
        raise NotImplementedError(
            "deterministic: the CUDA backward sums grad_value in no fixed order; the NumPy path is deterministic"
        )
    like = operands.value
    value_shape = (problem.N, problem.S, problem.M, problem.D)
    value = _Result(value_shape, problem.value_dtype, like) if grad_value else None
    locations = _Result(operands.locations.shape, problem.location_dtype, like) if grad_samples else None
    weights = _Result(operands.weights.shape, problem.location_dtype, like) if grad_samples else None
    with _Session(problem, operands) as session:
        if problem.empty:
            for result in (value, locations, weights):
                if result is not None:
                    session.zero(result)
        elif grad_value or grad_samples:
            # 16-bit gradients are summed in float32 and rounded once.
            total = value
            if value is not None and problem.value_dtype in SIXTEEN_BIT:
                total = _Result(value_shape, "float32", like)
            if total is not None:
                session.zero(total)
            alignment = _alignment(session.value, session.grad_output)
            launch = plan.backward(
                problem, alignment, session.multiprocessors, grad_value=grad_value, grad_samples=grad_samples
            )
            session.launch(
                launch,
                session.value.data,
                session.metadata(launch),
                session.locations.data,
                session.weights.data,
                session.grad_output.data,
                total.data if total else 0,
                locations.data if locations else 0,
                weights.data if weights else 0,
                problem.S,
                problem.Q,
            )
            if total is not value:
                rounding = plan.round_gradient(problem.value_dtype, value.size)
                session.launch(rounding, total.data, value.data, value.size)
    return Gradients(*(result.finish() if result else None for result in (value, locations, weights)))


class _Result:
    """Uninitialised device memory that becomes an array of the caller."""

    def __init__(self, shape: tuple[int, ...], dtype: str, like: View) -> None:
        self.shape, self.dtype, self.like = shape, dtype, like
        self.size = int(np.prod(shape, dtype=np.int64))
        self.data, self.array = like.framework.empty_cuda(shape, dtype, like.device)

    @property
    def nbytes(self) -> int:
        return self.size * interop.item_size(self.dtype)

    def finish(self) -> Any:
        return self.like.framework.finish(self.array, self.dtype, self.like.array)


class _Session:
    """The device and stream of one call, and its inputs as contiguous device arrays."""

    def __init__(self, problem: Problem, operands: Operands) -> None:
        self.cupy = interop.require_cupy("an array on a CUDA device")
        self.problem, self.operands = problem, operands
        self.device = self.cupy.cuda.Device(problem.device[1])

    def __enter__(self) -> _Session:
        operands = self.operands
        with contextlib.ExitStack() as stack:  # leaves the device and stream again should a copy fail
            stack.enter_context(self.device)
            address = operands.value.framework.stream(self.problem.device)
            self.stream = _external_stream(self.cupy, address, self.problem.device[1])
            stack.enter_context(self.stream)
            self.value = self._contiguous(operands.value)
            self.locations = self._contiguous(operands.locations)
            self.weights = self._contiguous(operands.weights)
            self.grad_output = self._contiguous(operands.grad_output) if operands.grad_output else None
            self._entered = stack.pop_all()
        return self

    def __exit__(self, *exception: object) -> None:
        self._entered.close()

    @property
    def multiprocessors(self) -> int:
        return _multiprocessors(self.problem.device[1])

    def _contiguous(self, view: View) -> View:
        """`view`, or a copy of it on this device; the kernels read locations in pairs, so these are aligned too."""
        if view.contiguous and view.data % (2 * interop.item_size(view.dtype)) == 0:
            return view
        copied = self.cupy.array(interop.to_cupy(view), order="C")
        strides = tuple(step // copied.itemsize for step in copied.strides)
        return View(copied.data.ptr, view.shape, strides, view.dtype, view.device, view.framework, copied)

    def metadata(self, launch: plan.Launch) -> Any:
        """The kernels' `msda_metadata`: numbers by value, or two addresses of int64 device arrays."""
        levels = self.problem.levels
        if not launch.key.levels_on_device:
            return _by_value(np.array(levels, np.int64))
        if levels is not None:
            table = np.array(levels, np.int64)
            self.kept = [self.cupy.asarray(np.ascontiguousarray(table[:, part])) for part in (slice(0, 2), 2)]
        else:
            self.kept = [self._int64(view) for view in (self.operands.shapes, self.operands.starts)]
        return _by_value(np.array([0 if array is None else array.data.ptr for array in self.kept], np.int64))

    def _int64(self, view: View | None) -> Any:
        if view is None:
            return None
        array = interop.to_cupy(view) if view.device[0] == "cuda" else interop.to_numpy(view)
        return self.cupy.ascontiguousarray(self.cupy.asarray(array), dtype=np.int64)

    def zero(self, result: _Result) -> None:
        if result.size:
            self.cupy.cuda.runtime.memsetAsync(result.data, 0, result.nbytes, self.stream.ptr)

    def launch(self, launch: plan.Launch, *arguments: Any) -> None:
        function = kernels.function(launch.key, self.problem.device[1])
        function((launch.grid,), (launch.block,), arguments, shared_mem=launch.shared)


@functools.cache
def _multiprocessors(device: int) -> int:
    return interop.require_cupy("an array on a CUDA device").cuda.Device(device).attributes["MultiProcessorCount"]


def _external_stream(cupy: Any, address: int, device: int) -> Any:
    if address == 0:
        return cupy.cuda.Stream.null
    if hasattr(cupy.cuda.Stream, "from_external"):
        return cupy.cuda.Stream.from_external(_CudaStream(address))
    return cupy.cuda.ExternalStream(address, device)


def _by_value(words: np.ndarray) -> np.ndarray:
    """`words` as one item, the form in which CuPy passes a struct as a kernel parameter."""
    return words.reshape(-1).view(np.dtype((np.void, words.nbytes)))


class _CudaStream:
    """The CUDA stream protocol around an address."""

    def __init__(self, address: int) -> None:
        self.address = address

    def __cuda_stream__(self) -> tuple[int, int]:
        return (0, self.address)


def _alignment(*arrays: Any) -> int:
    """Largest power of two, up to 16, that divides every address."""
    return min((array.data & -array.data) or 16 for array in arrays) if all(a.data for a in arrays) else 16
