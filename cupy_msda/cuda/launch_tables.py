"""Launch configurations by architecture. The comment of an entry says why, its link how much it is worth.

Only Hopper is measured so far. The other architectures take its shapes of blocks, and derive how many of them are
resident from their own limits: no more than a multiprocessor holds (:func:`cupy_msda.cuda.heuristics.bound_axes`), and
no more than leave each thread the registers that the compiler needs there. ``cupy_msda.tune`` measures on any GPU.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TypeVar

from .gpu import Gpu


@dataclass(frozen=True)
class Bounds:
    """Warps per block, and blocks that should be resident on a multiprocessor.

    `min_blocks` caps the registers. Too many blocks spill registers, too few do not hide the latency of loads.
    """

    warps: int
    min_blocks: int


@dataclass(frozen=True)
class Block(Bounds):
    """The same, and how many value vectors are loaded before the first is used."""

    unroll: int


@dataclass(frozen=True)
class ForwardEntry(Block):
    """`lanes_per_query`: lanes, of one or more lane groups, that share the samples of a query; 0 for one group.

    `masked_neighbours`: where all samples of a query fit.
    """

    lanes_per_query: int = 0
    masked_neighbours: bool = False


@dataclass(frozen=True)
class ForwardTable:
    many_channel_tiles: ForwardEntry
    float64: ForwardEntry
    pixels_32_bits: ForwardEntry
    fused_pixels_32_bits: ForwardEntry
    pixels_16_bits: ForwardEntry
    queries_32_bits: ForwardEntry
    queries_16_bits: ForwardEntry
    few_queries_16_bits: ForwardEntry


@dataclass(frozen=True)
class BackwardTable:
    many_channel_tiles: Block
    samples_float64: Block
    samples_32_bits: Block
    samples_16_bits: Block
    samples_many_registers: Block
    aggregated: Block
    aggregated_16_bits: Block
    atomics: Block
    atomics_few_queries: Block
    aggregated_queries: int
    aggregation_bits: int


@dataclass(frozen=True)
class SortedTable:
    bucket_sort: Bounds
    reduce_buckets: Block
    reduce_unsorted: Block


@dataclass(frozen=True)
class Table:
    """All entries of an architecture.

    With fewer than `filling_warps` warps per multiprocessor, the latency of a kernel counts, not its throughput.
    """

    filling_warps: int
    forward: ForwardTable
    backward: BackwardTable
    sorted: SortedTable


HOPPER = Table(
    # A quarter of what a multiprocessor holds.
    filling_warps=16,
    forward=ForwardTable(
        # Very many channels per head: the channel tiles alone keep enough loads in flight, and their sums need the
        # registers.
        many_channel_tiles=ForwardEntry(warps=8, min_blocks=1, unroll=1),
        # Its vectors and sums take twice the registers.
        float64=ForwardEntry(warps=8, min_blocks=3, unroll=2),
        # Queries are pixels and fill the GPU. Large blocks share a patch of pixels in the L1 cache. Masked neighbours
        # read less. docs/performance/decisions.md#forward-masked-neighbours
        pixels_32_bits=ForwardEntry(warps=16, min_blocks=3, unroll=4, masked_neighbours=True),
        fused_pixels_32_bits=ForwardEntry(warps=16, min_blocks=3, unroll=4, masked_neighbours=True),
        # More resident warps spill. docs/performance/decisions.md#forward-resident-warps-16-bit
        pixels_16_bits=ForwardEntry(warps=8, min_blocks=5, unroll=4, masked_neighbours=True),
        # Queries are no pixels, or do not fill the GPU. Small blocks end independently, and lane groups that share many
        # samples shorten each query.
        # docs/performance/decisions.md#forward-lane-groups
        # docs/performance/decisions.md#forward-queries-launch
        queries_32_bits=ForwardEntry(warps=4, min_blocks=8, unroll=8, lanes_per_query=16),
        queries_16_bits=ForwardEntry(warps=4, min_blocks=8, unroll=2, lanes_per_query=8),
        # With fewer warps each has more loads in flight.
        few_queries_16_bits=ForwardEntry(warps=4, min_blocks=5, unroll=8, lanes_per_query=8),
    ),
    backward=BackwardTable(
        # As in the forward.
        many_channel_tiles=Block(warps=4, min_blocks=1, unroll=1),
        # Without grad_value there are registers for more resident blocks and more loads in flight.
        # docs/performance/decisions.md#backward-sample-gradients-launch
        samples_float64=Block(warps=4, min_blocks=10, unroll=2),
        samples_32_bits=Block(warps=4, min_blocks=10, unroll=8),
        samples_16_bits=Block(warps=8, min_blocks=5, unroll=8),
        # A loop over chunks of samples, a float32 softmax and masked 16-bit channels spill 48 registers.
        samples_many_registers=Block(warps=4, min_blocks=8, unroll=8),
        # The samples of a block of 64 queries share value vectors. Fewer share less, more leave no room for other
        # blocks. Half or twice as many sort keys take longer.
        # docs/performance/decisions.md#backward-block-aggregation
        aggregated=Block(warps=8, min_blocks=4, unroll=2),
        aggregated_16_bits=Block(warps=8, min_blocks=5, unroll=2),
        aggregated_queries=64,
        aggregation_bits=10,
        # The limit are the atomic additions themselves.
        atomics=Block(warps=4, min_blocks=8, unroll=2),
        # Small blocks spread few queries over more multiprocessors.
        atomics_few_queries=Block(warps=2, min_blocks=8, unroll=2),
    ),
    sorted=SortedTable(
        # A sorted run of eight warps fits into the shared memory of every architecture.
        bucket_sort=Bounds(warps=8, min_blocks=4),
        # Fewer resident blocks without spills are faster than more with them.
        # docs/performance/decisions.md#sorted-reduction-launch
        reduce_buckets=Block(warps=4, min_blocks=5, unroll=4),
        # Without a sort a warp needs fewer registers.
        reduce_unsorted=Block(warps=4, min_blocks=6, unroll=4),
    ),
)

# Of a multiprocessor, on every architecture.
_REGISTERS = 1 << 16
AnyBounds = TypeVar("AnyBounds", bound=Bounds)


def leaving(entry: AnyBounds, registers: int) -> AnyBounds:
    """An entry with no more resident blocks than leave each thread so many registers."""
    return replace(entry, min_blocks=min(entry.min_blocks, _REGISTERS // (32 * entry.warps * registers)))


DERIVED = replace(
    HOPPER,
    backward=replace(
        HOPPER.backward,
        # ptxas needs 53 to 64 registers here, and 48 for Hopper. A spill would be in the loop over samples.
        aggregated_16_bits=leaving(HOPPER.backward.aggregated_16_bits, 64),
        # Without grad_value 56 to 72 registers. Few float64 units are soon busy, so fewer warps lose nothing.
        samples_float64=leaving(HOPPER.backward.samples_float64, 72),
    ),
)
BLACKWELL = replace(
    DERIVED,
    forward=replace(
        HOPPER.forward,
        # Locations and softmax take 56 registers here, and 40 on all others.
        fused_pixels_32_bits=leaving(HOPPER.forward.fused_pixels_32_bits, 56),
        # With four loads in flight and more, ptxas spills here whatever the registers.
        queries_32_bits=replace(HOPPER.forward.queries_32_bits, unroll=2),
    ),
)
#: By the major compute capability.
TABLES = {7: DERIVED, 8: DERIVED, 9: HOPPER, 10: BLACKWELL, 12: BLACKWELL}


def table_of(gpu: Gpu) -> Table:
    """The table of a GPU; that of the newest architecture where its own is not known."""
    return TABLES.get(gpu.architecture // 10, BLACKWELL)
