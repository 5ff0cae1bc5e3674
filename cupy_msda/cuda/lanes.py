"""How the lanes of a warp divide the channels and samples of a query: pure functions, as in ``heuristics.py``.

`alignment` is the bytes, a power of two, that all value-like addresses are multiples of.
"""

from __future__ import annotations

import math

from ..arrays import item_size
from ..call import Problem
from .axes import VECTOR_BYTES, ChannelAxes
from .launch_tables import ForwardEntry

# Samples of a query that a lane group has, at least, where it shares them with others.
# docs/performance/decisions.md#forward-lane-groups
SAMPLES_PER_LANE_GROUP = 4
# Samples that a lane holds in registers between loading and preparing them.
MAX_SAMPLES_PER_LANE = 4
# Bytes that the L1 cache delivers per clock, if they lie in different parts of their lines.
LINE_BYTES = 128
MAX_HEADS_PER_WARP = 4


def forward_channels(problem: Problem, alignment: int) -> ChannelAxes:
    """A lane moves as many bytes at a time as the addresses allow."""
    vec = _vector(problem, min(alignment, problem.stride_alignment, VECTOR_BYTES))
    return _channel_axes(problem, vec)


def backward_channels(problem: Problem, alignment: int, sums: bool) -> ChannelAxes:
    """Where the kernel `sums` grad_value, a lane holds 16 bytes of the float32 or float64 gradient.

    Wider lanes make two vector reductions each. Without sums, a fused call has so many lanes that their registers hold
    all samples of the query.
    docs/performance/decisions.md#backward-gradient-vector-width
    docs/performance/decisions.md#fused-lanes-for-the-softmax
    """
    widest = VECTOR_BYTES
    if sums:
        widest = VECTOR_BYTES // item_size(problem.accumulator_dtype) * item_size(problem.value_dtype)
    vec = _vector(problem, min(alignment, problem.stride_alignment, widest))
    channels = _power_of_two_lanes(problem, vec)
    if problem.fused and not sums:
        while channels.vec > 1 and channels.lanes < 32 and MAX_SAMPLES_PER_LANE * channels.lanes < problem.K:
            channels = _power_of_two_lanes(problem, channels.vec // 2)
    return channels


def _power_of_two_lanes(problem: Problem, vec: int) -> ChannelAxes:
    """As the shuffles of the backward need them."""
    channels = _channel_axes(problem, vec)
    return channels.with_axes(lanes=1 << (channels.lanes - 1).bit_length())


def _vector(problem: Problem, width: int) -> int:
    vec = max(1, width // item_size(problem.value_dtype))
    while problem.D % vec:
        vec //= 2
    return vec


def _channel_axes(problem: Problem, vec: int) -> ChannelAxes:
    """As few channel tiles as a warp allows.

    More tiles of fewer lanes would leave fewer lanes idle. But each lane group would read shorter segments, and a
    segment costs the L1 cache as much as a whole line.
    """
    vectors = problem.D // vec
    lanes = -(-vectors // -(-vectors // 32))
    return ChannelAxes(value_dtype=problem.value_dtype, M=problem.M, D=problem.D, vec=vec, lanes=lanes)


def warps_needed(problem: Problem, lanes: int) -> int:
    """Warps that the queries of all heads fill."""
    return problem.N * problem.M * -(-problem.Q // (32 // lanes))


def heads_per_warp(problem: Problem, lanes: int) -> int:
    """Heads whose value vectors of a pixel are one cache line, up to as many as a warp has `lanes` lanes for.

    All vectors of one head lie in the same part of their lines, and the cache delivers one such part per clock.
    docs/performance/decisions.md#forward-heads-per-warp
    """
    row = problem.D * item_size(problem.value_dtype)
    if LINE_BYTES % row or problem.strides.head != problem.D:
        return 1
    return math.gcd(problem.M, min(LINE_BYTES // row, MAX_HEADS_PER_WARP, 1 << (32 // lanes).bit_length() - 1))


def lane_groups(entry: ForwardEntry, lanes: int, problem: Problem) -> int:
    """Groups of `lanes` lanes that share the samples of a query, where each has several.

    In a fused call there are so many that their registers hold all samples of the query.
    docs/performance/decisions.md#fused-lanes-for-the-softmax
    """
    if lanes & (lanes - 1):
        return 1  # the shuffles that add up their sums need a power of two
    most = max(1, problem.K // SAMPLES_PER_LANE_GROUP)
    groups = max(1, min(entry.lanes_per_query // lanes, 1 << (most.bit_length() - 1)))
    while problem.fused and groups * lanes < 32 and MAX_SAMPLES_PER_LANE * groups * lanes < problem.K:
        groups *= 2
    return groups
