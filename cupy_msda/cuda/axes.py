"""Groups of axes, parameters and sizes that several kernels have in common."""

from __future__ import annotations

from dataclasses import dataclass

from ..arrays import item_size
from ..call import accumulator_of
from .index_width import INT, UNSIGNED, Index, Sizes
from .kernel_spec import Axis, AxisGroup, Parameter, parameters

VECTOR_BYTES = 16
# Size of the kernels' `level_info`.
LEVEL_BYTES = 16
# With more levels than this, the registers of a lane do not hold them.
MAX_LEVELS_IN_REGISTERS = 5
# With more levels than this, a warp has no lane for each.
MAX_LEVELS_OF_WARP = 32


def aligned(nbytes: int, alignment: int = VECTOR_BYTES) -> int:
    """`nbytes` rounded up to a multiple of `alignment`."""
    return -(-nbytes // alignment) * alignment


# ---- groups of axes --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class SampleAxes(AxisGroup):
    """How the samples of a query come: as locations and weights.

    `points` holds the points of each level where these differ; P is 0 then. Otherwise it is empty.
    """

    location_dtype: str
    L: int
    P: int
    points: tuple[int, ...]
    nearest: bool
    border: bool
    align_corners: bool
    pixel_locations: bool
    ragged: bool

    @property
    def K(self) -> int:
        """Samples per query and head."""
        return sum(self.points) or self.L * self.P

    @property
    def numbers(self) -> tuple[int, int]:
        """Elements per sample from a query to the next, in the arrays of locations and of weights."""
        return 2, 1

    @property
    def reference_numbers(self) -> int:
        """Elements of the reference points per query."""
        return 0

    def indices(self, M: int, sizes: Sizes, bits: int) -> dict[str, Index]:
        """The arrays that hold the samples of M heads, whose elements are counted in `bits` bits."""
        locations, weights = self.numbers
        return {
            "locations": Index(sizes.Q * M * self.K * locations, bits),
            "weights": Index(sizes.Q * M * self.K * weights, bits),
            "references": Index(sizes.Q * self.reference_numbers, bits),
            f"{locations}*M*L*P": Index(locations * M * self.K, INT),
            "H and W": Index(sizes.side, INT),
        }

    def derived(self) -> dict[str, Axis]:
        return {"reference_dtype": "float32", "reference_coordinates": 0, "reference_levels": 0, "packed": False}


@dataclass(frozen=True, kw_only=True)
class FusedSampleAxes(SampleAxes):
    """How the samples of a query come in a fused call: as offsets from reference points, and as logits."""

    reference_dtype: str
    reference_coordinates: int
    reference_levels: int
    packed: bool

    @property
    def numbers(self) -> tuple[int, int]:
        return (3, 3) if self.packed else (2, 1)

    @property
    def reference_numbers(self) -> int:
        return self.reference_levels * self.reference_coordinates

    def derived(self) -> dict[str, Axis]:
        return {}


@dataclass(frozen=True, kw_only=True)
class ChannelAxes(AxisGroup):
    """How lanes share the channels of a value vector."""

    value_dtype: str
    M: int
    D: int
    vec: int
    lanes: int

    @property
    def accumulator_bytes(self) -> int:
        """Size of the kernels' `acc_t`."""
        return item_size(accumulator_of(self.value_dtype))

    @property
    def channel_tile(self) -> int:
        """Channels that the lanes hold at a time."""
        return self.lanes * self.vec

    @property
    def channel_tiles(self) -> int:
        return -(-self.D // self.channel_tile)

    @property
    def padded_channels(self) -> int:
        """D, rounded up to whole channel tiles."""
        return self.channel_tiles * self.channel_tile

    def indices(self) -> dict[str, Index]:
        """The channels of all heads."""
        return {"M*D": Index(self.M * self.padded_channels, INT)}


@dataclass(frozen=True, kw_only=True)
class BoundAxes(AxisGroup):
    """Warps per block, and blocks on a multiprocessor that the registers leave room for."""

    warps: int
    min_blocks: int


@dataclass(frozen=True, kw_only=True)
class BlockAxes(BoundAxes):
    """The same, and how many value vectors are loaded before the first is used."""

    unroll: int


@dataclass(frozen=True, kw_only=True)
class QueryAxes(AxisGroup):
    """How queries are taken.

    `chunk` samples of each are in shared memory at a time. A warp takes `query_tiles` tiles, one after the other. Where
    queries are pixels, a tile is a patch of `tile_rows` rows; otherwise it is 0.
    """

    chunk: int
    query_tiles: int
    tile_rows: int


@dataclass(frozen=True, kw_only=True)
class GradientAxes(AxisGroup):
    """Which gradients the backward kernel computes."""

    grad_value: bool
    grad_locations: bool
    grad_weights: bool
    grad_references: bool


def block_indices(samples: SampleAxes, M: int, sizes: Sizes, bits: int) -> dict[str, Index]:
    """What a kernel counts whose blocks take some queries of a head."""
    return samples.indices(M, sizes, bits) | {"S": Index(sizes.S, bits), "N*M": Index(sizes.N * M, UNSIGNED)}


def prepared_indices(samples: SampleAxes, channels: ChannelAxes, sizes: Sizes, bits: int) -> dict[str, Index]:
    """The same where samples are prepared: they hold 16 times their pixel, which may lie a row outside the image."""
    pixels = {"value": Index(32 * sizes.S, bits)}
    return block_indices(samples, channels.M, sizes, bits) | channels.indices() | pixels


# ---- parameters and shared memory that kernels have in common --------------------------------------------------------

METADATA = Parameter("metadata", "const level_metadata", words=2)
SAMPLE_INPUTS = parameters(
    "const location_t* weights", "const reference_t* references", "const long long* lengths"
)  # fmt: skip
SIZES = parameters("long long S", "long long Q", "long long image_stride", "long long head_stride", "long long heads")
SLAB = parameters("long long first_head", "long long heads", "long long first_pixel", "long long buckets")
RUNS = parameters("long long S", "long long Q", "long long runs", "long long capacity")


def sample_bytes(wide_index: bool, accumulator_bytes: int) -> int:
    """Size of the kernels' `prepared_sample`."""
    index = max(8 if wide_index else 4, accumulator_bytes)  # padded to the alignment of what follows
    return aligned(index + 3 * accumulator_bytes)


def contribution_bytes(value_dtype: str) -> int:
    """Size of the kernels' `contribution`."""
    return 32 if value_dtype == "float64" else 16


def samples_bytes(pairs: int, chunk: int, wide_index: bool, accumulator_bytes: int) -> int:
    """Shared memory of `chunk` samples of each of `pairs` of a query and a head. An odd pitch has no bank conflicts."""
    return pairs * (chunk | 1) * sample_bytes(wide_index, accumulator_bytes)


def index_bytes(wide_index: bool) -> int:
    return 8 if wide_index else 4
