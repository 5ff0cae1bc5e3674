"""The kernels that sum the gradient of value without atomics: bucket sort and reductions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ..arrays import item_size
from ..call import accumulator_of
from .axes import (
    LEVEL_BYTES,
    METADATA,
    RUNS,
    SAMPLE_INPUTS,
    SLAB,
    BlockAxes,
    BoundAxes,
    ChannelAxes,
    SampleAxes,
    aligned,
    block_indices,
    contribution_bytes,
    index_bytes,
    samples_bytes,
)
from .index_width import INT, UNSIGNED, Index, Sizes
from .kernel_spec import Axis, KernelSpec, Parameter, parameters


@dataclass(frozen=True, kw_only=True)
class BucketSortSpec(KernelSpec):
    """Contributions of the samples to the gradient of value, sorted by buckets of `bucket_size` value vectors.

    A warp sorts `chunk` samples; a block makes one sorted run of those of its warps.
    """

    kernel: ClassVar[str] = "bucket_sort"
    file: ClassVar[str] = "sorted/bucket_sort.cu"
    parameters: ClassVar[tuple[Parameter, ...]] = (
        *parameters("const location_t* locations"),
        METADATA,
        *SAMPLE_INPUTS,
        *parameters("unsigned short* segment_starts", "contribution* contributions", "chunk_counts* counts"),
        *parameters("long long S", "long long Q"),
        *SLAB,
    )
    long_arrays: ClassVar[tuple[str, ...]] = ("lengths", "segment_starts", "contributions", "counts")
    fixed: ClassVar[dict[str, Axis]] = {"tile_rows": 0}

    value_dtype: str
    wide_index: bool
    M: int
    samples: SampleAxes
    bounds: BoundAxes
    chunk: int
    bucket_size: int

    @property
    def threads(self) -> int:
        return 32 * self.bounds.warps

    def indices(self, sizes: Sizes) -> dict[str, Index]:
        # Two segments per bucket, for pixels that may lie a row after the image.
        segments = {"S": Index(4 * sizes.S, self.index_bits)}
        return self.samples.indices(self.M, sizes, self.index_bits) | contribution_index(sizes) | segments

    @property
    def shared_bytes(self) -> None:
        """Depends on the number of buckets: :meth:`bytes_for`."""
        return None

    def bytes_for(self, contributions: int, buckets: int) -> int:
        """Shared memory of a block that sorts so many contributions into so many buckets."""
        warps, pitch = self.bounds.warps, segment_starts_bytes(buckets)
        run = aligned(max(contributions * contribution_bytes(self.value_dtype), warps * pitch))
        return run + self.samples.L * LEVEL_BYTES + 4 * warps + pitch


def contribution_index(sizes: Sizes) -> dict[str, Index]:
    """A contribution holds the number of its query."""
    return {"Q": Index(sizes.Q, UNSIGNED)}


def segment_starts_bytes(buckets: int) -> int:
    """Size of the beginnings of all segments of a sorted run."""
    return 2 * (2 * buckets + 2)


@dataclass(frozen=True, kw_only=True)
class SplitBucketsSpec(KernelSpec):
    """The chunks of large buckets."""

    kernel: ClassVar[str] = "split_buckets"
    file: ClassVar[str] = "sorted/split_buckets.cu"
    parameters: ClassVar[tuple[Parameter, ...]] = parameters(
        "const unsigned short* segment_starts",
        "chunk_counts* counts",
        "bucket_chunk* list",
        "long long runs",
        "long long pixels",
        "long long contributions_per_chunk",
    )
    long_arrays: ClassVar[tuple[str, ...]] = ("segment_starts",)
    fixed: ClassVar[dict[str, Axis]] = {"min_blocks": 1}

    warps: int
    bucket_size: int

    @property
    def threads(self) -> int:
        return 32 * self.warps

    def indices(self, sizes: Sizes) -> dict[str, Index]:
        return {"counts": Index(sizes.buckets, UNSIGNED), "list": Index(sizes.listed, UNSIGNED)}

    @property
    def shared_bytes(self) -> int:
        return 8 * 32 * self.warps


@dataclass(frozen=True, kw_only=True)
class WarpReduceSpec(KernelSpec):
    """The sum of a bucket by a warp, which adds its contributions one after the other."""

    kernel: ClassVar[str] = "warp_reduce"
    file: ClassVar[str] = "sorted/warp_reduce.cu"
    leaves_l1: ClassVar[bool] = True
    parameters: ClassVar[tuple[Parameter, ...]] = (
        *parameters(
            "const value_t* grad_output",
            "const contribution* contributions",
            "const unsigned short* segment_starts",
            "value_t* grad_value",
        ),
        *RUNS,
        *SLAB,
    )
    long_arrays: ClassVar[tuple[str, ...]] = ("grad_output", "contributions", "segment_starts", "grad_value")

    channels: ChannelAxes
    block: BlockAxes
    bucket_size: int

    @property
    def threads(self) -> int:
        return 32 * self.block.warps

    def indices(self, sizes: Sizes) -> dict[str, Index]:
        return self.channels.indices() | contribution_index(sizes)

    @property
    def shared_bytes(self) -> int:
        accumulator = self.channels.accumulator_bytes
        sums = self.bucket_size * self.channels.padded_channels * accumulator
        return self.block.warps * (32 * 4 * accumulator + aligned(sums))


@dataclass(frozen=True, kw_only=True)
class BlockReduceSpec(KernelSpec):
    """The sum of a bucket by a block, which sorts `chunk` contributions at a time by value vector."""

    kernel: ClassVar[str] = "block_reduce"
    file: ClassVar[str] = "sorted/block_reduce.cu"
    leaves_l1: ClassVar[bool] = True
    parameters: ClassVar[tuple[Parameter, ...]] = (
        *WarpReduceSpec.parameters,
        *parameters(
            "chunk_counts* counts",
            "const bucket_chunk* list",
            "acc_t* chunk_sums",
            "long long contributions_per_chunk",
        ),
    )  # fmt: skip
    long_arrays: ClassVar[tuple[str, ...]] = WarpReduceSpec.long_arrays

    channels: ChannelAxes
    block: BlockAxes
    chunk: int
    bucket_size: int

    @property
    def threads(self) -> int:
        return 32 * self.block.warps

    @property
    def chunk_sum_size(self) -> int:
        """Elements of the sums of a bucket chunk."""
        return self.bucket_size * self.channels.padded_channels

    def indices(self, sizes: Sizes) -> dict[str, Index]:
        return (
            self.channels.indices()
            | contribution_index(sizes)
            | {
                f"{self.bucket_size}*D": Index(self.chunk_sum_size, INT),
                "counts": Index(sizes.buckets, UNSIGNED),
                "list": Index(sizes.listed, UNSIGNED),
                "chunk_sums": Index(sizes.last_chunk * self.chunk_sum_size, UNSIGNED),
            }
        )

    @property
    def shared_bytes(self) -> int:
        channels, warps, keys = self.channels, self.block.warps, self.bucket_size + 1
        groups = warps * (32 // channels.lanes)
        sums = (keys + groups) * 2 * channels.channel_tile
        counters = (keys + 1) * (1 + warps) + warps + 3 * 32 * warps
        size = (4 * self.chunk + sums) * channels.accumulator_bytes + aligned(4 * counters, 8) + 2 * 8
        return aligned(size + 1)


@dataclass(frozen=True, kw_only=True)
class MaterialiseSpec(KernelSpec):
    """Locations in pixels, and weights, from offsets and logits.

    `lanes` lanes of a warp hold the samples of a query.
    """

    kernel: ClassVar[str] = "materialise"
    file: ClassVar[str] = "sorted/materialise.cu"
    parameters: ClassVar[tuple[Parameter, ...]] = (
        *parameters("const location_t* offsets"),
        METADATA,
        *parameters(
            "const location_t* logits",
            "const reference_t* references",
            "const long long* lengths",
            "acc_t* locations",
            "acc_t* weights",
            "long long S",
            "long long Q",
            "long long heads",
        ),
    )
    long_arrays: ClassVar[tuple[str, ...]] = ("lengths",)
    fixed: ClassVar[dict[str, Axis]] = {
        "lane_groups": 1, "heads_per_warp": 1, "query_tiles": 1, "tile_rows": 0, "min_blocks": 1
    }  # fmt: skip

    value_dtype: str
    wide_index: bool
    M: int
    lanes: int
    samples: SampleAxes
    warps: int

    @property
    def threads(self) -> int:
        return 32 * self.warps

    def derived(self) -> dict[str, Axis]:
        return super().derived() | {"chunk": self.samples.K}  # all samples of a query

    @property
    def queries_per_tile(self) -> int:
        """Queries that a warp works on."""
        return 32 // self.lanes

    def indices(self, sizes: Sizes) -> dict[str, Index]:
        given = block_indices(self.samples, self.M, sizes, self.index_bits)
        samples = sizes.Q * self.M * self.samples.K
        made = {"locations": Index(2 * samples, self.index_bits), "weights": Index(samples, self.index_bits)}
        return given | {"offsets": given["locations"], "logits": given["weights"]} | made

    @property
    def shared_bytes(self) -> int:
        queries = self.warps * self.queries_per_tile
        accumulator = item_size(accumulator_of(self.value_dtype))
        samples = samples_bytes(queries, self.samples.K, self.wide_index, accumulator)
        return aligned(samples + self.samples.L * LEVEL_BYTES + queries * index_bytes(self.wide_index))
