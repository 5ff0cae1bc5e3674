"""The search finds what is faster, repairs a bad default, and never ends with anything slower than the default."""

import random
from dataclasses import replace

import numpy as np
import pytest

from cupy_msda.call import ALL, FusedFrontEnd, Problem
from cupy_msda.cuda import launch_tables, plan
from cupy_msda.cuda.gpu import ARCHITECTURES, H100
from cupy_msda.cuda.tuner import candidates
from cupy_msda.cuda.tuner.inputs import Inputs, levels_of
from cupy_msda.cuda.tuner.search import GAIN, Search
from cupy_msda.cuda.tuner.targets import Planner, targets_of
from cupy_msda.cuda.tuning.tuned import AXES, ORDERED
from tests.helpers import drawn_entries

ENCODER = Problem(2, 22223, 8, 32, 4, 4, 22223, "float32", "float32", ("cuda", 0), None)
DECODER = replace(ENCODER, Q=900)
NAMES = [name for name in AXES if name != "grad_value"]


def default_of(pick, name):
    return drawn_entries.axes_of(pick, name) | {"min_blocks": 2} | ({"warps": 4} if "warps" in AXES[name] else {})


def drawn_times(seed):
    """A time for every configuration, the same whenever it is asked for."""
    return lambda axes: 10 + 10 * random.Random(repr((seed, candidates.frozen(axes)))).random()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("in_order", [False, True])
@pytest.mark.parametrize("seed", range(12))
def test_what_is_found_is_not_slower_than_the_default(name, in_order, seed):
    time, default = drawn_times(seed), default_of(random.Random(seed), name)
    search = Search(name, default, H100, lambda asked: [time(axes) for axes in asked])
    best = search.best(lambda axes: (time(default), time(axes)), in_order=in_order)
    assert best.default_us == time(default)
    if best.axes:
        fixed = {axis: default[axis] for axis in ORDERED.get(name, ()) if in_order and axis in default}
        assert not fixed.keys() & best.axes.keys()
        assert best.tuned_us == time(best.axes | fixed) < (1 - GAIN) * best.default_us
    else:
        assert best.tuned_us == best.default_us


def test_nothing_is_kept_that_is_only_faster_at_first():
    default = {"warps": 4, "min_blocks": 2, "unroll": 2}
    search = Search("samples", default, H100, lambda asked: [*range(len(asked), 0, -1)])
    assert search.best(lambda axes: (10.0, 9.9), in_order=False).axes == {}


def test_wrong_results_are_left_out():
    default = {"warps": 4, "min_blocks": 2, "unroll": 2}
    search = Search("samples", default, H100, lambda asked: [*range(len(asked), 0, -1)])
    assert search.best(lambda axes: None, in_order=False).axes == {}


@pytest.mark.parametrize(
    ("clustered", "kept"), [((10.0, 9.0), True), ((10.0, 10.2), True), ((10.0, 20.0), False), (None, False)]
)
def test_a_way_is_kept_only_if_it_is_not_slower_elsewhere(clustered, kept):
    search = Search("grad_value", {"way": "atomics"}, H100, lambda asked: [*range(len(asked), 0, -1)])
    found = search.best(lambda axes: (10.0, 5.0), in_order=False, elsewhere=lambda axes: clustered)
    assert bool(found.axes) == kept


@pytest.mark.parametrize("fused", [None, FusedFrontEnd(2, 4, "float32", False)], ids=["plain", "fused"])
def test_clustered_inputs_differ_in_the_place_of_their_samples_alone(fused):
    problem = replace(DECODER, fused=fused)
    levels = levels_of(problem.S, problem.L)
    spread, clustered = (Inputs(problem, levels, seed=1, clustered=clustered).arrays for clustered in (False, True))
    moved = "references" if fused else "locations"
    assert [name for name in spread if not np.array_equal(spread[name], clustered[name])] == [moved]
    assert np.quantile(clustered[moved], 0.9) < 0.4 < np.quantile(spread[moved], 0.6)


def test_without_time_there_is_no_outcome():
    search = Search("samples", {"warps": 4, "min_blocks": 2}, H100, lambda asked: [None] * len(asked))
    assert search.best(lambda axes: (2.0, 1.0), in_order=False) is None


@pytest.mark.parametrize("problem", [ENCODER, DECODER], ids=["encoder", "decoder"])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_a_spoilt_default_is_repaired(problem, dtype, monkeypatch):
    """With half the warps and twice the blocks as the default, the search still measures the shipped configuration."""
    problem = replace(problem, value_dtype=dtype, location_dtype=dtype)
    targets = [*targets_of(problem, None), *targets_of(problem, ALL)]
    shipped = {target: Planner(problem, H100).default_axes(target) for target in targets}
    spoilt = spoil(launch_tables.HOPPER)
    monkeypatch.setattr(launch_tables, "TABLES", {9: spoilt})
    planner, changed = Planner(problem, H100), 0
    for target in targets:
        default, want = planner.default_axes(target), shipped[target]
        if target.name == "grad_value" or default is None:
            continue
        changed += default != want
        wanted = planner.candidate(target, want).launches

        def measure(asked, target=target, wanted=wanted):
            return [1.0 if planner.candidate(target, axes).launches == wanted else 2.0 for axes in asked]

        search = Search(target.name, default, H100, measure)
        assert min(search.times.values()) == 1.0, (target, default, want)
    assert changed > 3


def spoil(entry):
    """A launch table with half the warps and twice the blocks."""
    if isinstance(entry, launch_tables.Bounds):
        return replace(entry, warps=max(1, entry.warps // 2), min_blocks=2 * entry.min_blocks)
    if hasattr(entry, "__dataclass_fields__"):
        return replace(entry, **{name: spoil(getattr(entry, name)) for name in entry.__dataclass_fields__})
    return entry


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("name", NAMES)
def test_candidates_fit_the_gpu_and_the_nearest_come_first(architecture, name):
    gpu, default = ARCHITECTURES[architecture], default_of(random.Random(0), name)
    found = candidates.first(name, default, gpu)
    assert found[0] == default
    for axes in found[1:]:
        warps = axes["warps"]
        assert axes["min_blocks"] <= gpu.blocks_per_multiprocessor
        assert 32 * warps * axes["min_blocks"] <= gpu.threads_per_multiprocessor
        assert all(value in AXES[name][axis] for axis, value in axes.items())
    assert len(found) < 60


def test_the_default_as_axes_is_the_default():
    """What is measured as the default is what a call without tuning launches."""
    for problem in (ENCODER, DECODER, replace(DECODER, value_dtype="float16", location_dtype="float32")):
        planner = Planner(problem, H100)
        for target in (*targets_of(problem, None), *targets_of(problem, ALL)):
            default = planner.default_axes(target)
            if default is not None:
                want = planner.candidate(target, None).launches
                assert planner.candidate(target, default).launches == want, target
        assert planner.candidate(targets_of(problem, None)[0], None).launches == (plan.forward(problem, 16, H100),)
