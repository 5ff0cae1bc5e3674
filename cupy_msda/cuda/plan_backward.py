"""Which kernels a backward is made of, and their launches: a pure function of the problem and the GPU.

The gradient of value is a sum over all samples that touch a pixel. There are three ways to compute it:

- by atomic additions, one per sample and value vector (``backward.cu``): few launches, for small problems;
- with block-level aggregation: the same, but a block first adds up its samples of a cell. It is for many samples per
  value vector;
- sorted, without atomics (``sorted/``): contributions are sorted into buckets of value vectors, and each bucket is
  reduced in the order of the samples. The result is the same to the last bit, and each value vector is written once, in
  value's dtype. It is for `deterministic`, and for few samples in a large value, where zeroing, adding and casting cost
  more.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from ..arrays import item_size
from ..call import ALL, SIXTEEN_BIT, Problem, Wanted
from . import heuristics, plan, sorted_heuristics
from .axes import aligned, contribution_bytes
from .gpu import Gpu
from .index_width import Sizes, sizes_of
from .plan import Launch
from .sorted_specs import segment_starts_bytes
from .specs import BlockReduceSpec, WarpReduceSpec

# Value vectors, of all images and heads, from which on the sorted way pays for its launches: of 32 bits and more, and
# of 16, which atomics have to cast as well. docs/performance/decisions.md#sorted-threshold
SORTED_VECTORS = (2**18, 2**17)
# Slabs up to which the sorted way is chosen for its speed: each slab reads all samples again.
MAX_SLABS = 4
# Contributions that a block reduces. A larger bucket is reduced in chunks of so many, a multiple of what a block sorts
# at a time. docs/performance/decisions.md#sorted-chunks-of-a-bucket
BUCKET_CHUNK = 8 * 1024
# Bytes of contributions between the launches, unless one head needs more: heads are done in groups.
WORKSPACE = 256 << 20


@dataclass(frozen=True)
class Summation:
    """The launches of a sorted sum, and the memory between them.

    `heads` of N * M and `pixels` of S are done at a time, a slab. Each head has `runs` sorted runs of at most
    `capacity` contributions, which are at byte `contributions` of the workspace of `nbytes`. The beginnings of their
    segments come before. Where a bucket can have more than `bucket_chunk` contributions, `split` lists its chunks: the
    kernels' counts are at byte `counts`, the list at `chunks`, and the sums of each chunk at `sums`.
    """

    sort: Launch
    split: Launch | None
    reduce: Launch
    heads: int
    pixels: int
    runs: int
    capacity: int
    bucket_chunk: int
    contributions: int
    counts: int
    chunks: int
    sums: int
    nbytes: int

    @property
    def launches(self) -> tuple[Launch, ...]:
        """In their order."""
        return (self.sort, self.split, self.reduce) if self.split else (self.sort, self.reduce)


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
    if is_sorted(problem):
        summed = summation(problem, alignment, gpu)
        if not sorted_heuristics.is_materialised(problem):
            return Backward(samples, summation=summed, workspace=summed.nbytes)
        at = _aligned(summed.nbytes)
        nbytes = 3 * item_size(problem.accumulator_dtype) * problem.N * problem.Q * problem.M * problem.K
        return Backward(samples, plan.materialise(problem), summed, materialised=at, workspace=at + nbytes)
    atomics = plan.backward(problem, alignment, gpu, wanted)
    if problem.value_dtype not in SIXTEEN_BIT:
        return Backward(atomics=atomics)
    count = problem.N * problem.S * problem.M * problem.D
    return Backward(atomics=atomics, cast=plan.cast_gradient(problem.value_dtype, count), workspace=4 * count)


def is_sorted(problem: Problem) -> bool:
    """Whether grad_value is summed without atomics: where the caller wants a fixed order, and where it is faster."""
    if problem.deterministic:
        return True
    vectors = problem.N * problem.S * problem.M
    few_slabs = problem.S <= MAX_SLABS * sorted_heuristics.MAX_BUCKETS * sorted_heuristics.MAX_BUCKET_SIZE
    return (
        not heuristics.aggregates(problem)
        and few_slabs
        and vectors >= SORTED_VECTORS[problem.value_dtype in SIXTEEN_BIT]
    )


def summation(problem: Problem, alignment: int, gpu: Gpu) -> Summation:
    """Launches and memory of a sorted sum."""
    reduce = sorted_heuristics.reduction(problem, alignment, gpu)
    sort = sorted_heuristics.bucket_sort(problem, reduce.bucket_size, gpu)
    in_run, in_launch = sort.bounds.warps * sort.chunk, problem.Q * problem.K
    neighbours = len(problem.variant.neighbours)
    buckets = min(-(-problem.S // reduce.bucket_size), sorted_heuristics.MAX_BUCKETS)
    runs, capacity = -(-in_launch // in_run), in_run * neighbours

    contribution, starts = contribution_bytes(problem.value_dtype), segment_starts_bytes(buckets)
    heads = max(1, min(problem.N * problem.M, WORKSPACE // (runs * (starts + capacity * contribution))))
    contributions = _aligned(heads * runs * starts)
    counts = contributions + heads * runs * capacity * contribution
    sizes = sizes_of(problem)._replace(buckets=heads * buckets)
    split, of_chunk, bucket_chunk = None, 0, BUCKET_CHUNK
    if isinstance(reduce, BlockReduceSpec) and 2 * neighbours * in_launch > BUCKET_CHUNK:
        of_chunk = reduce.chunk_sum_size
        bucket_chunk, sizes = _chunked(reduce, sizes, heads, neighbours * in_launch)
        of_split = sorted_heuristics.split_buckets(reduce.bucket_size)
        split = Launch(of_split, (heads * -(-buckets // 32), 1, 1), of_split.shared_bytes)
    chunks = _aligned(counts + (16 + 8 * heads * buckets if split else 0))
    sums = _aligned(chunks + 16 * sizes.listed)
    buckets_of_block = reduce.block.warps if isinstance(reduce, WarpReduceSpec) else 1
    planned = Summation(
        Launch(sort, (heads * runs, 1, 1), sort.bytes_for(capacity, buckets)),
        split,
        Launch(reduce, (heads * -(-buckets // buckets_of_block), 1, 1), reduce.shared_bytes),
        heads=heads,
        pixels=buckets * reduce.bucket_size,
        runs=runs,
        capacity=capacity,
        bucket_chunk=bucket_chunk,
        contributions=contributions,
        counts=counts,
        chunks=chunks,
        sums=sums,
        nbytes=sums + sizes.listed * of_chunk * item_size(problem.accumulator_dtype),
    )
    for launch in planned.launches:
        plan.countable(problem, launch, sizes)
    return planned


def _chunked(reduce: BlockReduceSpec, sizes: Sizes, heads: int, contributions: int) -> tuple[int, Sizes]:
    """Contributions of a bucket chunk, and how many chunks there are at most: so few that the kernel counts their sums.

    A contribution that reaches into the next bucket is in both. A bucket of more than a chunk has less than twice as
    many chunks as its contributions would fill.
    """
    bucket_chunk = BUCKET_CHUNK
    while True:
        listed, last = 2 * heads * (2 * contributions // bucket_chunk), contributions // bucket_chunk
        sizes = sizes._replace(listed=listed, last_chunk=last)
        if "chunk_sums" not in reduce.exceeded(sizes):
            return bucket_chunk, sizes
        bucket_chunk *= 2


def _aligned(nbytes: int) -> int:
    """To what the memory allocators of the frameworks align."""
    return aligned(nbytes, 256)
