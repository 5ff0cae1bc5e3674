"""The specialisations of the kernels that sum the gradient of value without atomics: as ``heuristics.py``, pure."""

from __future__ import annotations

from ..call import Problem
from .axes import VECTOR_BYTES, ChannelAxes, contribution_bytes
from .gpu import Gpu
from .heuristics import (
    block_axes,
    bound_axes,
    fused_sample_axes,
    fused_warps,
    sample_axes,
)
from .index_width import UNSIGNED, narrowest
from .lanes import backward_channels
from .launch_tables import table_of
from .specs import BucketSortSpec, MaterialiseSpec, ReduceBucketsSpec
from .tuning import applied

# Sums of a bucket in shared memory, in bytes.
BUCKET_BYTES = 8 * 1024
# Value vectors of a bucket, at most and at least, and buckets whose segments a block can count in shared memory. With
# more buckets the image is done slab after slab. docs/performance/decisions.md#sorted-bucket-size
MAX_BUCKET_SIZE, SMALLEST_BUCKET, MAX_BUCKETS = 64, 4, 1536
# Of the buckets of one of several slabs, a share of this is kept for small ones, at most.
SMALL_SHARE = 3
# Contributions that a bucket should have: a batch or two. Where a multiprocessor would get fewer than 8 such buckets,
# smaller ones shorten the longest sum; where more than 16, larger ones need fewer warps.
# docs/performance/decisions.md#sorted-bucket-size
FEWEST_CONTRIBUTIONS, USUAL_CONTRIBUTIONS, MOST_CONTRIBUTIONS = 64, 128, 256
FEW_BUCKETS, MANY_BUCKETS = 8, 16
# Contributions that a warp sorts at a time, in bytes: as many as its registers hold. It takes a few unsorted ones where
# a bucket of full size has fewer than so many. docs/performance/decisions.md#sorted-batches
BATCH_BYTES, UNSORTED_BATCH, SORTED_FROM = 2048, 32, 64
# Contributions of a chunk of a very large bucket, at least and at most. Where a head has fewer than four chunks of
# them, counting the contributions of each bucket costs more than a split saves.
# docs/performance/decisions.md#sorted-chunks-of-a-bucket
SMALLEST_CHUNK, LARGEST_CHUNK, FEWEST_CHUNKS = 512, 8192, 4
# Contributions of a sorted run in shared memory, in bytes: a size that every architecture has.
RUN_BYTES = 48 * 1024


def reduce_buckets(problem: Problem, alignment: int, gpu: Gpu) -> ReduceBucketsSpec:
    """The reduction of a bucket by a warp."""
    channels, table = backward_channels(problem, alignment, True), table_of(gpu).sorted
    bucket_size, axes = _bucket_size(channels), applied.axes_of("reduce_buckets", problem, alignment, gpu)
    sorts = contributions_of_head(problem) * bucket_size >= SORTED_FROM * problem.S
    return ReduceBucketsSpec(
        wide_counts=contributions_of_head(problem) >= 2**UNSIGNED // 2,
        channels=channels,
        block=block_axes(applied.block(table.reduce_buckets if sorts else table.reduce_unsorted, axes), gpu),
        chunk=BATCH_BYTES // contribution_bytes(problem.value_dtype) if sorts else UNSORTED_BATCH,
        bucket_size=bucket_size,
    )


def contributions_of_head(problem: Problem) -> int:
    """Contributions to the value vectors of one head and image."""
    return len(problem.variant.neighbours) * problem.Q * problem.K


def contributions_per_bucket(problem: Problem, gpu: Gpu) -> int:
    """Contributions that a bucket should have: so few that the buckets fill the GPU, but not too few."""
    of_multiprocessor = problem.N * problem.M * contributions_of_head(problem) // gpu.multiprocessors
    few = min(of_multiprocessor // FEW_BUCKETS, USUAL_CONTRIBUTIONS)
    many = min(of_multiprocessor // MANY_BUCKETS, MOST_CONTRIBUTIONS)
    return max(FEWEST_CONTRIBUTIONS, few, many)


def slabs(problem: Problem) -> int:
    """Launches that the pixels of an image take, about."""
    channels = backward_channels(problem, 16, True)
    return -(-problem.S // (MAX_BUCKETS * _bucket_size(channels)))


def _bucket_size(channels: ChannelAxes) -> int:
    """Value vectors of a bucket at most, a power of two: as many as fit into the shared memory of a warp."""
    in_bucket = BUCKET_BYTES // (channels.channel_tile * channels.accumulator_bytes)
    return 1 << max(0, min(in_bucket, MAX_BUCKET_SIZE).bit_length() - 1)


def slab(problem: Problem, bucket_size: int, contributions_per_bucket: int) -> tuple[int, int]:
    """Pixels of a launch, and buckets of a head in it, at most: with room for small ones where levels are coarse."""
    regions, small = problem.L + 1, _small_buckets(problem, bucket_size, contributions_per_bucket)
    if -(-problem.S // bucket_size) + regions <= MAX_BUCKETS:
        return problem.S, min(MAX_BUCKETS, -(-problem.S // bucket_size) + regions + small)
    room = max(1, MAX_BUCKETS - regions - min(small, MAX_BUCKETS // SMALL_SHARE))
    slabs = -(-problem.S // (room * bucket_size))
    return -(-problem.S // (slabs * bucket_size)) * bucket_size, max(MAX_BUCKETS, regions + 1)


def _small_buckets(problem: Problem, bucket_size: int, contributions_per_bucket: int) -> int:
    """Buckets that crowded levels have besides those of full size, about.

    Only L and S are known here. The largest level has S / L pixels or more, and may need none.
    """
    of_level = len(problem.variant.neighbours) * problem.Q * max(problem.points)
    crowded = problem.L - (of_level * bucket_size * problem.L <= contributions_per_bucket * problem.S)
    return min(problem.S // SMALLEST_BUCKET, crowded * of_level // contributions_per_bucket)


def bucket_sort(problem: Problem, bucket_size: int, gpu: Gpu) -> BucketSortSpec:
    """The bucket sort. Long runs keep the beginnings of segments few, short ones fill the GPU.

    docs/performance/decisions.md#sorted-run-length
    """
    axes = applied.axes_of("bucket_sort", problem, VECTOR_BYTES, gpu)
    bounds = bound_axes(applied.block(table_of(gpu).sorted.bucket_sort, axes), gpu)
    contribution = len(problem.variant.neighbours) * contribution_bytes(problem.value_dtype)
    fits = RUN_BYTES // (32 * bounds.warps * contribution) * 32
    samples = problem.N * problem.M * problem.Q * problem.K

    def make(wide_index: bool) -> BucketSortSpec:
        return BucketSortSpec(
            value_dtype=problem.value_dtype,
            wide_index=wide_index,
            M=problem.M,
            samples=sample_axes(problem, materialised=is_materialised(problem)),
            bounds=bounds,
            chunk=min(fits, 256 if samples >= 2**20 else 128 if samples >= 2**18 else 64),
            bucket_size=bucket_size,
            smallest_bucket=min(SMALLEST_BUCKET, bucket_size),
        )

    return narrowest(make, problem)


def is_materialised(problem: Problem) -> bool:
    """Whether locations and weights are computed before the sort: where it cannot do it for a fused call.

    The sort has one sample per lane, so the softmax needs queries that do not straddle warps.
    docs/performance/decisions.md#sorted-materialise
    """
    return problem.fused is not None and problem.K not in (1, 2, 4, 8, 16, 32)


def materialise(problem: Problem) -> MaterialiseSpec:
    """The kernel that turns offsets and logits into locations, in pixels, and weights."""
    lanes, warps = min(32, 1 << (problem.K - 1).bit_length()), 8

    def make(wide_index: bool) -> MaterialiseSpec:
        return MaterialiseSpec(
            value_dtype=problem.value_dtype,
            wide_index=wide_index,
            M=problem.M,
            lanes=lanes,
            samples=fused_sample_axes(problem),
            warps=fused_warps(problem, warps, 32 // lanes, wide_index),
        )

    return narrowest(make, problem)
