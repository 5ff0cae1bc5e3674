"""For each specialisation of the budget a small call that the planner gives it to: what compute-sanitizer runs.

The planner also chooses by sizes that make a call large. :func:`force` decides in its place there.
"""

import functools
from dataclasses import dataclass, replace
from typing import Any

import pytest

from cupy_msda.call import PLAIN, Problem, Wanted, contiguous_starts
from cupy_msda.cuda import cost_model, gpu, heuristics, naive, plan, plan_backward, run, session, sorted_heuristics
from tests.helpers import emulator, specialisations
from tests.helpers.specialisations import gpu_of, launches_of

ARCHITECTURE = 90
# (H, W) of the first level; each further one has half of both. Casts of offsets to 16 bits are good for no larger ones.
FIRST_LEVELS = ((4, 5), (8, 6), (13, 10), (20, 17), (32, 30))
QUERIES = (3, 5, 9, 17, 33, 65, 129, 257)
# An H100 has few queries for its size where a GPU of one multiprocessor has many.
MULTIPROCESSORS = (gpu.H100.multiprocessors, 1)
# Samples of a call, if there is one with so few: the reference takes seconds for them.
MAX_SAMPLES = 70_000
# What the rows of kernels that depend on dtypes alone leave open.
OTHER_ROW = {
    "D": 3, "alignment": 16, "points": (4, 4), "queries": "few", "levels": "on the host", "size": "32 bits",
    "layout": "contiguous", "front": "none", "variant": "plain",
}  # fmt: skip


@dataclass(frozen=True)
class SmallCall:
    """A call of a row: levels of (H, W) and a GPU. `forward` and `wanted`, where it is not None, say what runs."""

    row: dict[str, Any]
    problem: Problem
    levels: tuple[tuple[int, int], ...]
    gpu: gpu.Gpu
    forward: bool
    wanted: Wanted | None

    @property
    def samples(self) -> int:
        problem = self.problem
        return problem.N * problem.M * problem.Q * problem.K

    @property
    def variant(self) -> dict[str, Any]:
        """The options of the operator."""
        found = self.problem.variant._asdict()
        return {name: option for name, option in found.items() if option != getattr(PLAIN, name)}

    @property
    def lengths(self) -> tuple[int, int] | None:
        """Queries of each image that are no padding."""
        return (self.problem.Q - 1, self.problem.Q // 2) if self.problem.ragged else None

    def launches(self) -> list[plan.Launch]:
        """What the planner answers."""
        problem, alignment = self.problem, self.row["alignment"]
        if "naive" in self.row:
            return [plan.over_elements(spec, self.samples) for spec in naive.specs(problem).values()]
        found = [plan.forward(problem, alignment, self.gpu)] if self.forward else []
        if self.wanted:
            found += plan_backward.backward(problem, alignment, self.gpu, problem.computed(self.wanted)).launches
        return found


@functools.cache
def specs_by_row():
    """Every distinct specialisation of the budget, by the first row that has it: pairs of a row and its own ones."""
    seen, found = set(), []
    for row in specialisations.budgeted_rows():
        specs = {launch.spec for launch in launches_of(row, gpu_of(ARCHITECTURE)).values()} - seen
        if specs:
            found.append((row, specs))
        seen |= specs
    return found


def force(monkeypatch, row, specs):
    """Make the planner choose what it chooses for sizes that make a call large."""
    monkeypatch.setattr(run, "_prepared", {})
    if "naive" in row:
        monkeypatch.setenv("CUPY_MSDA_KERNELS", "naive")
    if row.get("alignment", 16) < 16:
        # Contiguous arrays at such addresses would be copied to better ones.
        monkeypatch.setattr(session, "_contiguous", lambda view: view)
    if row.get("size") == "64 bits":
        emulator.force_wide_index(monkeypatch, True)
        # So many pixels are not taken by tiles.
        monkeypatch.setattr(heuristics, "MAX_TILED_QUERIES", 0)
    # As the budget: whatever is faster at a small size.
    monkeypatch.setattr(cost_model, "fastest_way", lambda call: "aggregated" if emulator.is_dense(call) else "atomics")
    # Small buckets have several chunks then.
    monkeypatch.setattr(sorted_heuristics, "SMALLEST_CHUNK", 64)
    chunks = {spec.chunk for spec in specs if spec.kernel == "bucket_sort"}
    if chunks:
        sort, chunk = sorted_heuristics.bucket_sort, chunks.pop()
        monkeypatch.setattr(sorted_heuristics, "bucket_sort", lambda *problem: sort(*problem).with_axes(chunk=chunk))


def smallest(row, specs):
    """A call that reaches these specialisations of a row, with more than a block for each head if that is small.

    None where there is no such call.
    """
    with pytest.MonkeyPatch.context() as monkeypatch:
        force(monkeypatch, row, specs)
        answers = [(call, call.launches()) for call in calls(row)]
    found = [(call, fills(call, launches[0])) for call, launches in answers if specs <= {one.spec for one in launches}]
    small = [one for one in found if one[0].samples <= MAX_SAMPLES] or found[:1]
    return next((call for call, filled in small if filled), small[-1][0] if small else None)


def fills(call, launch):
    """Whether a head has more than a block."""
    heads = call.problem.N * call.problem.M
    return launch.grid[0] > (heads if launch.spec.kernel == "bucket_sort" else 1)


def calls(row):
    """Calls of a row on several sizes, the smallest first."""
    of = axes_of(row)
    base = specialisations.problem_of(of)
    found = []
    for first in FIRST_LEVELS:
        levels = tuple(tuple(max(1, side >> level) for side in first) for level in range(base.L))
        S = sum(h * w for h, w in levels)
        for Q in [S] if of["queries"] == "pixels" else QUERIES:
            found += [_call(of | row, replace(base, S=S, Q=Q), levels, number) for number in MULTIPROCESSORS]
    return sorted(found, key=lambda call: (call.samples, call.problem.S))


def axes_of(row):
    """A value for each axis of a problem; for the kernels that depend on dtypes alone too."""
    if "value" in row:
        return OTHER_ROW | {"pair": (row["value"],) * 2, "wanted": "value"}
    if "naive" in row:
        return OTHER_ROW | {"pair": row["naive"], "wanted": "value, locations, weights", "front": "boxes, packed"}
    return row


def _call(row, problem, levels, multiprocessors):
    on_host = row["levels"] == "on the host"
    with_starts = tuple((*level, start) for level, start in zip(levels, contiguous_starts(levels), strict=True))
    strides = problem.value_strides
    problem = replace(
        problem,
        levels=with_starts if on_host else None,
        deterministic="in order" in row["wanted"],
        value_strides=strides and strides._replace(image=problem.S * strides.pixel),
    )
    wanted = None
    if problem.deterministic:
        wanted = Wanted(True, False, False)
    elif row["wanted"] != "output":
        wanted = specialisations.gradients_of(row)
    on = replace(gpu_of(ARCHITECTURE), multiprocessors=multiprocessors)
    return SmallCall(row, problem, levels, on, wanted is None or "naive" in row, wanted)
