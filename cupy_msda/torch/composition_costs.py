"""What a call costs by torch's own functions and by NumPy, estimated from its sizes alone.

The number of threads has no part, so that the same call always has the same bits.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Literal, NamedTuple

from ..call import SIXTEEN_BIT, Problem, Wanted
from ..cpu.tasks import ONE_TASK_SAMPLES

# A call by torch's own functions: embedding_bag or grid_sample.
Way = Literal["bags", "grid_sample"]


def sampled_elements(problem: Problem) -> int:
    """D channels of each sample."""
    return problem.N * problem.Q * problem.M * problem.K * problem.D


class _Sizes(NamedTuple):
    """What the time of a call is linear in; or nanoseconds of each."""

    calls: float
    levels: float
    fused_calls: float
    # Calls that NumPy's threads share, and samples of calls that they do not.
    shared_calls: float
    unshared_samples: float
    samples: float
    # Elements that are sampled, D channels of each sample; those in float64, and those of one image with many heads,
    # whose channels are together: grid_sample takes channel after channel.
    sampled: float
    wide_sampled: float
    strided_sampled: float
    # Elements of value; those that grid_sample needs in another order, and those that are cast.
    value: float
    copied: float
    cast: float

    @classmethod
    def of(cls, problem: Problem) -> _Sizes:
        value, samples = problem.N * problem.S * problem.M * problem.D, problem.N * problem.Q * problem.M * problem.K
        sampled, shared = sampled_elements(problem), samples > ONE_TASK_SAMPLES
        return cls(
            calls=1, levels=problem.L, fused_calls=problem.fused is not None,
            shared_calls=shared, unshared_samples=0 if shared else samples, samples=samples,
            sampled=sampled, wide_sampled=sampled if problem.value_dtype == "float64" else 0,
            strided_sampled=sampled if problem.N == 1 and problem.M > 1 else 0,
            value=value, copied=value if problem.N > 1 and problem.M > 1 else 0,
            cast=value if problem.value_dtype in SIXTEEN_BIT else 0,
        )  # fmt: skip

    def times(self, costs: _Sizes) -> float:
        """Nanoseconds of a call of these sizes."""
        return sum(map(operator.mul, self, costs))


# Of the output alone, and of the output and gradients, on two threads (docs/performance/decisions.md#cpu-composition).
_COSTS: dict[str, dict[str, _Sizes]] = {
    "forward": {
        "bags": _Sizes(6.4e5, 0, 3e5, 0, 0, 50, 0.4, 6.4, 0, 0.005, 0, 0.42),
        "grid_sample": _Sizes(3.2e5, 1.6e4, 2.5e5, 0, 0, 6.5, 4.7, 2.6, 4.1, 0.021, 2.4, 0.47),
        "numpy": _Sizes(4.1e5, 0, 3.2e5, 2.1e6, 69, 83, 1.4, 0, 0, 0.14, 0, 0.21),
    },
    "all": {
        "bags": _Sizes(2.5e6, 0, 0, 0, 0, 2e2, 1.8, 15, 0, 1, 0, 1.3),
        "grid_sample": _Sizes(1e6, 2.6e5, 2.1e5, 0, 0, 64, 17, 1.2, 22, 3.1, 4.5, 0.96),
        "numpy": _Sizes(2.1e6, 0, 0, 1.3e7, 6.6e2, 3.1e2, 2.8, 0, 0, 1.4, 0, 11),
    },
    "value": {
        "bags": _Sizes(1.8e6, 5e3, 4.5e5, 0, 0, 1.4e2, 0.24, 9.3, 0, 0.78, 0, 0.52),
        "grid_sample": _Sizes(3e5, 3.7e5, 6.6e5, 0, 0, 27, 14, 0, 8.7, 3.4, 3.4, 1.5),
        "numpy": _Sizes(1.2e6, 0, 1.7e6, 6.2e6, 6e2, 2.4e2, 1.2, 0, 0, 1.8, 0, 8.7),
    },
    "locations": {
        "bags": _Sizes(1.5e6, 0, 7.3e5, 0, 0, 1.3e2, 0, 4.1, 0, 0.049, 0, 1.4),
        "grid_sample": _Sizes(1.2e6, 1.6e5, 6.9e5, 0, 0, 58, 7.5, 6.2, 13, 0, 3, 0.37),
        "numpy": _Sizes(1.4e6, 0, 7.3e5, 7.3e6, 6.1e2, 2.3e2, 3, 0, 0, 0.54, 0, 0),
    },
    "weights": {
        "bags": _Sizes(1.4e6, 0, 5.9e5, 0, 0, 83, 1.4, 11, 0, 0.058, 0, 1.4),
        "grid_sample": _Sizes(9.4e5, 0, 3.5e5, 0, 0, 20, 5.6, 2.8, 6.4, 0, 2.1, 0.53),
        "numpy": _Sizes(2e6, 0, 8.6e5, 7.3e6, 4.5e2, 2.2e2, 3.4, 0, 0, 0.83, 0, 0.52),
    },
}


def cheapest(problem: Problem, wanted: Wanted | None, ways: Sequence[Way]) -> Way | None:
    """That of `ways` which is estimated to compute the output and the gradients that are wanted first; None: NumPy."""
    sizes, costs = _Sizes.of(problem), _COSTS[_kind(wanted)]
    return min((None, *ways), key=lambda way: sizes.times(costs[way or "numpy"]))


def _kind(wanted: Wanted | None) -> str:
    if not wanted:
        return "forward"
    if wanted.value:
        return "all" if wanted.samples else "value"
    return "locations" if wanted.locations or wanted.references else "weights"
