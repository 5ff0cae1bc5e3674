"""The CUDA path: allocate, plan, launch. It works on addresses, on the caller's device and current stream."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np

from .. import arrays
from ..arrays import View
from ..call import Call, Problem, Wanted
from . import gpu, kernels, plan, streams
from .axes import VECTOR_BYTES
from .launch import PreparedLaunch
from .level_tables import level_table
from .steps import Addresses, PreparedBackward


class Gradients(NamedTuple):
    """In the caller's framework; None where not wanted. `locations` holds that of offsets and logits in one array."""

    value: Any
    locations: Any
    weights: Any
    references: Any


def forward(call: Call) -> Any:
    """Output [N, Q, M*D] in the framework of value."""
    problem, operands = call.problem, call.operands
    with _Session(call) as session:
        output = _Result(problem.output_shape, problem.value_dtype, operands.value)
        if problem.empty:
            session.zero(output)
        else:
            launch = prepare_forward(problem, session.alignment(output.data), session.stream)
            launch.run(
                session.stream,
                session.value.data,
                *session.metadata(),
                session.locations.data,
                session.weights,
                session.references.data if session.references else 0,
                session.lengths(),
                output.data,
                *plan.size_words(problem),
            )
    return output.finish()


def backward(call: Call) -> Gradients:
    """The gradients that are wanted."""
    problem, operands = call.problem, call.operands
    like, wanted = operands.value, problem.computed(call.wanted)
    with _Session(call) as session:
        value = _Result(problem.value_shape, problem.value_dtype, like) if wanted.value else None
        locations = _Result(operands.locations.shape, problem.location_dtype, like) if wanted.locations else None
        weights = references = None
        if wanted.weights and not problem.packed:
            weights = _Result(operands.weights.shape, problem.location_dtype, like)
        if wanted.references and operands.references:
            references = _Result(operands.references.shape, operands.references.dtype, like)
        results = (value, locations, weights, references)
        if problem.empty:
            for result in results:
                if result is not None:
                    session.zero(result)
        elif any(wanted):
            grad_output = session.grad_output.data if session.grad_output else 0
            alignment = _alignment(session.value.data, grad_output)
            steps = prepare_backward(problem, alignment, session.stream, wanted)
            at_weights = weights.data if weights else 0
            if locations and problem.packed:
                at_weights = session.logits_in(locations)
            workspace = _Result((steps.workspace // 4,), "float32", like) if steps.workspace else None
            addresses = Addresses(
                value=session.value.data,
                locations=session.locations.data,
                weights=session.weights,
                references=session.references.data if session.references else 0,
                lengths=session.lengths(),
                grad_output=grad_output,
                grad_value=value.data if value else 0,
                grad_locations=locations.data if locations else 0,
                grad_weights=at_weights,
                grad_references=references.data if references else 0,
                workspace=workspace.data if workspace else 0,
            )
            steps.run(session.stream, session.metadata(), addresses)
    return Gradients(*(result.finish() if result else None for result in results))


class _Result:
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


class _Session:
    """The device and stream of one call, and its inputs as contiguous device arrays."""

    def __init__(self, call: Call) -> None:
        self.cupy = arrays.require_cupy("an array on a CUDA device")
        self.problem, self.operands = call.problem, call.operands
        self.device = call.problem.device[1]
        self.framework = call.operands.value.framework

    def __enter__(self) -> _Session:
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
        return _alignment(self.value.data, output, *samples)

    def logits_in(self, packed: View | _Result) -> int:
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

    def zero(self, result: _Result) -> None:
        if result.size:
            self.cupy.cuda.runtime.memsetAsync(result.data, 0, result.nbytes, self.stream)


# A model has few problems. One whose problems never repeat must not fill the memory.
_MOST_PREPARED = 4096
_prepared: dict[tuple[Any, ...], Any] = {}


def prepare_forward(problem: Problem, alignment: int, stream: int) -> PreparedLaunch:
    """The launch of the forward.

    Its words are value, metadata, locations, weights, references, lengths, output, sizes.
    """
    device, alignment = problem.device[1], min(alignment, VECTOR_BYTES)

    def make() -> PreparedLaunch:
        prepared = _prepare(plan.forward(problem, alignment, gpu.of_device(device)), device, stream)
        prepared.taking(
            "value", "metadata", "locations", "weights", "references", "lengths", "output", "S", "Q", "image_stride",
            "head_stride", "heads",
        )  # fmt: skip
        return prepared

    return _remembered((problem, alignment), make)


def prepare_backward(problem: Problem, alignment: int, stream: int, wanted: Wanted) -> PreparedBackward:
    """The launches of the backward, in their order."""
    device, alignment = problem.device[1], min(alignment, VECTOR_BYTES)

    def make() -> PreparedBackward:
        return PreparedBackward(
            problem, alignment, gpu.of_device(device), wanted, lambda launch: _prepare(launch, device, stream)
        )

    return _remembered((problem, alignment, wanted), make)


def _remembered(key: tuple[Any, ...], make: Callable[[], Any]) -> Any:
    found = _prepared.get(key)
    if found is None:
        found = make()
        if len(_prepared) >= _MOST_PREPARED:
            _prepared.clear()
        _prepared[key] = found
    return found


def _prepare(launch: plan.Launch, device: int, stream: int) -> PreparedLaunch:
    if not kernels.is_compiled(launch.spec, device):
        streams.refuse_capture(stream, "compile and load a CUDA kernel")
    return PreparedLaunch(launch, device)


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


def _alignment(*addresses: int) -> int:
    """Largest power of two up to 16 that divides every address; 0 is no address."""
    return min(address & -address or VECTOR_BYTES for address in (*addresses, VECTOR_BYTES))
