"""A custom call on a GPU: prepared kernels are launched on XLA's stream with the addresses of its buffers.

The first call of an operation and its shapes on a device compiles kernels, unless :func:`prepare` did so. Every other
call is a look-up, addresses and launches.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from .. import arrays
from ..call import Problem
from ..cuda import naive
from ..cuda import plan as planner
from ..cuda import run as cuda
from ..cuda.level_tables import level_table
from ..cuda.session import on_device
from ..cuda.steps import Addresses
from .call_frame import CallFrame
from .operation import Operation, Shape

# What vector loads need, and what XLA's buffers have unless one is a part of another.
ALIGNMENT = 16
# ``launch(frame, stream, arguments, results)`` with the addresses of all arrays.
Launch = Callable[[CallFrame, int, list[int], list[int]], None]
Key = tuple[Any, ...]

_launches: dict[Key, Launch] = {}
# A model has few layouts. One whose layouts never repeat must not fill the memory.
_MOST_LAUNCHES = 4096


def run(frame: CallFrame) -> None:
    """Queues the kernels of one call."""
    given, made = frame.addresses()
    stream, ordinal = frame.stream_and_ordinal()
    combined = 0
    for address in given:
        combined |= address
    for address in made:
        combined |= address
    alignment = combined & -combined if combined % ALIGNMENT else ALIGNMENT
    attribute = frame.attribute()
    launch = _launches.get((attribute, ordinal, alignment))
    if launch is None:
        launch = _make(frame, attribute, ordinal, alignment, stream)
    launch(frame, stream, given, made)


def _make(frame: CallFrame, attribute: bytes, ordinal: int, alignment: int, stream: int) -> Launch:
    """The launch of a call, remembered by its attribute, and by its sizes where the attribute has none."""
    operation, sized = Operation.decode(attribute)
    arguments = frame.arguments()
    shapes = {role: buffer.shape for role, buffer in zip(operation.roles, arguments, strict=True)}
    dtypes = {role: buffer.dtype for role, buffer in zip(operation.roles, arguments, strict=True)}
    key: Key = (attribute, ordinal, alignment, *(() if sized else shapes.values()))
    launch = _launches.get(key)
    if launch is None:
        address = next((buffer.data for buffer in arguments if buffer.data), 0)
        device = device_of(address) if address else max(ordinal, 0)
        problem = operation.problem(shapes, dtypes, ("cuda", device))
        launch = launch_of(operation, problem, alignment, stream)
        _refuse_small_workspace(frame, operation, problem, alignment)
        if len(_launches) >= _MOST_LAUNCHES:
            _launches.clear()
        _launches[key] = launch
    return launch


def _refuse_small_workspace(frame: CallFrame, operation: Operation, problem: Problem, alignment: int) -> None:
    """A call may come from a process, or a time, with other measured launch configurations."""
    results = frame.results()
    if operation.wanted is None or problem.empty or len(results) == len(operation.gradients):
        return
    given = results[-1].shape[0]
    with on_device(problem.device[1]):
        need = cuda.prepare_backward(problem, alignment, 0, problem.computed(operation.wanted)).workspace
    if need > given:
        raise RuntimeError(
            f"expected a workspace of {need} bytes, got {given}: the function was compiled with other tuned launch "
            f"configurations; call jax.clear_caches() and compile it again"
        )


def device_of(address: int) -> int:
    """Number of the device that has this memory, as CUDA counts them."""
    return arrays.require_cupy("a JAX array on a CUDA device").cuda.runtime.pointerGetAttributes(address).device


def prepare(operation: Operation, problem: Problem) -> int:
    """Compiles and loads the kernels of `problem`, and returns the bytes of workspace that a call needs."""
    device = problem.device[1]
    if problem.empty:
        return 0
    with on_device(device):
        _refuse_naive()
        if problem.levels is not None:
            level_table(problem.levels, device, 0)
        if operation.wanted is None:
            cuda.prepare_forward(problem, ALIGNMENT, 0)
            return 0
        return cuda.prepare_backward(problem, ALIGNMENT, 0, problem.computed(operation.wanted)).workspace


def launch_of(operation: Operation, problem: Problem, alignment: int, stream: int) -> Launch:
    """The function that repeats the calls of one problem; on the first one of a device it compiles the kernels."""
    device = problem.device[1]
    runtime = arrays.require_cupy("a JAX array on a CUDA device").cuda.runtime
    with on_device(device):
        if problem.empty:
            launch = _zeros(operation, problem)
        elif alignment < 2 * arrays.item_size(problem.location_dtype):
            raise RuntimeError(f"XLA passed an array at an address that is a multiple of {alignment} bytes only")
        else:
            _refuse_naive()
            make = _forward if operation.wanted is None else _backward
            launch = make(operation, problem, alignment, stream)
    get_device, set_device = runtime.getDevice, runtime.setDevice

    def on_its_device(frame: CallFrame, stream: int, given: list[int], made: list[int]) -> None:
        # Also gives a thread that has never used CUDA its context, which a launch by the driver does not.
        before = get_device()
        set_device(device)
        try:
            launch(frame, stream, given, made)
        finally:
            if before != device:
                set_device(before)

    return on_its_device


def _refuse_naive() -> None:
    if naive.selected():
        raise NotImplementedError(
            "CUPY_MSDA_KERNELS: expected 'fast' with JAX arrays on a GPU, got 'naive': pass CuPy or torch arrays"
        )


def _inputs(operation: Operation, problem: Problem, stream: int) -> Callable[[list[int]], tuple[Any, ...]]:
    """A function from addresses of all arguments to value, metadata, locations, weights, references and lengths."""
    index = {name: place for place, name in enumerate(operation.roles)}
    levels: tuple[int, ...] = ()
    if problem.levels is not None:
        levels = level_table(problem.levels, problem.device[1], stream)
    value, locations = index["value"], index["locations"]
    weights, references, lengths = (index.get(name) for name in ("weights", "references", "lengths"))
    shapes, starts = index.get("shapes"), index.get("starts")
    to_logits = 2 * problem.K * arrays.item_size(problem.location_dtype)

    def read(given: list[int]) -> tuple[Any, ...]:
        metadata = levels
        if shapes is not None:
            metadata = (given[shapes], 0 if starts is None else given[starts])
        return (
            given[value],
            metadata,
            given[locations],
            given[locations] + to_logits if weights is None else given[weights],
            0 if references is None else given[references],
            0 if lengths is None else given[lengths],
        )

    return read


def _forward(operation: Operation, problem: Problem, alignment: int, stream: int) -> Launch:
    read, sizes = _inputs(operation, problem, stream), planner.size_words(problem)
    kernel = cuda.prepare_forward(problem, alignment, stream).run

    def launch(frame: CallFrame, stream: int, given: list[int], made: list[int]) -> None:
        value, metadata, *samples = read(given)
        kernel(stream, value, *metadata, *samples, made[0], *sizes)

    return launch


def _backward(operation: Operation, problem: Problem, alignment: int, stream: int) -> Launch:
    assert operation.wanted is not None
    read = _inputs(operation, problem, stream)
    steps = cuda.prepare_backward(problem, alignment, stream, problem.computed(operation.wanted))
    run, need = steps.run, steps.workspace
    places = {name: place for place, name in enumerate(operation.gradients)}
    of_value, of_locations, of_weights, of_references = (
        places.get(name) for name in ("value", "locations", "weights", "references")
    )
    results, packed = len(places), operation.packed
    to_logits = 2 * problem.K * arrays.item_size(problem.location_dtype)

    def launch(frame: CallFrame, stream: int, given: list[int], made: list[int]) -> None:
        value, metadata, locations, weights, references, lengths = read(given)
        grad_locations = 0 if of_locations is None else made[of_locations]
        if packed:
            grad_weights = grad_locations + to_logits if grad_locations else 0
        else:
            grad_weights = 0 if of_weights is None else made[of_weights]
        # The workspace is the last result, if it was planned when the call was compiled.
        allocated = need and len(made) == results
        workspace = frame.allocate(need) if allocated else made[-1]
        addresses = Addresses(
            value, locations, weights, references, lengths, given[0], 0 if of_value is None else made[of_value],
            grad_locations, grad_weights, 0 if of_references is None else made[of_references], workspace,
        )  # fmt: skip
        try:
            run(stream, metadata, addresses)
        finally:
            if allocated:  # XLA gives the memory to work that is queued later on the same stream
                frame.free(workspace, need)

    return launch


def _zeros(operation: Operation, problem: Problem) -> Launch:
    """Zeros for all results of a problem without work."""
    fill = arrays.require_cupy("a JAX array on a CUDA device").cuda.runtime.memsetAsync
    sizes = [_nbytes(*result) for result in _results_of(operation, problem)]

    def launch(frame: CallFrame, stream: int, given: list[int], made: list[int]) -> None:
        for address, nbytes in zip(made, sizes, strict=False):
            if nbytes:
                fill(address, 0, nbytes, stream)

    return launch


def _results_of(operation: Operation, problem: Problem) -> list[tuple[Shape, str]]:
    N, Q, M, K = problem.N, problem.Q, problem.M, problem.K
    shapes: dict[str, Shape] = {
        "value": problem.value_shape,
        "locations": (N, Q, M, 3 * K if problem.packed else 2 * K),
        "weights": (N, Q, M, K),
    }
    dtypes = {"value": problem.value_dtype, "locations": problem.location_dtype, "weights": problem.location_dtype}
    if problem.fused:
        shapes["references"] = (N, Q, problem.fused.levels, problem.fused.coordinates)
        dtypes["references"] = problem.fused.dtype
    return operation.results(shapes, dtypes)


def _nbytes(shape: Shape, dtype: str) -> int:
    return functools.reduce(lambda product, size: product * size, shape, arrays.item_size(dtype))
