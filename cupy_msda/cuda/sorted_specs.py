"""The kernels that sum the gradient of value without atomics: bucket sort and reduction; samples of a fused call."""

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
from .index_width import LONG, UNSIGNED, Index, Sizes
from .kernel_spec import Axis, KernelSpec, Parameter, parameters

# Regions of buckets of one size, at most, and the sizes of the kernels' `bucket_table`, of `chunk_queue` without its
# chunks, and of `bucket_chunk`.
MAX_REGIONS, TABLE_BYTES, QUEUE_BYTES, CHUNK_BYTES = 32, 528, 16, 32


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
        *parameters("unsigned short* segment_starts", "contribution* contributions"),
        *parameters(
            "bucket_table* table", "chunk_queue* queue", "long long queued", "long long contributions_per_bucket"
        ),
        *parameters("long long S", "long long Q"),
        *SLAB,
        *parameters("long long pixels"),
    )
    long_arrays: ClassVar[tuple[str, ...]] = ("lengths", "segment_starts", "contributions", "table", "queue")
    fixed: ClassVar[dict[str, Axis]] = {"tile_rows": 0}

    value_dtype: str
    wide_index: bool
    M: int
    samples: SampleAxes
    bounds: BoundAxes
    chunk: int
    bucket_size: int
    smallest_bucket: int

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
        regions = 16 * (self.samples.L if self.samples.L < MAX_REGIONS else 1)
        sizes = aligned(self.samples.L * LEVEL_BYTES + 4 * warps) + aligned(TABLE_BYTES + regions)
        return run + sizes + pitch


def contribution_index(sizes: Sizes) -> dict[str, Index]:
    """A contribution holds the number of its query."""
    return {"Q": Index(sizes.Q, UNSIGNED)}


def segment_starts_bytes(buckets: int) -> int:
    """Size of the beginnings of all segments of a sorted run."""
    return 2 * (2 * buckets + 2)


@dataclass(frozen=True, kw_only=True)
class ReduceBucketsSpec(KernelSpec):
    """The sum of a bucket by a warp, which sorts `chunk` contributions at a time by value vector."""

    kernel: ClassVar[str] = "reduce_buckets"
    file: ClassVar[str] = "sorted/reduce_buckets.cu"
    leaves_l1: ClassVar[bool] = True
    parameters: ClassVar[tuple[Parameter, ...]] = (
        *parameters(
            "const value_t* grad_output",
            "const contribution* contributions",
            "const unsigned short* segment_starts",
            "value_t* grad_value",
            "const bucket_table* table",
        ),
        *RUNS,
        *SLAB,
        *parameters(
            "chunk_queue* queue",
            "acc_t* chunk_sums",
            "long long chunk_size",
        ),
    )
    long_arrays: ClassVar[tuple[str, ...]] = (
        "grad_output",
        "contributions",
        "segment_starts",
        "grad_value",
        "table",
        "chunk_sums",
    )

    wide_counts: bool
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
                "contributions to a pixel": Index(sizes.contributions, LONG if self.wide_counts else UNSIGNED),
                "queue": Index(sizes.queued, UNSIGNED),
            }
        )

    @property
    def shared_bytes(self) -> int:
        accumulator, keys = self.channels.accumulator_bytes, self.bucket_size + 2
        sums = aligned(keys * self.channels.channel_tile * accumulator)
        return self.block.warps * ((self.chunk + self.block.unroll) * 4 * accumulator + sums + aligned(4 * keys))


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
