"""The launches of a backward in their order: prepared once for a problem, run any number of times."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from .. import arrays
from ..call import Problem, Wanted
from . import plan, plan_backward, streams
from .launch import PreparedLaunch


class Addresses(NamedTuple):
    """Of the arrays of a run; with a front end, `locations` are offsets and `weights` logits."""

    value: int
    locations: int
    weights: int
    references: int
    lengths: int
    grad_output: int
    grad_value: int
    grad_locations: int
    grad_weights: int
    grad_references: int
    workspace: int


_GRAD_VALUE, _WORKSPACE = map(Addresses._fields.index, ("grad_value", "workspace"))


class PreparedBackward:
    """The gradients of one problem that are wanted.

    Attributes
    ----------
    workspace : int
        Bytes of uninitialised device memory, aligned to 256, that a run needs beside the gradients.
    run : callable
        ``run(stream, metadata, *addresses)``: the words of the kernels' `msda_metadata`, and :class:`Addresses`; 0
        for what is not there or not wanted.
    """

    def __init__(
        self,
        problem: Problem,
        alignment: int,
        multiprocessors: int,
        wanted: Wanted,
        prepare: Callable[[plan.Launch], PreparedLaunch],
    ) -> None:
        planned = plan_backward.backward(problem, alignment, multiprocessors, wanted)
        self.workspace = planned.workspace
        steps: list[Callable[..., None]] = []
        if planned.summation:
            steps.append(_summation(planned.summation, problem, prepare))
        if planned.expand:
            steps.append(_expanded(prepare(planned.expand).run, planned.expanded, problem, steps.pop()))
        if planned.samples:
            steps.append(_backward(prepare(planned.samples).run, False, planned.parts, plan.size_words(problem)))
        if len(steps) == 2:
            steps = [_beside(*steps, problem.device[1])]
        if planned.atomics:
            count = problem.N * problem.S * problem.M * problem.D
            rounded = planned.rounding is not None
            steps.append(_zeros(rounded, count * arrays.item_size(problem.accumulator_dtype)))
            steps.append(_backward(prepare(planned.atomics).run, rounded, planned.parts, plan.size_words(problem)))
        if planned.rounding:
            steps.append(_rounding(prepare(planned.rounding).run, count))
        if planned.references:
            steps.append(_references(prepare(planned.references).run, planned.parts, problem))

        def run(stream: int, metadata: tuple[int, ...], *addresses: int) -> None:
            for step in steps:
                step(stream, metadata, *addresses)

        self.run = run if len(steps) > 1 else steps[0]


def _beside(longer: Callable[..., None], other: Callable[..., None], device: int) -> Callable[..., None]:
    """Two steps that do not need each other, side by side.

    Few queries do not fill the GPU, and where they do, one fills the gaps of the other at its beginning and its end.
    """
    streams.make_ahead(device)
    idle = streams.idle(device)

    def run(stream: int, metadata: tuple[int, ...], *addresses: int) -> None:
        try:
            beside = idle.pop()
        except IndexError:
            beside = streams.Aside()
        beside.fork(stream)
        longer(stream, metadata, *addresses)
        other(beside.stream, metadata, *addresses)
        beside.join(stream)
        idle.append(beside)

    return run


def _backward(kernel: Callable[..., None], rounded: bool, parts: int, sizes: tuple[int, ...]) -> Callable[..., None]:
    """Additions go to grad_value, or where they are `rounded` once, for 16-bit values, to float32 in the workspace.

    What each head adds to the gradient of reference points goes to byte `parts` of the workspace.
    """

    def run(
        stream: int, metadata: tuple[int, ...], value: int, locations: int, weights: int, references: int, lengths: int,
        grad_output: int, grad_value: int, grad_locations: int, grad_weights: int, grad_references: int, workspace: int,
    ) -> None:  # fmt: skip
        sums = workspace if rounded else grad_value
        inputs = (value, *metadata, locations, weights, references, lengths, grad_output)
        kernel(stream, *inputs, sums, grad_locations, grad_weights, workspace + parts, *sizes)

    return run


def _zeros(rounded: bool, nbytes: int) -> Callable[..., None]:
    fill: Any = arrays.require_cupy("an array on a CUDA device").cuda.runtime.memsetAsync

    target = _WORKSPACE if rounded else _GRAD_VALUE

    def run(stream: int, metadata: tuple[int, ...], *addresses: int) -> None:
        fill(addresses[target], 0, nbytes, stream)

    return run


def _rounding(kernel: Callable[..., None], count: int) -> Callable[..., None]:
    def run(stream: int, metadata: tuple[int, ...], *addresses: int) -> None:
        kernel(stream, addresses[_WORKSPACE], addresses[_GRAD_VALUE], count)

    return run


def _references(kernel: Callable[..., None], parts: int, problem: Problem) -> Callable[..., None]:
    assert problem.fused is not None
    count = problem.N * problem.Q * problem.fused.levels * problem.fused.coordinates

    def run(stream: int, metadata: tuple[int, ...], *addresses: int) -> None:
        of = Addresses(*addresses)
        kernel(stream, of.workspace + parts, of.grad_references, count)

    return run


def _expanded(
    kernel: Callable[..., None], at: int, problem: Problem, after: Callable[..., None]
) -> Callable[..., None]:
    """The step `after`, with locations in pixels and weights, made at byte `at` of the workspace."""
    samples = problem.N * problem.Q * problem.M * problem.K
    nbytes = 2 * samples * arrays.item_size(problem.accumulator_dtype)
    sizes = (problem.S, problem.Q, problem.N * problem.M)

    def run(stream: int, metadata: tuple[int, ...], *addresses: int) -> None:
        of = Addresses(*addresses)
        locations, weights = of.workspace + at, of.workspace + at + nbytes
        inputs = (of.locations, *metadata, of.weights, of.references, of.lengths)
        kernel(stream, *inputs, locations, weights, *sizes)
        after(stream, metadata, *of._replace(locations=locations, weights=weights))

    return run


def _summation(
    planned: plan_backward.Summation, problem: Problem, prepare: Callable[[plan.Launch], PreparedLaunch]
) -> Callable[..., None]:
    """grad_value by lists, in the order of the samples: the same bits every time."""
    sort, total = prepare(planned.sort).run, prepare(planned.sum).run
    count = prepare(planned.count).run if planned.count else None
    sizes, all_heads = (problem.S, problem.Q), problem.N * problem.M
    slabs = [
        (head, all_heads, row, planned.rows)
        for head in range(0, all_heads, planned.heads)
        for row in range(0, problem.S, planned.rows)
    ]
    runs = (planned.runs, planned.capacity)
    in_workspace = (planned.counts, planned.pieces, planned.sums)
    by_block = planned.sum.key.kind == "sum"

    def run(
        stream: int, metadata: tuple[int, ...], value: int, locations: int, weights: int, references: int, lengths: int,
        grad_output: int, grad_value: int, grad_locations: int, grad_weights: int, grad_references: int, workspace: int,
    ) -> None:  # fmt: skip
        starts, entries = workspace, workspace + planned.entries
        counts, pieces, sums = (workspace + at if count else 0 for at in in_workspace)
        of_pieces = (counts, pieces, sums, planned.piece) if by_block else ()
        for slab in slabs:
            sort(stream, locations, *metadata, weights, references, lengths, starts, entries, counts, *sizes, *slab)
            if count:
                count(stream, starts, counts, pieces, planned.runs, planned.rows, planned.piece)
            total(stream, grad_output, entries, starts, grad_value, *sizes, *runs, *slab, *of_pieces)

    return run
