"""Which kernel runs, and how it is launched: a pure function of the problem, no framework, no GPU.

A :class:`KernelKey` spells every compile-time choice; :class:`Launch` adds what varies from call to call.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace
from typing import Any

from ..arrays import item_size
from ..call import ALL, SIXTEEN_BIT, Problem, Wanted, accumulator_of

VECTOR_BYTES = 16
# Shared memory of a warp's samples: little, because what a block does not take is left to L1.
WARP_SHARED_BUDGET = 5 * 1024
# Samples that a lane holds in registers between loading and preparing them.
MAX_FILLS = 4
# Samples of a query that are unrolled as a whole, where neighbours outside are screened.
MAX_UNROLLED = 32
# Lanes that share the samples of a query where queries are not pixels.
LANES_A_QUERY = 16
# Bytes that the L1 cache hands out a clock: two rows of 64 together, if they lie in different halves of their lines.
LINE_BYTES = 128
# Size of the kernels' `msda_level`.
LEVEL_BYTES = 16
# Heads a warp works on at a time, at most.
MAX_HEADS = 4
# Warps a multiprocessor below which the latency of the forward counts, not its throughput.
WARPS_THAT_FILL = 16
# Rows of the patch of pixels that shares a block where queries are pixels.
BAND = 8
# Most queries of an image that are taken so: the kernels find a query's band by divisions that are exact up to here.
MAX_IN_BANDS = 2**21
# Blocks along the second axis of a grid, at most, which CUDA says.
MAX_GRID_Y = 65535
# Samples a row of value from which on those of a cell are merged before they are added to grad_value.
MERGED = 4
# Queries of a block whose samples are merged, and bits of the keys by which they are sorted.
MERGED_QUERIES = 64
MERGED_KEYS = 10
# Shared memory of a block, in bytes, that a kernel may have without opting in; a block that merges takes no more.
SHARED_WITHOUT_OPT_IN = 48 * 1024
# More levels than this, and the registers of a lane do not hold them.
MAX_LEVELS_IN_REGISTERS = 5
# More levels than this and the kernel's parameters would not hold them: they go to the device.
MAX_LEVELS_BY_VALUE = 64
# Shared memory, in bytes, of the samples of a block whose softmax is in the kernel, while it has more than one warp.
FRONT_BYTES = 40 * 1024
# A head of very many channels: the turns alone keep enough loads in flight, and its sums need the registers.
_MANY_TURNS = {"min_blocks": 1, "unroll": 1}


@dataclass(frozen=True)
class KernelKey:
    """Every axis along which the kernels are specialised. `kind` is the name of the .cu file and the kernel.

    `points` is empty where every level has P points; otherwise P is 0.
    """

    kind: str
    value_dtype: str
    location_dtype: str
    index_64: bool
    L: int
    P: int
    M: int
    D: int
    vec: int
    lanes: int
    chunk: int
    warps: int
    rounds: int
    min_blocks: int
    unroll: int
    band: int
    levels_on_device: bool
    grad_value: bool = False
    grad_locations: bool = False
    grad_weights: bool = False
    points: tuple[int, ...] = ()
    nearest: bool = False
    border: bool = False
    align_corners: bool = False
    rows: int = 0
    merge: int = 0
    joined: int = 1
    split: int = 1
    heads: int = 1
    screened: bool = False
    stride: int = 0
    padded: bool = False
    front: int = 0
    references: int = 0
    reference_dtype: str = "float32"
    packed: bool = False
    pixels: bool = False
    grad_references: bool = False

    @property
    def K(self) -> int:
        """Samples of a query and head."""
        return sum(self.points) or self.L * self.P

    @property
    def queries(self) -> int:
        """Queries that a warp works on at a time."""
        return 32 // (self.lanes * self.split * self.heads)

    @property
    def alone(self) -> bool:
        """Whether the warps of a block never wait for each other: the forward, if a warp has a lane for each level."""
        return self.kind == "forward" and self.L <= 32

    @property
    def levels_in_registers(self) -> bool:
        """Whether each lane of the forward holds all levels, instead of a copy a warp in shared memory."""
        return self.screened and self.rounds > 1 and self.L <= MAX_LEVELS_IN_REGISTERS

    @property
    def together(self) -> int:
        """Samples of a query that one of its lanes reads at a time: up to VECTOR_BYTES of locations."""
        if self.vec * item_size(self.value_dtype) < VECTOR_BYTES:
            return 1  # addresses may not be aligned to more
        return math.gcd(self.K, VECTOR_BYTES // (2 * item_size(self.location_dtype)))

    def macros(self) -> dict[str, int | str]:
        """Preprocessor definitions, without dtypes, that the sources document."""
        skip = ("kind", "value_dtype", "location_dtype", "reference_dtype", "points")
        named = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in skip}
        named |= {"alone": self.alone, "levels_in_registers": self.levels_in_registers, "together": self.together}
        macros: dict[str, int | str] = {f"MSDA_{name.upper()}": int(number) for name, number in named.items()}
        if self.points:
            macros["MSDA_POINTS"] = ",".join(map(str, self.points))
        return macros

    def __str__(self) -> str:
        axes = [f"{f.name}={getattr(self, f.name)}" for f in fields(self) if f.name != "kind"]
        return f"{self.kind}[{', '.join(axes)}]"


@dataclass(frozen=True)
class Launch:
    """A kernel and its launch: blocks along x, y and z, threads a block, bytes of dynamic shared memory."""

    key: KernelKey
    grid: tuple[int, int, int]
    block: int
    shared: int


def levels_by_value(problem: Problem) -> bool:
    """Whether the levels travel in the parameters of the kernels."""
    return problem.levels is not None and problem.L <= MAX_LEVELS_BY_VALUE


def forward(problem: Problem, alignment: int, multiprocessors: int = 132) -> Launch:
    """Launch of the forward kernel; `alignment` is the bytes that all value-like addresses are multiples of.

    Where queries are pixels, large blocks share a patch in L1, and neighbours outside a level are screened instead of
    set to zero. On an H100, microseconds, with and without: encoder_800x1333 150 and 157 in float32, 114 and 120 in
    float16; mask2former_1024 65 and 69.5, 47 and 49. It takes registers, so not where the loops over samples are
    nested, which spilled; and a lane waits for a part of a sample's rows before it asks for the next, so not where it
    has several turns (D = 33 513 and 464 in float32) nor where queries are few (decoder_900 61.8 and 56.8, rtdetr_640
    41.2 and 37.5). Clamped locations have fewer neighbours outside, and keep the code of the other kernels.

    Screened, a warp takes two rounds of queries, of neighbouring patches, with all samples of a query unrolled and, as
    far as they fit, levels in registers: in float32 encoder_800x1333 139.4 us instead of 148, mask2former_1024 58
    instead of 64, encoder_uniform 226 either way; in bfloat16 101.2 instead of 102, 42.2 instead of 45, 146 instead of
    150. Three rounds 138, 59.7 and 232 in float32. With a fifth level, 20 samples, encoder_800x1333 takes 128 us in
    float16 instead of 148 in two chunks; with 8 points a level 205 instead of 211. Not in 16 bits with 8 lanes a
    query and more: D = 64 195 us instead of 183 in float16, 191 instead of 182 in bfloat16, D = 128 194 and 178, 189
    and 168, D = 44 254 and 235, 262 and 232; D = 36 171 and 175, but 176 and 174.

    Where queries are not pixels, small blocks finish independently, and the samples of a query are shared by
    LANES_A_QUERY lanes, or of 16 bits by half of them where there are many queries. Against a row's lanes alone:
    decoder_300 9.2 and 9.6 in float32, 6.7 and 8.0 in float16; decoder_900 58.5 and 60.2, 38.2 and 38.1; rtdetr_640
    37.7 and 39.1, 25.0 and 25.8.
    """
    itemsize = item_size(problem.value_dtype)
    vec = _vector(problem.D, itemsize, min(alignment, problem.stride_alignment, VECTOR_BYTES))
    lanes, turns = _lanes(problem.D // vec)
    few = _warps_needed(problem, lanes) < WARPS_THAT_FILL * multiprocessors
    if turns > 4:
        choices = {"warps": 8} | _MANY_TURNS
    elif itemsize == 8:
        choices = {"warps": 8, "min_blocks": 3, "unroll": 2}
    elif problem.Q == problem.S and not few:
        # 16 bits with 6 blocks a multiprocessor spill, and take 131 to 138 us instead of 114 to 118 on
        # encoder_800x1333; with 4 of 8 warps 107, 3 of 12 105 to 107, instead of 103. 2 samples at a time 105 to 106.
        choices = {"warps": 16, "min_blocks": 3} if itemsize == 4 else {"warps": 8, "min_blocks": 5}
        choices |= {"unroll": 4, "screened": turns == 1 and not problem.variant.clamped}
    elif itemsize == 2 and not few:
        split = _split(LANES_A_QUERY // 2, lanes, problem.K)
        choices = {"warps": 4, "min_blocks": 8, "unroll": max(1, 2 // split), "split": split}
    else:
        split = _split(LANES_A_QUERY, lanes, problem.K)
        unroll = 4 if itemsize == 2 else max(1, 4 // split)
        choices = {"warps": 2, "min_blocks": 6, "unroll": unroll, "split": split}
    choices["heads"] = _heads_of_a_line(problem, lanes * choices.get("split", 1))
    launch = _launch(problem, "forward", vec, lanes, rounds=1, **choices)
    if launch.key.screened and launch.key.chunk <= MAX_UNROLLED and (itemsize == 4 or lanes < 8):
        longer = launch_of(problem, replace(launch.key, rounds=2, unroll=launch.key.chunk), multiprocessors)
        launch = longer if longer.grid[2] == 1 else launch
    return _fitting(launch)


def _heads_of_a_line(problem: Problem, lanes: int) -> int:
    """Heads whose rows of a pixel are one cache line, as far as a warp has so many times `lanes` lanes.

    All rows of one head lie in the same part of their lines, and what lies in the same part is not handed out in the
    same clock. Two heads instead of one, 64-byte rows: encoder_800x1333 103 us instead of 113 in float16, 105 instead
    of 117 in bfloat16, mask2former_1024 43 instead of 50; encoder_uniform, which the L2 cache limits, 152 instead of
    149 in float16; decoders no difference.
    """
    row = problem.D * item_size(problem.value_dtype)
    if LINE_BYTES % row or problem.strides.head != problem.D:
        return 1
    return math.gcd(problem.M, min(LINE_BYTES // row, MAX_HEADS, 1 << (32 // lanes).bit_length() - 1))


def _split(wanted: int, lanes: int, K: int) -> int:
    """Groups of `lanes` lanes that share the samples of a query: `wanted` lanes in all, if there is work for them."""
    if lanes & (lanes - 1):
        return 1  # the shuffles that add up their sums need a power of two
    return max(1, min(wanted // lanes, 1 << (K.bit_length() - 1)))


def size_words(problem: Problem) -> tuple[int, int, int, int, int]:
    """S, Q, the strides of value's images and heads, N * M: the last words of the forward and backward kernels."""
    return (problem.S, problem.Q, problem.strides.image, problem.strides.head, problem.N * problem.M)


def merges(problem: Problem) -> bool:
    """Whether the backward adds up samples of a cell before they go to grad_value: where each row gets many."""
    return problem.Q * problem.K >= MERGED * problem.S


def backward(problem: Problem, alignment: int, multiprocessors: int = 132, wanted: Wanted = ALL) -> Launch:
    """Launch of the backward kernel, for the gradients that are wanted.

    Merged (many samples a row of value): 64 queries a block, where they are pixels a slice of the image
    (``msda_order.cuh``), and 1024 keys. encoder_800x1333 on an H200, before there were slices: 381 us in float32 with 4
    blocks a multiprocessor, 390 with 5; 371 in float16 with 5, 380 with 4; 32 queries 398, 128 queries 390 to 404; 512
    or 2048 keys 392, 406; not merged 777.

    Without grad_value 10 blocks of 4 warps: encoder_800x1333 on an H100 231 us and decoder_900 68 in float32, 234 and
    73 with 12; in float16 no difference. Four samples at a time instead of two: float32 221 instead of 229 us there,
    98 instead of 106 on mask2former_1024, gradients of locations alone 13.4 instead of 16.9 on decoder_300; three take
    longer than two. Merged, four at a time are the same in float32 and 2 % slower in float16 on encoder_800x1333. In 16
    bits 5 blocks of 8 warps: encoder_800x1333 155 us instead of 158, decoders no difference.

    Merged, in 16 bits, products are made by half the lanes of a sum, each with 16 bytes of a row: encoder_800x1333 in
    float16 350 us instead of 381, mask2former_1024 158 and 168, encoder_uniform 873 and 906.
    """
    vec, lanes, turns = lanes_of_gradient(problem, alignment, wanted.value)
    grads = {f"grad_{name}": asked for name, asked in wanted._asdict().items()}
    choices = {"warps": 4, "min_blocks": 8, "unroll": 2}
    if turns > 4:
        choices |= _MANY_TURNS
    elif not wanted.value:
        choices |= {"min_blocks": 10, "unroll": 4 if turns == 1 and problem.value_dtype != "float64" else 2}
        if problem.value_dtype in SIXTEEN_BIT:
            choices |= {"warps": 8, "min_blocks": 5}
    elif merges(problem):
        min_blocks = 5 if problem.value_dtype in SIXTEEN_BIT else 4
        merged = {"warps": 8, "min_blocks": min_blocks, "unroll": 2, "merge": MERGED_KEYS}
        rounds = max(1, MERGED_QUERIES * lanes // (8 * 32))
        joined = 2 if _joins(problem, alignment, vec, lanes) and (wanted.locations or wanted.weights) else 1
        launch = _launch(problem, "backward", vec, lanes, rounds=rounds, joined=joined, **merged, **grads)
        if launch.shared <= SHARED_WITHOUT_OPT_IN:
            return launch
    elif _warps_needed(problem, lanes) < WARPS_THAT_FILL * multiprocessors:
        choices["warps"] = 2
    return _fitting(_launch(problem, "backward", vec, lanes, rounds=1, **choices, **grads))


def _warps_needed(problem: Problem, lanes: int) -> int:
    return problem.N * problem.M * -(-problem.Q // (32 // lanes))


def _joins(problem: Problem, alignment: int, vec: int, lanes: int) -> bool:
    """Whether two rounds of queries fit side by side where products with 16-bit rows are made: half the lanes of each,
    with twice the channels, which the tensor cores take in fours.
    """
    itemsize = item_size(problem.value_dtype)
    wide = 2 * vec * itemsize == VECTOR_BYTES <= min(alignment, problem.stride_alignment)
    return itemsize == 2 and wide and lanes >= 8 and problem.D % (lanes * vec) == 0


def lanes_of_gradient(problem: Problem, alignment: int, sums: bool = True) -> tuple[int, int, int]:
    """Channels of a vector, lanes and turns in the backward.

    Where it `sums` grad_value, a lane owns 16 bytes of the float32 or float64 gradient: with 32 bytes a lane, in two
    vector reductions, the reductions ran at half the rate (H100, float16; merged, encoder_800x1333 took 546 us instead
    of 380). They are the limit where samples are not merged.
    """
    itemsize = item_size(problem.value_dtype)
    widest = VECTOR_BYTES // item_size(problem.accumulator_dtype) * itemsize if sums else VECTOR_BYTES
    vec = _vector(problem.D, itemsize, min(alignment, problem.stride_alignment, widest))
    lanes, turns = _lanes(problem.D // vec)
    return vec, 1 << (lanes - 1).bit_length(), turns  # the shuffles need a power of two


def _vector(D: int, itemsize: int, width: int) -> int:
    vec = max(1, width // itemsize)
    while D % vec:
        vec //= 2
    return vec


def _lanes(pieces: int) -> tuple[int, int]:
    """Lanes of a query and turns of a lane for a row of `pieces` vectors: as few turns as a warp allows.

    More turns of fewer lanes would leave fewer lanes idle, but each would read shorter segments, and a segment costs
    the L1 cache as much as a whole line.
    """
    turns = -(-pieces // 32)
    return -(-pieces // turns), turns


def _launch(problem: Problem, kind: str, vec: int, lanes: int, warps: int, rounds: int, **choices: Any) -> Launch:
    K, variant = problem.K, problem.variant
    # A sample's place is 16 times a row of value, and may lie a line and a pixel outside the image.
    widest = max(problem.S * 32, problem.Q * problem.M * K * 2)
    front = problem.fused
    if front:
        widest = max(widest, problem.Q * problem.M * K * 3, problem.Q * problem.L * 4)
        choices |= front_axes(problem)
    index_64 = widest >= 2**31
    entry = sample_bytes(index_64, problem.accumulator_dtype)
    together = lanes * choices.get("split", 1)
    held = MAX_FILLS * together
    if choices.get("screened") and together >= 4:  # fewer lanes have more queries a warp, which take shared memory
        held = max(held, MAX_UNROLLED)
    most = max(1, min(WARP_SHARED_BUDGET // (32 // together * entry) - 1, held))
    chunk = K if front else -(-K // -(-K // most))
    if front:  # the softmax needs all samples of a query at once, however many
        while warps > 1 and warps * rounds * (32 // together) * (chunk | 1) * entry > FRONT_BYTES:
            warps //= 2
        if chunk > most:
            choices["min_blocks"] = 1
    if chunk < K or problem.L > 32:
        choices.pop("screened", None)
    key = KernelKey(
        kind,
        problem.value_dtype,
        problem.location_dtype,
        index_64,
        problem.L,
        problem.P,
        problem.M,
        problem.D,
        vec,
        lanes,
        chunk,
        warps,
        rounds,
        band=BAND if problem.Q == problem.S and problem.Q <= MAX_IN_BANDS and problem.L <= 32 else 0,
        levels_on_device=not levels_by_value(problem),
        points=variant.num_points or (),
        nearest=variant.nearest,
        border=variant.padding_mode == "border",
        align_corners=variant.align_corners,
        stride=problem.strides.pixel,
        padded=problem.ragged,
        pixels=front is not None,
        **choices,
    )
    return launch_of(problem, key)


def launch_of(problem: Problem, key: KernelKey, multiprocessors: int = 132) -> Launch:
    """Launch of a kernel whose blocks take queries of `key.heads` heads of an image."""
    heads = problem.N * problem.M // key.heads
    blocks = -(-problem.Q // (key.warps * key.rounds * key.queries))
    rows = heads + _heads_at_the_end(key, heads, blocks, multiprocessors) * (key.rounds - 1)
    along_y = min(rows, MAX_GRID_Y)
    return Launch(key, (blocks, along_y, -(-rows // along_y)), 32 * key.warps, shared_bytes(key))


def _heads_at_the_end(key: KernelKey, heads: int, blocks: int, multiprocessors: int) -> int:
    """Heads whose queries are taken in blocks of one round instead of `key.rounds`, `blocks` a head.

    So many that these blocks are about a wave, all that the GPU holds at a time: then multiprocessors end at about the
    same time. encoder_800x1333 in float32 on an H100: 141.0 us with one to three of its 16 heads, 142.5 with none or
    five; mask2former_1024 59.5 with two of 8, 61.9 with none, 60.7 with four.
    """
    if key.kind != "forward" or key.rounds == 1:
        return 0
    return min(heads, max(1, round(key.min_blocks * multiprocessors / blocks)))


def front_axes(problem: Problem) -> dict[str, Any]:
    """Axes of the kernels that read offsets and logits."""
    front = problem.fused
    if front is None:
        return {}
    return {
        "front": front.coordinates, "references": front.levels, "reference_dtype": front.dtype, "packed": front.packed,
    }  # fmt: skip


def _fitting(launch: Launch) -> Launch:
    if launch.key.front and launch.shared > SHARED_WITHOUT_OPT_IN:
        raise NotImplementedError(
            f"sampling_offsets: expected fewer samples a query and head than L*P = {launch.key.K} on a GPU, where they "
            f"are in shared memory together for their softmax; ms_deform_attn takes any number"
        )
    return launch


def expand(problem: Problem) -> Launch:
    """Launch of the kernel that turns offsets and logits into locations, in pixels, and weights."""
    lanes = min(32, 1 << (problem.K - 1).bit_length())
    alone = replace(problem, D=1, value_strides=None)
    launch = _fitting(_launch(alone, "expand", 1, lanes, warps=8, rounds=1, min_blocks=1, unroll=1))
    return replace(launch, key=replace(launch.key, band=0))


def sum_references(problem: Problem) -> Launch:
    """Launch of the kernel that sums the gradient of reference points over heads."""
    front = problem.fused
    assert front is not None
    key = KernelKey(
        "references", problem.value_dtype, problem.location_dtype, False, problem.L, 1, problem.M, 1, 1, 1, 1, 8, 1, 1,
        1, 0, False, front=front.coordinates, references=front.levels, reference_dtype=front.dtype,
    )  # fmt: skip
    count = problem.N * problem.Q * front.levels * front.coordinates
    return Launch(key, (max(1, min(-(-count // 256), 1 << 16)), 1, 1), 256, 0)


def sample_bytes(index_64: bool, accumulator_dtype: str) -> int:
    """Size of the kernels' `msda_sample`."""
    accumulator = item_size(accumulator_dtype)
    index = max(8 if index_64 else 4, accumulator)  # padded to the alignment of what follows
    return -(-(index + 3 * accumulator) // 16) * 16


def shared_bytes(key: KernelKey) -> int:
    """Size of the kernels' `msda_shared`, `msda_chunk` (of the sum), `msda_tile` (of each warp that adds) or counts."""
    accumulator = item_size(accumulator_of(key.value_dtype))
    if key.kind == "sum":
        keys, numbers = key.rows + 1, (key.rows + 2) * (1 + key.warps) + key.warps + 3 * 32 * key.warps
        partial = (keys + key.warps * key.queries) * 2 * key.lanes * key.vec
        of_chunk = (4 * key.chunk + partial) * accumulator + -(-4 * numbers // 8) * 8 + 2 * 8
        return -(-(of_chunk + 1) // 16) * 16
    if key.kind == "count":
        return 8 * 32 * key.warps
    if key.kind == "add":
        step = key.lanes * key.vec
        sums = key.rows * -(-key.D // step) * step * accumulator
        return key.warps * (32 * 4 * accumulator + -(-sums // 16) * 16)
    held = key.warps * (key.rounds if key.merge else 1) * key.queries * key.heads
    samples = held * (key.chunk | 1) * sample_bytes(key.index_64, accumulator_of(key.value_dtype))
    index = 8 if key.index_64 else 4
    queries = 0 if key.alone else key.rounds * key.warps * key.queries * index
    copies = 0 if key.levels_in_registers else key.warps if key.alone else 1
    size = -(-(samples + copies * key.L * LEVEL_BYTES + queries) // 16) * 16
    merging = (4 << key.merge) + 4 * key.warps + 2 * held * key.chunk if key.merge else 0
    return size + -(-merging // 16) * 16


def round_gradient(value_dtype: str, count: int) -> Launch:
    """Launch of the kernel that rounds a float32 gradient of `count` elements to a 16-bit dtype."""
    assert value_dtype in SIXTEEN_BIT
    key = KernelKey("round", value_dtype, "float32", False, 1, 1, 1, 1, 1, 1, 1, 8, 1, 1, 1, 0, False)
    return Launch(key, (max(1, min(-(-count // 1024), 1 << 16)), 1, 1), 256, 0)
