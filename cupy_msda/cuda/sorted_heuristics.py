"""The specialisations of the kernels that sum the gradient of value without atomics: as ``heuristics.py``, pure."""

from __future__ import annotations

from ..call import Problem
from .axes import contribution_bytes
from .gpu import Gpu
from .heuristics import (
    backward_channels,
    block_axes,
    bound_axes,
    fused_sample_axes,
    fused_warps,
    sample_axes,
)
from .index_width import narrowest
from .launch_tables import table_of
from .specs import BlockReduceSpec, BucketSortSpec, MaterialiseSpec, SplitBucketsSpec, WarpReduceSpec

# Contributions per value vector from which on a block reduces a bucket, instead of a warp.
# docs/performance/decisions.md#sorted-block-or-warp
DENSE = 4
# Sums of a bucket in shared memory, in bytes.
BUCKET_BYTES = 8 * 1024
# Value vectors of a bucket, at most, and buckets whose segments a block can count in shared memory. With more buckets
# the image is done slab after slab. docs/performance/decisions.md#sorted-bucket-size
MAX_BUCKET_SIZE, MAX_BUCKETS = 32, 1024
# Contributions of a sorted run in shared memory, in bytes: a size that every architecture has.
RUN_BYTES = 48 * 1024
# Warps of a block that splits buckets: they share the runs of 32 buckets.
SPLIT_WARPS = 32


def reduction(problem: Problem, alignment: int, gpu: Gpu) -> WarpReduceSpec | BlockReduceSpec:
    """The reduction of a bucket.

    A block sorts the contributions by value vector. A warp adds them one after the other: it needs all channels of its
    vectors at once, in shared memory and in registers, so not for very many channels.
    """
    table = table_of(gpu).sorted
    channels = backward_channels(problem, alignment, True)
    tiles, tile_bytes = channels.channel_tiles, channels.channel_tile * channels.accumulator_bytes
    contributions = len(problem.variant.neighbours) * problem.Q * problem.K
    if contributions > DENSE * problem.S or tiles > table.warp_reduce.unroll or tiles * tile_bytes > BUCKET_BYTES:
        return BlockReduceSpec(
            channels=channels,
            block=block_axes(table.block_reduce, gpu),
            chunk=512 if channels.accumulator_bytes == 4 else 256,
            bucket_size=_bucket_size(BUCKET_BYTES // (2 * tile_bytes)),
        )
    return WarpReduceSpec(
        channels=channels,
        block=block_axes(table.warp_reduce, gpu).with_axes(unroll=table.warp_reduce.unroll // tiles),
        bucket_size=_bucket_size(BUCKET_BYTES // (tiles * tile_bytes)),
    )


def _bucket_size(most: int) -> int:
    """A power of two."""
    return 1 << max(0, min(most, MAX_BUCKET_SIZE).bit_length() - 1)


def bucket_sort(problem: Problem, bucket_size: int, gpu: Gpu) -> BucketSortSpec:
    """The bucket sort. Long runs keep the beginnings of segments few, short ones fill the GPU.

    docs/performance/decisions.md#sorted-run-length
    """
    bounds = bound_axes(table_of(gpu).sorted.bucket_sort, gpu)
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
        )

    return narrowest(make, problem)


def split_buckets(bucket_size: int) -> SplitBucketsSpec:
    """The kernel that lists the chunks of large buckets."""
    return SplitBucketsSpec(warps=SPLIT_WARPS, bucket_size=bucket_size)


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
