"""Which kernels a backward is made of, and their launches: a pure function of the problem and the GPU.

The gradient of value is a sum over all samples that touch a pixel. There are three ways to compute it,
and ``cost_model.py`` chooses where the caller does not ask for a fixed order:

- "atomics": an addition per sample and value vector (``backward.cu``): few launches, for small problems;
- "aggregated": the same, but a block first adds up its samples of a cell: for queries that are pixels;
- "sorted" (``sorted/``): contributions are sorted into buckets of value vectors, and each bucket is reduced in a fixed
  order. The result is the same to the last bit, and each value vector is written once, in value's dtype.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from ..arrays import item_size
from ..call import ALL, SIXTEEN_BIT, Problem, Wanted
from . import cost_model, plan, sorted_heuristics
from .axes import aligned, contribution_bytes
from .gpu import Gpu
from .index_width import sizes_of
from .plan import Launch
from .sorted_specs import CHUNK_BYTES, QUEUE_BYTES, TABLE_BYTES, segment_starts_bytes
from .tuning import applied

# Chunks that the contributions of all heads should fill, at most.
CHUNKS = 512
# Bytes of contributions between the launches, unless one head needs more: heads are done in groups.
WORKSPACE = 256 << 20


@dataclass(frozen=True)
class Summation:
    """The launches of a sorted sum, and the memory between them.

    `heads` of N * M and `pixels` of S are done at a time, a slab, in at most so many `buckets` per head. Each head has
    `runs` sorted runs of at most `capacity` contributions, which are at byte `contributions` of the workspace of
    `nbytes`. The beginnings of their segments come before, then, at `table`, the sizes of buckets, which have about
    `contributions_per_bucket`. Where a bucket can have so many that several warps sum it, in chunks of `chunk_size`,
    there is room for `queued` chunks in the queue at byte `queue`, and for their sums at byte `sums`.
    """

    sort: Launch
    reduce: Launch
    heads: int
    pixels: int
    buckets: int
    runs: int
    capacity: int
    contributions_per_bucket: int
    chunk_size: int
    queued: int
    table: int
    contributions: int
    queue: int
    sums: int
    nbytes: int

    @property
    def launches(self) -> tuple[Launch, ...]:
        """In their order."""
        return (self.sort, self.reduce)


@dataclass(frozen=True)
class Backward:
    """What runs, in this order: None for what does not. `workspace` is the bytes between the launches.

    `samples` computes the gradients of the samples alone, and may run at the same time as `summation`. `atomics` adds
    to zeros, and computes those gradients too where they are wanted; `cast` casts its sums to 16 bits. In a fused call,
    `materialise` computes the locations and weights of `summation`, at byte `materialised` of the workspace, and
    `references` sums what the heads add to the gradient of reference points, at byte `reference_parts`.
    """

    samples: Launch | None = None
    materialise: Launch | None = None
    summation: Summation | None = None
    atomics: Launch | None = None
    cast: Launch | None = None
    references: Launch | None = None
    materialised: int = 0
    reference_parts: int = 0
    workspace: int = 0

    @property
    def launches(self) -> tuple[Launch, ...]:
        """All of them."""
        sums = self.summation.launches if self.summation else ()
        found = (self.samples, self.materialise, *sums, self.atomics, self.cast, self.references)
        return tuple(launch for launch in found if launch)


def backward(problem: Problem, alignment: int, gpu: Gpu, wanted: Wanted = ALL) -> Backward:
    """The launches for the gradients that are wanted; `alignment` is what all value-like addresses are multiples of."""
    planned = _gradients(problem, alignment, gpu, wanted)
    if not wanted.references:
        return planned
    fused, parts = problem.fused, _aligned(planned.workspace)
    assert fused is not None
    count = problem.N * problem.Q * problem.M * problem.L * fused.coordinates
    return replace(
        planned,
        references=plan.reduce_references(problem),
        reference_parts=parts,
        workspace=parts + count * item_size(problem.accumulator_dtype),
    )


def _gradients(problem: Problem, alignment: int, gpu: Gpu, wanted: Wanted) -> Backward:
    """The launches for the gradients but that of the reference points."""
    samples = None
    if wanted.samples:
        samples = plan.backward(problem, alignment, gpu, wanted._replace(value=False))
    if not wanted.value:
        return Backward(samples)
    way = _way(problem, alignment, gpu, wanted)
    if way == "sorted":
        summed = plan.measured(gpu, lambda on: summation(problem, alignment, on))
        if not sorted_heuristics.is_materialised(problem):
            return Backward(samples, summation=summed, workspace=summed.nbytes)
        at = _aligned(summed.nbytes)
        nbytes = 3 * item_size(problem.accumulator_dtype) * problem.N * problem.Q * problem.M * problem.K
        return Backward(samples, plan.materialise(problem), summed, materialised=at, workspace=at + nbytes)
    atomics = plan.backward(problem, alignment, gpu, wanted, aggregated=way == "aggregated")
    if problem.value_dtype not in SIXTEEN_BIT:
        return Backward(atomics=atomics)
    count = problem.N * problem.S * problem.M * problem.D
    return Backward(atomics=atomics, cast=plan.cast_gradient(problem.value_dtype, count), workspace=4 * count)


def _way(problem: Problem, alignment: int, gpu: Gpu, wanted: Wanted) -> cost_model.Way:
    """How to sum the gradient of value: in a fixed order, as it was measured, or by the estimated costs."""
    if problem.deterministic:
        return "sorted"
    found = applied.axes_of("grad_value", problem, alignment, gpu, wanted).get("way")
    if found is not None:
        for way in cost_model.estimates(problem):
            if way == found:
                return way
    return cost_model.fastest_way(problem)


def summation(problem: Problem, alignment: int, gpu: Gpu) -> Summation:
    """Launches and memory of a sorted sum."""
    reduce = sorted_heuristics.reduce_buckets(problem, alignment, gpu)
    sort = sorted_heuristics.bucket_sort(problem, reduce.bucket_size, gpu)
    in_run, in_launch = sort.bounds.warps * sort.chunk, problem.Q * problem.K
    in_head = sorted_heuristics.contributions_of_head(problem)
    per_bucket = sorted_heuristics.contributions_per_bucket(problem, gpu)
    pixels, buckets = sorted_heuristics.slab(problem, reduce.bucket_size, per_bucket)
    runs, capacity = -(-in_launch // in_run), in_run * len(problem.variant.neighbours)

    contribution, starts = contribution_bytes(problem.value_dtype), segment_starts_bytes(buckets)
    heads = max(1, min(problem.N * problem.M, WORKSPACE // (runs * (starts + capacity * contribution))))
    table = _aligned(heads * runs * starts)
    contributions = table + _aligned(TABLE_BYTES)
    queue = contributions + heads * runs * capacity * contribution
    chunk_size, queued = _chunks(heads, in_head, reduce.channels.channel_tiles)
    sums = _aligned(queue + (QUEUE_BYTES + CHUNK_BYTES * queued if queued else 0))
    planned = Summation(
        Launch(sort, (heads * runs, 1, 1), sort.bytes_for(capacity, buckets)),
        Launch(reduce, (heads * -(-buckets // reduce.block.warps), 1, 1), reduce.shared_bytes),
        heads=heads,
        pixels=pixels,
        buckets=buckets,
        runs=runs,
        capacity=capacity,
        contributions_per_bucket=per_bucket,
        chunk_size=chunk_size,
        queued=queued,
        table=table,
        contributions=contributions,
        queue=queue,
        sums=sums,
        nbytes=sums + queued * reduce.chunk_sum_size * item_size(problem.accumulator_dtype),
    )
    sizes = sizes_of(problem)._replace(contributions=in_head + chunk_size, queued=queued)
    for launch in planned.launches:
        plan.countable(problem, launch, sizes)
    return planned


def _chunks(heads: int, contributions: int, channel_tiles: int) -> tuple[int, int]:
    """Contributions of a chunk, and how many chunks there are at most.

    A bucket is split from two chunks on, so that it has at most 3 / 2 times as many as its contributions would fill. A
    contribution that reaches into the next bucket is in both.
    """
    more = 1 << (channel_tiles - 1).bit_length()  # their sums take more memory
    chunk_size, largest = sorted_heuristics.SMALLEST_CHUNK * more, sorted_heuristics.LARGEST_CHUNK * more
    while chunk_size < largest and heads * contributions > CHUNKS * chunk_size:
        chunk_size *= 2
    splits = contributions > sorted_heuristics.FEWEST_CHUNKS * chunk_size
    return chunk_size, heads * (3 * contributions // chunk_size) if splits else 0


def _aligned(nbytes: int) -> int:
    """To what the memory allocators of the frameworks align."""
    return aligned(nbytes, 256)
