"""What is tuned of a problem, and the launches of each configuration: pure functions of the plan."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

from ...call import Problem, Wanted
from .. import plan, plan_backward
from ..axes import VECTOR_BYTES
from ..gpu import Gpu
from ..plan_backward import Backward
from ..specs import BackwardSpec
from ..tuning.tuned import Axes, Choices, Entry, measured_of, subject_of
from . import candidates


class Target(NamedTuple):
    """What is tuned: the subject `name` of a problem, in a call that computes these gradients; None for a forward."""

    name: str
    wanted: Wanted | None


def targets_of(problem: Problem, wanted: Wanted | None) -> list[Target]:
    """What a call consists of, the choice between ways last: it depends on the kernels."""
    if wanted is None:
        return [Target("forward", None)]
    wanted = problem.computed(wanted)
    found = []
    if wanted.samples:
        found.append(Target("samples", wanted._replace(value=False)))
    if wanted.value:
        of_value = Wanted(value=True, locations=False, weights=False)
        found += [Target(name, of_value) for name in ("bucket_sort", "reduce_buckets")]
        found += [Target(name, wanted) for name in ("atomics", "aggregated", "grad_value")]
    return found


@dataclass(frozen=True)
class Candidate:
    """A target with a configuration: what is launched. `launches` are equal where the configurations make none."""

    target: Target
    gpu: Gpu
    launches: tuple[plan.Launch, ...]


class Planner:
    """Plans the candidates of a problem. `choices` has what was found so far."""

    def __init__(self, problem: Problem, on: Gpu) -> None:
        self.problem, self._on, self.choices = problem, on.untuned, Choices()

    def entry(self, target: Target, axes: Axes, default_us: float = 1.0, tuned_us: float = 1.0) -> Entry:
        """An entry for a target."""
        subject = subject_of(target.name, self.problem, target.wanted)
        return Entry(subject, measured_of(self.problem), axes, default_us, tuned_us)

    def candidate(self, target: Target, axes: Axes | None) -> Candidate:
        """A candidate; its default where `axes` is None."""
        choices = self.choices
        forced = {"bucket_sort": "sorted", "reduce_buckets": "sorted"}.get(target.name, target.name)
        if forced in ("sorted", "atomics", "aggregated"):
            choices = choices.with_entry(self.entry(Target("grad_value", target.wanted), {"way": forced}))
        if axes is not None:
            choices = choices.with_entry(self.entry(target, axes))
        on = replace(self._on, choices=choices)
        if target.wanted is None:
            return Candidate(target, on, plan.forward(self.problem, VECTOR_BYTES, on).launches)
        return Candidate(target, on, self._backward(on, target.wanted).launches)

    def default_axes(self, target: Target) -> Axes | None:
        """The axes of the default, or None where the target is not possible."""
        default = self.candidate(target, None)
        if target.name == "grad_value":
            assert target.wanted is not None
            return {"way": way_of(self._backward(default.gpu, target.wanted))}
        kernel = "backward" if target.name in ("samples", "atomics", "aggregated") else target.name
        spec = next((launch.spec for launch in default.launches if launch.spec.kernel == kernel), None)
        if spec is None or (isinstance(spec, BackwardSpec) and bool(spec.aggregation_bits) != _aggregates(target)):
            return None
        return candidates.default_of(target.name, spec)

    def _backward(self, on: Gpu, wanted: Wanted) -> Backward:
        return plan_backward.backward(self.problem, VECTOR_BYTES, on, wanted)


def _aggregates(target: Target) -> bool:
    return target.name == "aggregated"


def way_of(planned: Backward) -> str:
    """The way in which a backward sums the gradient of value."""
    if planned.summation:
        return "sorted"
    spec = planned.atomics.spec if planned.atomics else None
    return "aggregated" if isinstance(spec, BackwardSpec) and spec.aggregation_bits else "atomics"
