"""A call by compiled loops: the threads share its blocks of queries forward, its tasks backward.

A block's arrays are parts of the caller's where these are contiguous and need no cast, and small copies otherwise.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from ...call import Problem, Wanted
from .. import threads
from ..tasks import Gradients, Inputs, Task, divide, ranges
from . import build
from .casts import narrowed, widened

# Most samples of a block, so that its copies stay in the caches.
BLOCK_SAMPLES = 1 << 15
# A forward of so many samples is one block: a thread would take longer to start than it saves.
ONE_BLOCK_SAMPLES = 1 << 13
# A forward of many samples has at least so many blocks, for threads to share.
BLOCKS = 8
# Heads and images share a task of the backward up to this many samples.
TASK_SAMPLES = 1 << 13
# A backward of so many samples is one task: a thread would take longer to start than it saves.
ONE_TASK_SAMPLES = 1 << 12


class Block(NamedTuple):
    """Some images, queries and heads: the index of their part of an array [N, Q, M, ...]."""

    images: slice
    queries: slice
    heads: slice


class _Vectors(NamedTuple):
    """Vectors [N, S, M, D] as the kernels address them: all elements from the first to the last, and strides."""

    elements: np.ndarray
    strides: tuple[int, ...]

    def of(self, block: Block | Task) -> tuple[int, int, int, int]:
        """The index of a block's first element, and the strides."""
        image, pixel, head = self.strides
        return block.images.start * image + block.heads.start * head, image, pixel, head


class _Setup(NamedTuple):
    """What all blocks of a call share."""

    inputs: Inputs
    value: _Vectors
    levels: np.ndarray
    options: tuple[bool, bool, bool]
    dtype: np.dtype


def forward(inputs: Inputs) -> np.ndarray:
    """Output [N, Q, M*D] in the storage dtype of value."""
    problem = inputs.problem
    output = np.zeros((problem.N, problem.Q, problem.M, problem.D), inputs.value.dtype)
    if not problem.empty:
        setup = _setup(inputs)
        kernel = build.forward(problem.value_dtype)

        def work(block: Block) -> None:
            locations, weights = _samples(block, setup, _operands(block, setup))
            whole = output[block]
            part = whole if output.dtype == setup.dtype else np.empty(whole.shape, setup.dtype)
            kernel(
                setup.value.elements, setup.value.of(block), setup.levels, (locations, weights), setup.options, part
            )  # fmt: skip
            if part is not whole:
                whole[...] = narrowed(part, output.dtype, problem.value_dtype)

        threads.run_tasks(list(_forward_blocks(problem, inputs.lengths)), work, inputs.threads)
    return output.reshape(problem.output_shape)


def backward(inputs: Inputs, wanted: Wanted) -> Gradients:
    """Gradients of value, locations, weights and reference points, each in the storage dtype of its input.

    In a packed call, the gradient of offsets and logits is one array, in the place of the locations'.
    """
    problem, wanted = inputs.problem, inputs.problem.computed(wanted)
    arrays = zip((inputs.value, inputs.locations, inputs.weights, inputs.references), wanted, strict=True)
    gradients = Gradients(
        *(np.zeros(array.shape, array.dtype) if asked and array is not None else None for array, asked in arrays)
    )
    if problem.empty or not any(wanted):
        return gradients
    assert inputs.grad_output is not None
    by_head = inputs.grad_output.reshape(problem.N, problem.Q, problem.M, problem.D)
    setup = _setup(replace(inputs, grad_output=by_head))
    tasks = divide(problem, inputs.lengths, TASK_SAMPLES, ONE_TASK_SAMPLES)
    of_references: dict[int, np.ndarray] = {}

    def work(number: int) -> None:
        found = _backward_task(tasks[number], setup, gradients)
        if gradients.references is not None:
            of_references[number] = found

    threads.run_tasks(range(len(tasks)), work, inputs.threads)
    if gradients.references is not None and problem.fused is not None:
        total = np.zeros(gradients.references.shape, setup.dtype)
        for number, task in enumerate(tasks):  # in this order, whichever thread was first
            total[task.images, : task.problem.Q] += of_references[number]
        gradients.references[...] = narrowed(total, gradients.references.dtype, problem.fused.dtype)
    return gradients


def _setup(inputs: Inputs) -> _Setup:
    problem = inputs.problem
    levels = [(*level, points) for level, points in zip(problem.levels or (), problem.points, strict=True)]
    variant = problem.variant
    return _Setup(
        inputs=inputs,
        value=_vectors_of(inputs.value),
        levels=np.array(levels, np.int64),
        options=(variant.nearest, variant.padding_mode == "border", variant.align_corners),
        dtype=np.dtype(problem.accumulator_dtype),
    )


def _vectors_of(value: np.ndarray) -> _Vectors:
    """The elements of value without a copy, unless its channels are apart or its memory is not aligned."""
    if value.dtype == np.float16:
        value = value.view(np.int16)
    size = value.itemsize
    if value.strides[3] != size or min(value.strides) < 0 or not value.flags.aligned:
        value = value.copy()
    strides = tuple(stride // size for stride in value.strides[:3])
    if value.flags.c_contiguous:
        return _Vectors(value.reshape(-1), strides)
    extent = value.shape[3] + sum((n - 1) * step for n, step in zip(value.shape[:3], strides, strict=True))
    return _Vectors(np.lib.stride_tricks.as_strided(value, (extent,), (size,)), strides)


def _forward_blocks(problem: Problem, lengths: Sequence[int] | None) -> Iterator[Block]:
    per_query, all_heads = problem.M * problem.K, slice(0, problem.M)
    total = problem.N * problem.Q * per_query
    most = max(ONE_BLOCK_SAMPLES, min(BLOCK_SAMPLES, -(-total // BLOCKS)))
    images = 1 if lengths is not None else max(1, most // (problem.Q * per_query))
    for part in ranges(problem.N, images):
        length = problem.Q if lengths is None else lengths[part.start]
        step = length if images > 1 else max(1, most // per_query)
        for queries in ranges(length, step):
            yield Block(part, queries, all_heads)


def _samples(block: Block, setup: _Setup, operands: tuple[np.ndarray, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Locations [images, queries, heads, 2 * K] and weights [.., K] of a block with these :func:`_operands`."""
    if setup.inputs.problem.fused is None:
        return operands
    samples = np.empty(operands[0].shape, setup.dtype), np.empty(operands[1].shape, setup.dtype)
    build.materialise(setup.dtype.name)(_references(block, setup), *operands, setup.levels, *samples)
    return samples


def _operands(block: Block, setup: _Setup) -> tuple[np.ndarray, np.ndarray]:
    """A block's part of the locations or offsets, and of the weights or logits."""
    inputs, K = setup.inputs, setup.inputs.problem.K
    if inputs.weights is None:
        packed = inputs.locations[block]
        return widened(packed[..., : 2 * K], setup.dtype), widened(packed[..., 2 * K :], setup.dtype)
    locations, weights = inputs.locations[block], inputs.weights[block]
    shape = weights.shape[:3]
    return (
        widened(locations, setup.dtype).reshape(*shape, 2 * K), widened(weights, setup.dtype).reshape(*shape, K)
    )  # fmt: skip


def _references(block: Block, setup: _Setup) -> np.ndarray:
    assert setup.inputs.references is not None
    return widened(setup.inputs.references[block.images, block.queries], setup.dtype)


def _backward_task(task: Task, setup: _Setup, gradients: Gradients) -> np.ndarray:
    """Fill the parts of the gradients that belong to this task; returns its part of that of the reference points."""
    problem, references = task.problem, setup.inputs.references
    sums, in_place = _sums_of(task, setup, gradients.value)
    wants_samples = gradients.locations is not None or gradients.weights is not None
    shape = (0,) if references is None else (task.image_count, problem.Q, *references.shape[2:])
    of_references = np.zeros(shape, setup.dtype)
    kernel = build.backward(problem.value_dtype)
    heads = task.heads.stop - task.heads.start
    for queries in ranges(problem.Q, max(1, BLOCK_SAMPLES // (task.image_count * heads * problem.K))):
        block = Block(task.images, queries, task.heads)
        operands = _operands(block, setup)
        locations, weights = _samples(block, setup, operands)
        assert setup.inputs.grad_output is not None
        samples = locations, weights, widened(setup.inputs.grad_output[block], setup.dtype)
        of_samples = _SampleGradients(block, setup, gradients) if wants_samples else None
        found = of_samples.arrays if of_samples else (_NOTHING.astype(setup.dtype),) * 2
        kernel(
            setup.value.elements, setup.value.of(task), setup.levels, samples, setup.options, sums,
            (*found, wants_samples),
        )  # fmt: skip
        if of_samples is not None:
            if references is not None and (gradients.weights is not None or problem.packed):
                build.backward_of_logits(setup.dtype.name)(weights, found[1])
            if references is not None and gradients.locations is not None:
                build.backward_of_offsets(setup.dtype.name)(
                    _references(block, setup), operands[0], setup.levels, found[0], of_references[:, queries]
                )
            of_samples.store()
    if gradients.value is not None and not in_place:
        by_pixel = sums[0].reshape(task.image_count, heads, problem.S, problem.D).swapaxes(1, 2)
        cast = narrowed(by_pixel, gradients.value.dtype, problem.value_dtype)
        gradients.value[task.images, :, task.heads] = cast
    return of_references


_NOTHING = np.empty((0, 0, 0, 0))


def _sums_of(
    task: Task, setup: _Setup, grad_value: np.ndarray | None
) -> tuple[tuple[np.ndarray, tuple[int, int, int, int], bool], bool]:
    """What the kernel adds the gradient of value to, and whether that is `grad_value` itself."""
    problem, heads = task.problem, task.heads.stop - task.heads.start
    if grad_value is None:
        return (np.empty(0, setup.dtype), (0, 0, 0, 0), False), False
    if grad_value.dtype == setup.dtype:
        vectors = _vectors_of(grad_value)
        return (vectors.elements, vectors.of(task), True), True
    per_head = problem.S * problem.D
    sums = np.zeros(task.image_count * heads * per_head, setup.dtype)
    return (sums, (0, heads * per_head, problem.D, per_head), True), False


class _SampleGradients:
    """Gradients of the locations and weights of a block: parts of the results, or copies where these need a cast."""

    def __init__(self, block: Block, setup: _Setup, gradients: Gradients) -> None:
        problem = setup.inputs.problem
        self.dtype, K = problem.location_dtype, problem.K
        N, Q, M = problem.N, problem.Q, problem.M
        locations, weights = gradients.locations, gradients.weights
        if problem.packed and locations is not None:
            locations, weights = locations[..., : 2 * K], locations[..., 2 * K :]
        self.targets = [
            None if whole is None else whole.reshape(N, Q, M, width)[block]
            for whole, width in ((locations, 2 * K), (weights, K))
        ]
        shape = [len(range(*part.indices(n))) for part, n in zip(block, (N, Q, M), strict=True)]
        self.arrays = tuple(
            target if target is not None and target.dtype == setup.dtype else np.empty((*shape, width), setup.dtype)
            for target, width in zip(self.targets, (2 * K, K), strict=True)
        )

    def store(self) -> None:
        """Cast the copies into the results."""
        for target, array in zip(self.targets, self.arrays, strict=True):
            if target is not None and target is not array:
                target[...] = narrowed(array, target.dtype, self.dtype)
