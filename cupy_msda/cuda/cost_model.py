"""Which way to sum the gradient of value takes the least time: a pure function of the problem.

The time of a way is a sum of parts: launches, elements of the gradient, samples, and channels of samples. What each
part costs is measured once and stands here; docs/performance/decisions.md#backward-cost-model says on which calls, and
how far the estimates are off. Only their order matters, so one set of costs serves all architectures.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ..call import SIXTEEN_BIT, Problem
from . import sorted_heuristics
from .index_width import UNSIGNED
from .lanes import backward_channels

Way = Literal["sorted", "atomics", "aggregated"]

# Channels that `Costs.channels` is for: those of a lane group of eight lanes.
_CHANNELS = 32
# Bytes of float32 sums that the L2 cache holds while samples are added.
_CACHED_BYTES = 50e6


@dataclass(frozen=True)
class Costs:
    """Nanoseconds of a call, of a thousand bytes of the gradient in its own dtype, in float32, and for its cast, and
    of a thousand samples: whatever their channels, for 32 channels, and for those again where the sums of one sample
    are not in the L2 cache any more.
    """

    call: float
    value_bytes: float
    float32_bytes: float
    cast_bytes: float
    samples: float
    channels: float
    uncached: float


_ATOMICS = Costs(7400, 0, 0.275, 0.35, 27, 121, 80)
# Where queries are pixels, those of a block sample the same part of the image.
_AGGREGATED_PIXELS = Costs(13000, 0, 0.336, 0.29, 30, 37, 130)
_AGGREGATED_QUERIES = Costs(13000, 0, 0.336, 0.29, 30, 97, 130)
_SORTED = Costs(11600, 0.30, 0, 0, 92, 48, 0)
# Samples of every slab after the first are sorted again.
_SLAB_SAMPLES = 30


def estimates(problem: Problem) -> dict[Way, float]:
    """Estimated nanoseconds of each way that can do the problem."""
    aggregated = _AGGREGATED_PIXELS if problem.Q == problem.S else _AGGREGATED_QUERIES
    found: dict[Way, float] = {"atomics": _time(_ATOMICS, problem), "aggregated": _time(aggregated, problem)}
    if sorted_heuristics.contributions_of_head(problem) < 2**UNSIGNED // 2:
        slabs = sorted_heuristics.slabs(problem)
        samples = problem.N * problem.Q * problem.M * problem.K / 1000
        found["sorted"] = _time(_SORTED, problem) + (slabs - 1) * _SLAB_SAMPLES * samples
    return found


def _time(costs: Costs, problem: Problem) -> float:
    narrow = problem.value_dtype in SIXTEEN_BIT
    elements = problem.N * problem.S * problem.M * problem.D / 1000
    samples = problem.N * problem.Q * problem.M * problem.K / 1000
    channels = backward_channels(problem, 16, True).padded_channels / _CHANNELS * len(problem.variant.neighbours) / 2
    uncached = max(0.0, 1 - _CACHED_BYTES / max(1.0, 4000 * elements))
    # With several samples per value vector, most find its sum in the cache.
    uncached *= min(1.0, problem.S / max(1, problem.Q * problem.K))
    return (
        costs.call
        + costs.value_bytes * elements * (2 if narrow else 4)
        + costs.float32_bytes * elements * 4
        + costs.cast_bytes * elements * 4 * narrow
        + (costs.samples + (costs.channels + costs.uncached * uncached) * channels) * samples
    )


def fastest_way(problem: Problem) -> Way:
    """The way with the lowest estimate."""
    found = estimates(problem)
    return min(found, key=found.__getitem__)
