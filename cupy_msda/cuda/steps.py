"""The launches of a backward in their order: prepared once for a problem, run any number of times."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from .. import arrays
from ..call import Problem, Wanted
from . import plan, plan_backward, streams
from .gpu import Gpu
from .launch import PreparedLaunch


class Addresses(NamedTuple):
    """Of the arrays of a backward; 0 for what is not there or not wanted.

    In a fused call, `locations` are offsets and `weights` are logits.
    """

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


# A step of a backward: ``step(stream, metadata, addresses)``, with the words of the kernels' `metadata`.
Step = Callable[[int, tuple[int, ...], Addresses], None]
Prepare = Callable[[plan.Launch], PreparedLaunch]


class PreparedBackward:
    """The gradients of one problem that are wanted.

    Attributes
    ----------
    workspace : int
        Bytes of uninitialised device memory, aligned to 256, that a run needs besides the gradients.
    run : callable
        ``run(stream, metadata, addresses)``: the words of the kernels' `metadata`, and :class:`Addresses`.
    """

    def __init__(self, problem: Problem, alignment: int, gpu: Gpu, wanted: Wanted, prepare: Prepare) -> None:
        planned = plan_backward.backward(problem, alignment, gpu, wanted)
        self.workspace = planned.workspace
        steps: list[Step] = []
        if planned.summation:
            steps.append(_summation(planned.summation, problem, prepare))
        if planned.materialise:
            steps.append(_materialised(prepare(planned.materialise), planned.materialised, problem, steps.pop()))
        if planned.samples:
            steps.append(_backward(prepare(planned.samples), planned, problem))
        if len(steps) == 2:
            steps = [_concurrent(steps[0], steps[1], problem.device[1])]
        if planned.atomics:
            steps.append(_zeros(planned, problem))
            steps.append(_backward(prepare(planned.atomics), planned, problem))
        if planned.cast:
            steps.append(_cast(prepare(planned.cast), problem))
        if planned.references:
            steps.append(_references(prepare(planned.references), planned.reference_parts, problem))

        def run(stream: int, metadata: tuple[int, ...], addresses: Addresses) -> None:
            for step in steps:
                step(stream, metadata, addresses)

        self.run: Step = run if len(steps) > 1 else steps[0]


def _concurrent(longer: Step, other: Step, device: int) -> Step:
    """Two steps that do not need each other, the `other` on a side stream.

    Few queries do not fill the GPU. Where they do, one step fills the gaps of the other at its beginning and its end.
    docs/performance/decisions.md#sorted-side-stream
    """
    streams.create_first(device)
    idle = streams.idle(device)

    def run(stream: int, metadata: tuple[int, ...], addresses: Addresses) -> None:
        try:
            side = idle.pop()
        except IndexError:
            side = streams.SideStream()
        side.fork(stream)
        longer(stream, metadata, addresses)
        other(side.stream, metadata, addresses)
        side.join(stream)
        idle.append(side)

    return run


def _backward(kernel: PreparedLaunch, planned: plan_backward.Backward, problem: Problem) -> Step:
    """The backward kernel.

    It adds to grad_value, or to float32 sums in the workspace where these are cast. What each head adds to the gradient
    of the reference points goes to the workspace.
    """
    launch = kernel.taking(
        "value", "metadata", "locations", "weights", "references", "lengths", "grad_output", "grad_value",
        "grad_locations", "grad_weights", "grad_references", "S", "Q", "image_stride", "head_stride", "heads",
    )  # fmt: skip
    in_workspace, parts, sizes = planned.cast is not None, planned.reference_parts, plan.size_words(problem)

    def run(stream: int, metadata: tuple[int, ...], addresses: Addresses) -> None:
        (
            value, locations, weights, references, lengths, grad_output, grad_value, grad_locations, grad_weights, _,
            workspace,
        ) = addresses  # fmt: skip
        launch(
            stream, value, *metadata, locations, weights, references, lengths, grad_output,
            workspace if in_workspace else grad_value, grad_locations, grad_weights, workspace + parts, *sizes,
        )  # fmt: skip

    return run


def _zeros(planned: plan_backward.Backward, problem: Problem) -> Step:
    """Zeros where the backward kernel adds to."""
    fill: Any = arrays.require_cupy("an array on a CUDA device").cuda.runtime.memsetAsync
    nbytes = problem.N * problem.S * problem.M * problem.D * arrays.item_size(problem.accumulator_dtype)
    in_workspace = planned.cast is not None

    def run(stream: int, metadata: tuple[int, ...], addresses: Addresses) -> None:
        fill(addresses.workspace if in_workspace else addresses.grad_value, 0, nbytes, stream)

    return run


def _cast(kernel: PreparedLaunch, problem: Problem) -> Step:
    """The float32 sums of the workspace to 16 bits."""
    launch = kernel.taking("source", "target", "count")
    count = problem.N * problem.S * problem.M * problem.D

    def run(stream: int, metadata: tuple[int, ...], addresses: Addresses) -> None:
        launch(stream, addresses.workspace, addresses.grad_value, count)

    return run


def _references(kernel: PreparedLaunch, parts: int, problem: Problem) -> Step:
    """The gradient of the reference points: the sum of what the heads have put at byte `parts` of the workspace."""
    launch = kernel.taking("per_head", "grad_references", "count")
    assert problem.fused is not None
    count = problem.N * problem.Q * problem.fused.levels * problem.fused.coordinates

    def run(stream: int, metadata: tuple[int, ...], addresses: Addresses) -> None:
        launch(stream, addresses.workspace + parts, addresses.grad_references, count)

    return run


def _materialised(kernel: PreparedLaunch, at: int, problem: Problem, then: Step) -> Step:
    """The step `then`, with locations in pixels and weights, which are computed at byte `at` of the workspace."""
    launch = kernel.taking(
        "offsets", "metadata", "logits", "references", "lengths", "locations", "weights", "S", "Q", "heads"
    )  # fmt: skip
    samples = problem.N * problem.Q * problem.M * problem.K
    nbytes = 2 * samples * arrays.item_size(problem.accumulator_dtype)
    sizes = (problem.S, problem.Q, problem.N * problem.M)

    def run(stream: int, metadata: tuple[int, ...], addresses: Addresses) -> None:
        _, offsets, logits, references, lengths, *_, workspace = addresses
        locations, weights = workspace + at, workspace + at + nbytes
        launch(stream, offsets, *metadata, logits, references, lengths, locations, weights, *sizes)
        then(stream, metadata, addresses._replace(locations=locations, weights=weights))

    return run


def _summation(planned: plan_backward.Summation, problem: Problem, prepare: Prepare) -> Step:
    """grad_value without atomics, in the order of the samples: the same bits every time."""
    slab_names = ("first_head", "heads", "first_pixel", "buckets")
    sort = prepare(planned.sort).taking(
        "locations", "metadata", "weights", "references", "lengths", "segment_starts", "contributions", "table",
        "queue", "queued", "contributions_per_bucket", "S", "Q", *slab_names, "pixels",
    )  # fmt: skip
    reduce = prepare(planned.reduce).taking(
        "grad_output", "contributions", "segment_starts", "grad_value", "table", "S", "Q", "runs", "capacity",
        *slab_names, "queue", "chunk_sums", "chunk_size",
    )  # fmt: skip
    sizes, runs, all_heads = (problem.S, problem.Q), (planned.runs, planned.capacity), problem.N * problem.M
    slabs = [
        (head, all_heads, first_pixel, planned.buckets)
        for head in range(0, all_heads, planned.heads)
        for first_pixel in range(0, problem.S, planned.pixels)
    ]
    queued, per_bucket = planned.queued, planned.contributions_per_bucket

    def run(stream: int, metadata: tuple[int, ...], addresses: Addresses) -> None:
        _, locations, weights, references, lengths, grad_output, grad_value, *_, workspace = addresses
        starts, table, contributions = workspace, workspace + planned.table, workspace + planned.contributions
        queue, sums = (workspace + planned.queue, workspace + planned.sums) if queued else (0, 0)
        inputs = (locations, *metadata, weights, references, lengths)
        for slab in slabs:
            sort(
                stream, *inputs, starts, contributions, table, queue, queued, per_bucket, *sizes, *slab, planned.pixels
            )
            reduce(
                stream, grad_output, contributions, starts, grad_value, table, *sizes, *runs, *slab, queue, sums,
                planned.chunk_size,
            )  # fmt: skip

    return run
