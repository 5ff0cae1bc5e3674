"""The search for the fastest configuration of a kernel, or way of a backward: pure, given what measures."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from ..gpu import Gpu
from ..tuning.tuned import ORDERED, Axes
from . import candidates

# A configuration takes the place of the default if it takes so much less time, in parts and in microseconds, in a
# comparison of the two. Less than that is within the noise of another run.
GAIN, GAIN_US = 0.02, 0.1
# A way to sum the gradient of value must be better by more: how fast it is depends on where samples lie.
_GAIN_OF_WAY = 0.1
# So many of the fastest configurations are compared with the default.
_FINALISTS = 3

#: The microseconds of each configuration, or None for one that cannot run, is none of its own, or has no time left.
Measure = Callable[[Sequence[Axes]], Sequence[float | None]]
#: The microseconds of the default and of a configuration, measured in turn; None where its results are wrong.
Compare = Callable[[Axes], tuple[float, float] | None]


class Outcome(NamedTuple):
    """The fastest configuration, without axes where it is the default; its time and that of the default."""

    axes: Axes
    default_us: float
    tuned_us: float


class Search:
    """Measures the configurations of one kernel; :meth:`best` may then be asked several times."""

    def __init__(self, name: str, default: Axes, gpu: Gpu, measure: Measure) -> None:
        self.name, self.default, self._measure = name, default, measure
        self.times: dict[tuple[tuple[str, int | str], ...], float] = {}
        self._add(candidates.first(name, default, gpu))
        if self.times:
            self._add(candidates.second(name, self.times, gpu))

    def _add(self, asked: Sequence[Axes]) -> None:
        for axes, time in zip(asked, self._measure(asked), strict=True):
            if time is not None:
                self.times[candidates.frozen(axes)] = time

    def best(self, compare: Compare, *, in_order: bool, elsewhere: Compare | None = None) -> Outcome | None:
        """The fastest configuration, compared with the default; None where the default has no time.

        `in_order`: among those that leave the order of all sums as it is. `elsewhere`: the comparison for other inputs,
        where it may not be slower than the default.
        """
        default = candidates.frozen(self.default)
        if default not in self.times:
            return None
        fixed = ORDERED.get(self.name, ()) if in_order else ()
        ranked = [dict(key) for key in sorted(self.times, key=self.times.__getitem__)]
        ranked = [axes for axes in ranked if all(axes.get(axis) == self.default.get(axis) for axis in fixed)]
        gain = _GAIN_OF_WAY if self.name == "grad_value" else GAIN
        best = Outcome({}, self.times[default], self.times[default])
        for axes in ranked[:_FINALISTS]:
            if candidates.frozen(axes) == default:
                continue
            found = compare(axes)
            if found is None:
                continue
            default_us, tuned_us = found
            faster = tuned_us < default_us * (1 - gain) - GAIN_US
            if faster and tuned_us / default_us < best.tuned_us / best.default_us and not _slower(elsewhere, axes):
                kept = {axis: value for axis, value in axes.items() if axis not in fixed}
                best = Outcome(kept, default_us, tuned_us)
        return best


def _slower(compare: Compare | None, axes: Axes) -> bool:
    """Whether a configuration is slower than the default, or wrong, in a comparison."""
    if compare is None:
        return False
    found = compare(axes)
    return found is None or found[1] > found[0] * (1 + GAIN) + GAIN_US
