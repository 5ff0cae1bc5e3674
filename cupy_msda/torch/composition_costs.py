"""What a call costs by torch's ``grid_sample`` and by NumPy, estimated from its sizes alone.

The number of threads has no part, so that the same call always has the same bits.
"""

from __future__ import annotations

import operator
from typing import NamedTuple

from ..call import SIXTEEN_BIT, Problem, Wanted
from ..cpu.tasks import ONE_TASK_SAMPLES


def sampled_elements(problem: Problem) -> int:
    """D channels of each sample."""
    return problem.N * problem.Q * problem.M * problem.K * problem.D


class Costs(NamedTuple):
    """Estimated nanoseconds of a composition and of NumPy, on two threads."""

    composition: float
    numpy: float

    @property
    def composition_is_faster(self) -> bool:
        return self.composition < self.numpy


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


# Of a composition and of NumPy: of the output alone, and of the output and gradients
# (docs/performance/decisions.md#cpu-composition).
_COSTS = {
    "forward": (
        _Sizes(2.1e5, 7.9e4, 2.5e5, 0, 0, 5.5, 6.1, 4.4, 4.4, 0.081, 2.8, 0.46),
        _Sizes(4.4e5, 0, 0, 2.4e6, 96, 110, 1.5, 0, 0, 0.3, 0, 0),
    ),
    "all": (
        _Sizes(4.3e5, 6.7e5, 1.7e5, 0, 0, 51, 21, 12, 30, 7.3, 5.3, 0),
        _Sizes(2.9e6, 0, 0, 7.4e6, 540, 360, 5, 0, 0, 5.1, 0, 7.6),
    ),
    "value": (
        _Sizes(6.8e5, 2.8e5, 1.5e5, 0, 0, 27, 16, 12, 9.6, 4.6, 3.4, 0.86),
        _Sizes(1.9e6, 0, 0, 1.1e7, 630, 300, 5.5, 0, 0, 2.4, 0, 6.6),
    ),
    "locations": (
        _Sizes(1.1e6, 1.8e5, 3.8e5, 0, 0, 47, 14, 13, 19, 0.2, 3.5, 1.3),
        _Sizes(2.1e6, 0, 0, 3.1e6, 620, 450, 1.5, 0, 0, 0.76, 0, 0.35),
    ),
    "weights": (
        _Sizes(6.6e5, 1.1e5, 4.9e5, 0, 0, 18, 7.4, 5.8, 0, 0.12, 3.5, 0.19),
        _Sizes(2e6, 0, 0, 8.2e6, 620, 320, 1.2, 0, 0, 1.2, 0, 0),
    ),
}


def forward_costs(problem: Problem) -> Costs:
    """What the output costs, without a gradient to record."""
    return _estimated(problem, "forward")


def training_costs(problem: Problem, wanted: Wanted) -> Costs:
    """What the output and the gradients that are wanted cost."""
    if wanted.value:
        return _estimated(problem, "all" if wanted.samples else "value")
    return _estimated(problem, "locations" if wanted.locations or wanted.references else "weights")


def _estimated(problem: Problem, kind: str) -> Costs:
    sizes = _Sizes.of(problem)
    return Costs(*(sizes.times(costs) for costs in _COSTS[kind]))
