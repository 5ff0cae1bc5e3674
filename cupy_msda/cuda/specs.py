"""The kernels: for each one its axes, its parameters in the order of its CUDA signature, and its shared memory.

The kernels that sum the gradient of value without atomics are in ``sorted_specs.py``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from .axes import (
    LEVEL_BYTES,
    MAX_LEVELS_IN_REGISTERS,
    MAX_LEVELS_OF_WARP,
    METADATA,
    SAMPLE_INPUTS,
    SIZES,
    BlockAxes,
    ChannelAxes,
    GradientAxes,
    QueryAxes,
    SampleAxes,
    aligned,
    index_bytes,
    prepared_indices,
    samples_bytes,
)
from .index_width import INT, Index, Sizes
from .kernel_spec import Axis, KernelSpec, Parameter, parameters
from .naive_specs import NaiveBackwardSpec, NaiveForwardSpec, NaiveFusedBackwardSpec, NaiveMaterialiseSpec
from .sorted_specs import BucketSortSpec, MaterialiseSpec, ReduceBucketsSpec


@dataclass(frozen=True, kw_only=True)
class ForwardSpec(KernelSpec):
    """The output. `lane_groups` of lanes share the samples of a query; a warp works on `heads_per_warp` heads at a
    time.

    `masked_neighbours`: a neighbour outside the level has a weight of zero, and its lane reads nothing new.
    """

    kernel: ClassVar[str] = "forward"
    file: ClassVar[str] = "forward.cu"
    leaves_l1: ClassVar[bool] = True
    parameters: ClassVar[tuple[Parameter, ...]] = (
        *parameters("const value_t* value"),
        METADATA,
        *parameters("const location_t* locations"),
        *SAMPLE_INPUTS,
        *parameters("value_t* output"),
        *SIZES,
    )
    long_arrays: ClassVar[tuple[str, ...]] = ("lengths", "output")

    wide_index: bool
    channels: ChannelAxes
    samples: SampleAxes
    block: BlockAxes
    queries: QueryAxes
    pixel_stride: int
    lane_groups: int
    heads_per_warp: int
    masked_neighbours: bool

    @property
    def threads(self) -> int:
        return 32 * self.block.warps

    @property
    def queries_per_tile(self) -> int:
        """Queries that a warp works on at a time."""
        return 32 // (self.channels.lanes * self.lane_groups * self.heads_per_warp)

    @property
    def warp_independent(self) -> bool:
        """Whether the warps of a block never wait for each other: where a warp has a lane for each level."""
        return self.samples.L <= MAX_LEVELS_OF_WARP

    @property
    def levels_in_registers(self) -> bool:
        """Whether each lane holds all levels, instead of a copy per warp in shared memory."""
        tiled = self.masked_neighbours and self.queries.query_tiles > 1
        return tiled and self.samples.L <= MAX_LEVELS_IN_REGISTERS

    def indices(self, sizes: Sizes) -> dict[str, Index]:
        return prepared_indices(self.samples, self.channels, sizes, self.index_bits)

    def derived(self) -> dict[str, Axis]:
        return super().derived() | {
            "warp_independent": self.warp_independent,
            "levels_in_registers": self.levels_in_registers,
        }

    @property
    def shared_bytes(self) -> int:
        channels, warps = self.channels, self.block.warps
        pairs = warps * self.queries_per_tile * self.heads_per_warp
        samples = samples_bytes(pairs, self.queries.chunk, self.wide_index, channels.accumulator_bytes)
        if self.warp_independent:
            levels, queries = 0 if self.levels_in_registers else warps, 0
        else:
            levels, queries = 1, self.queries.query_tiles * warps * self.queries_per_tile
        return aligned(samples + levels * self.samples.L * LEVEL_BYTES + queries * index_bytes(self.wide_index))


@dataclass(frozen=True, kw_only=True)
class BackwardSpec(KernelSpec):
    """The gradients, where that of value is summed by atomic additions.

    `aggregation_bits`: bits of the keys by which a block sorts its samples, to add up those of a cell before the
    atomics; 0 without this. `paired_tiles` are query tiles whose products are made by one MMA.
    """

    kernel: ClassVar[str] = "backward"
    file: ClassVar[str] = "backward.cu"
    leaves_l1: ClassVar[bool] = True
    parameters: ClassVar[tuple[Parameter, ...]] = (
        *parameters("const value_t* value"),
        METADATA,
        *parameters("const location_t* locations"),
        *SAMPLE_INPUTS,
        *parameters(
            "const value_t* grad_output",
            "acc_t* grad_value",
            "location_t* grad_locations",
            "location_t* grad_weights",
            "acc_t* grad_references",
        ),
        *SIZES,
    )

    long_arrays: ClassVar[tuple[str, ...]] = ("lengths", "grad_output", "grad_value", "grad_references")
    fixed: ClassVar[dict[str, Axis]] = {"lane_groups": 1, "heads_per_warp": 1}

    wide_index: bool
    channels: ChannelAxes
    samples: SampleAxes
    block: BlockAxes
    queries: QueryAxes
    gradients: GradientAxes
    pixel_stride: int
    aggregation_bits: int
    paired_tiles: int

    @property
    def threads(self) -> int:
        return 32 * self.block.warps

    @property
    def queries_per_tile(self) -> int:
        """Queries that a warp works on at a time."""
        return 32 // self.channels.lanes

    def indices(self, sizes: Sizes) -> dict[str, Index]:
        found = prepared_indices(self.samples, self.channels, sizes, self.index_bits)
        return found | {"grad_locations": found["locations"], "grad_weights": found["weights"]}

    @property
    def shared_bytes(self) -> int:
        channels, warps, tiles = self.channels, self.block.warps, self.queries.query_tiles
        in_tile = warps * self.queries_per_tile
        pairs = in_tile * (tiles if self.aggregation_bits else 1)
        samples = samples_bytes(pairs, self.queries.chunk, self.wide_index, channels.accumulator_bytes)
        queries = tiles * in_tile * index_bytes(self.wide_index)
        size = aligned(samples + self.samples.L * LEVEL_BYTES + queries)
        if self.aggregation_bits:
            size += aligned((4 << self.aggregation_bits) + 4 * warps + 2 * pairs * self.queries.chunk)
        return size


@dataclass(frozen=True, kw_only=True)
class _ElementSpec(KernelSpec):
    """A kernel whose threads take one element after the other."""

    @property
    def threads(self) -> int:
        return 256


@dataclass(frozen=True, kw_only=True)
class CastSpec(_ElementSpec):
    """A float32 gradient of value, cast to a 16-bit dtype."""

    kernel: ClassVar[str] = "cast"
    file: ClassVar[str] = "epilogue/cast.cu"
    parameters: ClassVar[tuple[Parameter, ...]] = parameters(
        "const float* source", "value_t* target", "long long count"
    )  # fmt: skip
    long_arrays: ClassVar[tuple[str, ...]] = ("source", "target")

    value_dtype: str


@dataclass(frozen=True, kw_only=True)
class ReduceReferencesSpec(_ElementSpec):
    """The gradient of reference points, summed over heads."""

    kernel: ClassVar[str] = "reduce_references"
    file: ClassVar[str] = "epilogue/reduce_references.cu"
    parameters: ClassVar[tuple[Parameter, ...]] = parameters(
        "const acc_t* per_head", "reference_t* grad_references", "long long count"
    )
    long_arrays: ClassVar[tuple[str, ...]] = ("per_head", "grad_references")

    value_dtype: str
    reference_dtype: str
    M: int
    L: int
    reference_coordinates: int
    reference_levels: int

    def indices(self, sizes: Sizes) -> dict[str, Index]:
        return {f"{self.reference_coordinates}*M*L": Index(self.reference_coordinates * self.M * self.L, INT)}


#: Every kernel by its name.
KERNELS: dict[str, type[KernelSpec]] = {
    spec.kernel: spec
    for spec in (
        ForwardSpec, BackwardSpec, BucketSortSpec, ReduceBucketsSpec, MaterialiseSpec,
        CastSpec, ReduceReferencesSpec, NaiveForwardSpec, NaiveBackwardSpec, NaiveMaterialiseSpec,
        NaiveFusedBackwardSpec,
    )
}  # fmt: skip
