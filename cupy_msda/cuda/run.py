"""The CUDA path: allocate, plan, launch. It works on addresses, on the caller's device and current stream."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

from ..call import Call, Problem, Wanted
from . import kernels, naive, plan, recording, streams
from .axes import VECTOR_BYTES
from .launch import PreparedLaunch, Run
from .session import Result, Session, alignment_of
from .steps import Addresses, PreparedBackward
from .tuning import loaded


class Gradients(NamedTuple):
    """In the caller's framework; None where not wanted. `locations` holds that of offsets and logits in one array."""

    value: Any
    locations: Any
    weights: Any
    references: Any


def forward(call: Call) -> Any:
    """Output [N, Q, M*D] in the framework of value."""
    problem, operands = call.problem, call.operands
    with Session(call) as session:
        output = Result(problem.output_shape, problem.value_dtype, operands.value)
        if problem.empty:
            session.zero(output)
        elif naive.selected():
            naive.forward(session, output)
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
    with Session(call) as session:
        value = Result(problem.value_shape, problem.value_dtype, like) if wanted.value else None
        locations = Result(operands.locations.shape, problem.location_dtype, like) if wanted.locations else None
        weights = references = None
        if wanted.weights and not problem.packed:
            weights = Result(operands.weights.shape, problem.location_dtype, like)
        if wanted.references and operands.references:
            references = Result(operands.references.shape, operands.references.dtype, like)
        results = (value, locations, weights, references)
        if problem.empty:
            for result in results:
                if result is not None:
                    session.zero(result)
        elif any(wanted):
            grad_output = session.grad_output.data if session.grad_output else 0
            steps: PreparedBackward | naive.NaiveBackward
            if naive.selected():
                steps = naive.NaiveBackward(problem, wanted, session.stream)
            else:
                alignment = alignment_of(session.value.data, grad_output)
                steps = prepare_backward(problem, alignment, session.stream, wanted)
            at_weights = weights.data if weights else 0
            if locations and problem.packed:
                at_weights = session.logits_in(locations)
            workspace = Result((steps.workspace // 4,), "float32", like) if steps.workspace else None
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


# A model has few problems. One whose problems never repeat must not fill the memory.
_MOST_PREPARED = 4096
_prepared: dict[tuple[Any, ...], Any] = {}
loaded.when_changed(lambda: _prepared.clear())


def prepare_forward(problem: Problem, alignment: int, stream: int) -> PreparedLaunch:
    """The launch of the forward.

    Its words are value, metadata, locations, weights, references, lengths, output, sizes.
    """
    device, alignment = problem.device[1], min(alignment, VECTOR_BYTES)
    recording.note(problem, None)

    def make() -> PreparedLaunch:
        prepared = _prepare(plan.forward(problem, alignment, loaded.gpu_of(device)), device, stream)
        prepared.taking(
            "value", "metadata", "locations", "weights", "references", "lengths", "output", "S", "Q", "image_stride",
            "head_stride", "heads",
        )  # fmt: skip
        return prepared

    return _remembered((problem, alignment), make)


def switched_forward(problem: Problem, alignment: int, stream: int, is_deterministic: Callable[[], bool]) -> Run:
    """The same launch of a problem that a switch of the framework makes deterministic or not, in each call."""
    fixed, free = (
        prepare_forward(replace(problem, deterministic=deterministic), alignment, stream)
        for deterministic in (True, False)
    )
    if fixed.spec == free.spec:
        return free.run

    def run(stream: int, *words: int) -> None:
        (fixed if is_deterministic() else free).run(stream, *words)

    return run


def prepare_backward(problem: Problem, alignment: int, stream: int, wanted: Wanted) -> PreparedBackward:
    """The launches of the backward, in their order."""
    device, alignment = problem.device[1], min(alignment, VECTOR_BYTES)
    recording.note(problem, wanted)

    def make() -> PreparedBackward:
        return PreparedBackward(
            problem, alignment, loaded.gpu_of(device), wanted, lambda launch: _prepare(launch, device, stream)
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
