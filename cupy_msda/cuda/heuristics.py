"""Which specialisation of a kernel a problem gets: a pure function of the problem, the alignment and the GPU.

``launch_tables.py`` holds the measured choices by architecture. Here are the rules: which entry applies, and what
follows from the sizes. `alignment` is the bytes, a power of two, that all value-like addresses are multiples of.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ..arrays import item_size
from ..call import SIXTEEN_BIT, Problem, Wanted
from .axes import (
    MAX_LEVELS_OF_WARP,
    VECTOR_BYTES,
    BlockAxes,
    BoundAxes,
    ChannelAxes,
    FusedSampleAxes,
    GradientAxes,
    QueryAxes,
    SampleAxes,
    sample_bytes,
)
from .gpu import Gpu
from .index_width import narrowest
from .lanes import MAX_SAMPLES_PER_LANE, backward_channels, forward_channels, heads_per_warp, lane_groups, warps_needed
from .launch_tables import BackwardTable, Block, Bounds, ForwardEntry, table_of
from .specs import BackwardSpec, ForwardSpec
from .tuning import applied

# Shared memory of the samples of a warp. It is small, because the rest of the memory is L1 cache.
WARP_SHARED_BYTES = 5 * 1024
# Samples of a query that are unrolled as a whole with masked neighbours.
# docs/performance/decisions.md#forward-unrolled-samples
MAX_UNROLLED = 32
# With more channel tiles than this, a kernel has an entry of its own.
MANY_CHANNEL_TILES = 4
# Rows of a band of pixels, where queries are pixels: they are taken column by column.
# docs/performance/decisions.md#forward-tile-order
TILE_ROWS = 8
# Most queries of an image that are taken so: the kernels find the tile by divisions that are exact up to here.
MAX_TILED_QUERIES = 2**21
# Blocks along the second axis of a grid, at most: a limit of CUDA.
MAX_GRID_Y = 65535
# Shared memory that a block may have without opting in. A block that aggregates takes no more.
SHARED_WITHOUT_OPT_IN = 48 * 1024
# Shared memory of the samples of a block in a fused call, while the block has more than one warp.
FUSED_SHARED_BYTES = 40 * 1024


# ---- axes that follow from the problem -------------------------------------------------------------------------------


def sample_axes(problem: Problem, materialised: bool = False) -> SampleAxes:
    """How a kernel finds its samples. `materialised` ones are in the accumulator's dtype and in pixels."""
    if problem.fused and not materialised:
        return fused_sample_axes(problem)
    dtype = problem.accumulator_dtype if materialised else problem.location_dtype
    return SampleAxes(location_dtype=dtype, **_common_sample_axes(problem))


def fused_sample_axes(problem: Problem) -> FusedSampleAxes:
    """How a kernel finds samples that come as offsets and logits."""
    fused = problem.fused
    assert fused is not None
    return FusedSampleAxes(
        location_dtype=problem.location_dtype,
        reference_dtype=fused.dtype,
        reference_coordinates=fused.coordinates,
        reference_levels=fused.levels,
        packed=fused.packed,
        **_common_sample_axes(problem),
    )


def _common_sample_axes(problem: Problem) -> dict[str, Any]:
    variant = problem.variant
    return {
        "L": problem.L,
        "P": problem.P,
        "points": variant.num_points or (),
        "nearest": variant.nearest,
        "border": variant.padding_mode == "border",
        "align_corners": variant.align_corners,
        "pixel_locations": problem.fused is not None,
        "ragged": problem.ragged,
    }


def bound_axes(chosen: Bounds, gpu: Gpu, warps: int | None = None) -> BoundAxes:
    """A table's choice with no more resident blocks than the GPU holds; `warps` where these are not the table's."""
    warps = warps or chosen.warps
    return BoundAxes(warps=warps, min_blocks=min(chosen.min_blocks, gpu.resident_blocks(32 * warps)))


def block_axes(chosen: Block, gpu: Gpu, warps: int | None = None) -> BlockAxes:
    """The same for a kernel that loads several value vectors at a time."""
    bounds = bound_axes(chosen, gpu, warps)
    return BlockAxes(warps=bounds.warps, min_blocks=bounds.min_blocks, unroll=chosen.unroll)


def query_axes(problem: Problem, chunk: int, query_tiles: int) -> QueryAxes:
    """Queries are taken by tiles of the image where they are its pixels."""
    tiled = problem.Q == problem.S and problem.Q <= MAX_TILED_QUERIES and problem.L <= MAX_LEVELS_OF_WARP
    return QueryAxes(chunk=chunk, query_tiles=query_tiles, tile_rows=TILE_ROWS if tiled else 0)


# ---- samples in shared memory ----------------------------------------------------------------------------------------


def _most_in_chunk(problem: Problem, lanes: int, wide_index: bool, unrolled: bool) -> int:
    """Samples of a query that fit into shared memory and registers at a time, with `lanes` lanes for each query."""
    held = MAX_SAMPLES_PER_LANE * lanes
    if unrolled and lanes >= 4:  # with fewer lanes a warp has more queries, which take shared memory
        held = max(held, MAX_UNROLLED)
    entry = sample_bytes(wide_index, item_size(problem.accumulator_dtype))
    return max(1, min(WARP_SHARED_BYTES // (32 // lanes * entry) - 1, held))


def _chunk(problem: Problem, most: int) -> int:
    """Samples of a query at a time. The softmax of a fused call needs all of them at once."""
    return problem.K if problem.fused else -(-problem.K // -(-problem.K // most))


def fused_warps(problem: Problem, warps: int, queries: int, wide_index: bool) -> int:
    """Warps of a block whose samples fit into shared memory in a fused call; `queries` per warp."""
    entry = sample_bytes(wide_index, item_size(problem.accumulator_dtype))
    while problem.fused and warps > 1 and warps * queries * (problem.K | 1) * entry > FUSED_SHARED_BYTES:
        warps //= 2
    return warps


# ---- forward ---------------------------------------------------------------------------------------------------------


def forward_entry(problem: Problem, channels: ChannelAxes, gpu: Gpu) -> ForwardEntry:
    table = table_of(gpu)
    few = warps_needed(problem, channels.lanes) < table.filling_warps * gpu.multiprocessors
    narrow = problem.value_dtype in SIXTEEN_BIT
    if channels.channel_tiles > MANY_CHANNEL_TILES:
        return table.forward.many_channel_tiles
    if problem.value_dtype == "float64":
        return table.forward.float64
    if problem.Q == problem.S and not few:
        wide = table.forward.fused_pixels_32_bits if problem.fused else table.forward.pixels_32_bits
        return table.forward.pixels_16_bits if narrow else wide
    if not narrow:
        return table.forward.queries_32_bits
    return table.forward.few_queries_16_bits if few else table.forward.queries_16_bits


def forward(problem: Problem, alignment: int, gpu: Gpu) -> ForwardSpec:
    """The forward kernel.

    Masked neighbours cost registers, and a lane waits for some neighbours of a sample before it loads the next. So not
    with nested loops over samples or several channel tiles, and not for clamped locations, few of which are outside.
    With them a warp takes two query tiles, of neighbouring patches, with all samples of a query unrolled. 16-bit
    vectors of 8 lanes or more keep one.
    docs/performance/decisions.md#forward-query-tiles-per-warp
    docs/performance/decisions.md#forward-one-tile-for-wide-16-bit
    """
    return narrowest(lambda wide_index: _forward(problem, alignment, gpu, wide_index), problem)


def _forward(problem: Problem, alignment: int, gpu: Gpu, wide_index: bool) -> ForwardSpec:
    channels = forward_channels(problem, alignment)
    axes = applied.axes_of("forward", problem, alignment, gpu)
    entry = applied.forward(forward_entry(problem, channels, gpu), axes)
    groups = lane_groups(entry, channels.lanes, problem)
    per_query = channels.lanes * groups
    masked = entry.masked_neighbours and channels.channel_tiles == 1 and not problem.variant.clamped
    most = _most_in_chunk(problem, per_query, wide_index, unrolled=masked)
    chunk = _chunk(problem, most)
    block = block_axes(entry, gpu, fused_warps(problem, entry.warps, 32 // per_query, wide_index))
    if chunk > most:  # a fused call with many samples per query: the registers of a lane hold its share of them
        block = block.with_axes(min_blocks=1)
    spec = ForwardSpec(
        wide_index=wide_index,
        channels=channels,
        samples=sample_axes(problem),
        block=block,
        queries=query_axes(problem, chunk, query_tiles=1),
        pixel_stride=problem.strides.pixel,
        lane_groups=groups,
        heads_per_warp=heads_per_warp(problem, per_query),
        masked_neighbours=masked and chunk == problem.K and problem.L <= MAX_LEVELS_OF_WARP,
    )
    several = spec.masked_neighbours and spec.queries.tile_rows and chunk <= MAX_UNROLLED
    query_tiles = 1 if problem.value_dtype in SIXTEEN_BIT and channels.lanes >= 8 else 2
    if several and axes.get("query_tiles", query_tiles) == 2:
        tiled = _fitting(spec.with_axes(query_tiles=2, unroll=chunk), gpu)
        if grid_rows(problem, tiled, gpu) <= MAX_GRID_Y:
            return tiled
    return _fitting(spec, gpu)


def _fitting(spec: ForwardSpec, gpu: Gpu) -> ForwardSpec:
    """With as many warps per block as the shared memory of the GPU has room for."""
    while spec.shared_bytes > gpu.shared_memory_per_block and spec.block.warps > 1:
        spec = spec.with_axes(warps=spec.block.warps // 2)
    return spec


def grid_rows(problem: Problem, spec: ForwardSpec, gpu: Gpu) -> int:
    """Rows of the grid of a forward: one per `heads_per_warp` heads. The last heads have one per query tile.

    Their blocks of one query tile are about a wave, all that the GPU holds at a time. The multiprocessors then end at
    about the same time. docs/performance/decisions.md#forward-last-wave
    """
    heads, tiles = problem.N * problem.M // spec.heads_per_warp, spec.queries.query_tiles
    if tiles == 1:
        return heads
    blocks = -(-problem.Q // (spec.block.warps * tiles * spec.queries_per_tile))
    wave = spec.resident_blocks(gpu) * gpu.multiprocessors
    return heads + min(heads, max(1, round(wave / blocks))) * (tiles - 1)


# ---- backward --------------------------------------------------------------------------------------------------------


def backward(problem: Problem, alignment: int, gpu: Gpu, wanted: Wanted, aggregated: bool) -> BackwardSpec:
    """The backward kernel, for the gradients that are wanted.

    A block that aggregates works on a part of the image, in the tiles of all levels.
    docs/performance/decisions.md#backward-cross-level-tiles
    """
    return narrowest(lambda wide_index: _backward(problem, alignment, gpu, wanted, aggregated, wide_index), problem)


def _backward(
    problem: Problem, alignment: int, gpu: Gpu, wanted: Wanted, aggregated: bool, wide_index: bool
) -> BackwardSpec:
    table = table_of(gpu).backward
    channels = backward_channels(problem, alignment, wanted.value)
    tiles, name = channels.channel_tiles, "atomics" if wanted.value else "samples"
    if tiles > MANY_CHANNEL_TILES:
        entry = table.many_channel_tiles
    elif not wanted.value:
        entry = _samples_entry(problem, channels, table)
    elif aggregated:
        spec = _aggregated(problem, alignment, gpu, wanted, wide_index)
        if spec is not None:
            return spec
        entry = table.atomics
    elif warps_needed(problem, channels.lanes) < table_of(gpu).filling_warps * gpu.multiprocessors:
        entry = table.atomics_few_queries
    else:
        entry = table.atomics
    entry = applied.block(entry, applied.axes_of(name, problem, alignment, gpu, wanted))
    return _backward_spec(problem, channels, entry, gpu, wanted, wide_index)


def _samples_entry(problem: Problem, channels: ChannelAxes, table: BackwardTable) -> Block:
    """Entry of a kernel that computes no gradient of value. Several channel tiles have loads enough in flight."""
    if problem.value_dtype == "float64":
        return table.samples_float64
    narrow = problem.value_dtype in SIXTEEN_BIT
    entry = table.samples_16_bits if narrow else table.samples_32_bits
    masked_channels = problem.D % channels.channel_tile != 0
    if MAX_SAMPLES_PER_LANE * channels.lanes < problem.K or (masked_channels if narrow else problem.fused):
        entry = table.samples_many_registers
    return entry if channels.channel_tiles == 1 else replace(entry, unroll=2)


def _aggregated(problem: Problem, alignment: int, gpu: Gpu, wanted: Wanted, wide_index: bool) -> BackwardSpec | None:
    """The kernel whose blocks aggregate their samples, if these fit into shared memory.

    With many samples per query a block has fewer queries. In 16 bits half of the lanes make the products with value,
    each with 16 bytes of a vector.
    docs/performance/decisions.md#backward-mma-products
    """
    table, narrow = table_of(gpu).backward, problem.value_dtype in SIXTEEN_BIT
    axes = applied.axes_of("aggregated", problem, alignment, gpu, wanted)
    entry = applied.block(table.aggregated_16_bits if narrow else table.aggregated, axes)
    queries = int(axes.get("aggregated_queries", table.aggregated_queries))
    channels = backward_channels(problem, alignment, True)
    wide_loads = 2 * channels.vec * item_size(problem.value_dtype) == VECTOR_BYTES
    wide_loads = wide_loads and min(alignment, problem.stride_alignment) >= VECTOR_BYTES
    whole_lanes = channels.lanes >= 8 and problem.D % channels.channel_tile == 0
    paired = narrow and wide_loads and whole_lanes and (wanted.locations or wanted.weights)
    tiles = max(1, queries * channels.lanes // (32 * entry.warps))
    while tiles:
        spec = _backward_spec(problem, channels, entry, gpu, wanted, wide_index, tiles)
        paired = paired and tiles > 1
        spec = replace(spec, aggregation_bits=table.aggregation_bits, paired_tiles=2 if paired else 1)
        if spec.shared_bytes <= SHARED_WITHOUT_OPT_IN:
            return spec
        tiles //= 2
    return _aggregated(problem, alignment, gpu.untuned, wanted, wide_index) if axes else None


def _backward_spec(
    problem: Problem,
    channels: ChannelAxes,
    entry: Block,
    gpu: Gpu,
    wanted: Wanted,
    wide_index: bool,
    query_tiles: int = 1,
) -> BackwardSpec:
    """The backward kernel of an entry, without aggregation."""
    queries = query_tiles * (32 // channels.lanes)
    block = block_axes(entry, gpu, fused_warps(problem, entry.warps, queries, wide_index))
    most = _most_in_chunk(problem, channels.lanes, wide_index, unrolled=False)
    chunk = _chunk(problem, most)
    if chunk > most:  # a fused call with many samples per query
        block = block.with_axes(min_blocks=1)
    return BackwardSpec(
        wide_index=wide_index,
        channels=channels,
        samples=sample_axes(problem),
        block=block,
        queries=query_axes(problem, chunk, query_tiles),
        gradients=GradientAxes(
            grad_value=wanted.value,
            grad_locations=wanted.locations,
            grad_weights=wanted.weights,
            grad_references=wanted.references,
        ),
        pixel_stride=problem.strides.pixel,
        aggregation_bits=0,
        paired_tiles=1,
    )
