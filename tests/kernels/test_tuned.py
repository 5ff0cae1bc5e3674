"""Measured choices can neither make an impossible launch nor change the order of a sum that is promised."""

import random
from dataclasses import replace

import pytest

from cupy_msda.call import ALL, Problem
from cupy_msda.cuda import plan, plan_backward
from cupy_msda.cuda.gpu import ARCHITECTURES, H100
from cupy_msda.cuda.tuning import tuned
from cupy_msda.cuda.tuning.tuned import Choices, Entry
from tests.helpers import drawn_entries, random_problems

LEVELS = ((20, 30, 0), (10, 15, 600))
ENCODER = Problem(2, 750, 8, 32, 2, 4, 750, "float32", "float32", ("cuda", 0), LEVELS)
BIG = replace(ENCODER, N=16, S=22223, Q=22223, levels=None)
# The axes that may differ where sums keep their order.
FREE = {
    "forward": {"warps", "min_blocks", "unroll", "query_tiles"},
    "backward": {"warps", "min_blocks", "unroll"},
    "bucket_sort": {"min_blocks"},
    "reduce_buckets": {"warps", "min_blocks"},
}


def entry(name, problem, axes, wanted=None):
    return Entry(tuned.subject_of(name, problem, wanted), tuned.measured_of(problem), axes, 2.0, 1.0)


def with_choices(gpu, *entries):
    return replace(gpu, choices=Choices(entries))


def launches(problem, alignment, gpu, wanted):
    """All launches of a call, or none where the operator refuses it."""
    try:
        forward = plan.forward(problem, alignment, gpu)
        return [forward, *plan_backward.backward(problem, alignment, gpu, wanted).launches]
    except NotImplementedError:
        return []


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_no_choice_makes_an_impossible_launch(architecture):
    pick, gpu, differ = random.Random(architecture), ARCHITECTURES[architecture], 0
    for problem, alignment, wanted in random_problems.draw(150, seed=architecture):
        default = launches(problem, alignment, gpu, wanted)
        chosen = replace(gpu, choices=drawn_entries.choices_of(pick, problem, wanted))
        found = launches(problem, alignment, chosen, wanted)
        assert bool(found) == bool(default)
        differ += found != default
        for launch in found:
            spec, (x, y, z) = launch.spec, launch.grid
            assert launch.threads <= 1024
            assert 1 <= spec.min_blocks <= gpu.blocks_per_multiprocessor
            assert spec.min_blocks * launch.threads <= gpu.threads_per_multiprocessor
            assert launch.shared_bytes <= gpu.shared_memory_per_block
            assert 1 <= x < 2**31
            assert 1 <= y < 2**16 > z >= 1
    assert differ > 60


def test_no_choice_changes_the_order_of_a_deterministic_sum():
    pick, differ = random.Random(1), 0
    for problem, alignment, wanted in random_problems.draw(400, seed=2):
        problem = replace(problem, deterministic=True)
        chosen = replace(H100, choices=drawn_entries.choices_of(pick, problem, wanted))
        pairs = [launches(problem, alignment, gpu, wanted) for gpu in (H100, chosen)]
        for default, found in zip(*pairs, strict=True):
            assert default.spec.kernel == found.spec.kernel
            before, after = default.spec.axes(), found.spec.axes()
            changed = {axis for axis in before if before[axis] != after[axis]}
            assert changed <= FREE.get(default.spec.kernel, set()), (default, found)
            differ += bool(changed)
    assert differ > 200


def test_an_entry_takes_the_place_of_the_table():
    gpu = with_choices(H100, entry("forward", BIG, {"warps": 4, "min_blocks": 6, "unroll": 2, "query_tiles": 1}))
    axes = plan.forward(BIG, 16, gpu).spec.axes()
    assert [axes[name] for name in ("warps", "min_blocks", "unroll", "query_tiles")] == [4, 6, 2, 1]


@pytest.mark.parametrize("way", ["sorted", "atomics", "aggregated"])
def test_a_measured_way_is_taken(way):
    gpu = with_choices(H100, entry("grad_value", BIG, {"way": way}, ALL))
    planned = plan_backward.backward(BIG, 16, gpu)
    assert (planned.summation is not None) == (way == "sorted")
    if planned.atomics:
        assert bool(planned.atomics.spec.aggregation_bits) == (way == "aggregated")
    assert plan_backward.backward(replace(BIG, deterministic=True), 16, gpu).summation


def test_an_entry_that_does_not_fit_leaves_the_default():
    """128 queries of these samples take more shared memory than a block has."""
    problem = replace(BIG, L=4, P=8, value_dtype="float64", location_dtype="float64")
    gpu = with_choices(H100, entry("aggregated", problem, {"aggregated_queries": 128}, ALL))
    default = plan.backward(problem, 16, H100, ALL, aggregated=True)
    assert plan.backward(problem, 16, gpu, ALL, aggregated=True) == default


@pytest.mark.parametrize(
    ("change", "found"),
    [
        ({}, True),
        ({"N": 3}, True),
        ({"N": 4}, False),
        ({"S": 740, "Q": 740}, True),
        ({"Q": 749}, False),
        ({"M": 4}, False),
        ({"P": 3}, False),
        ({"value_dtype": "float16"}, False),
        ({"ragged": True}, False),
        ({"deterministic": True}, False),
        ({"levels": None}, True),
    ],
    ids=str,
)
def test_an_entry_is_for_its_problem_and_similar_sizes(change, found):
    choices = Choices([entry("forward", ENCODER, {"warps": 4})])
    assert bool(choices.axes("forward", replace(ENCODER, **change))) == found


def test_the_nearest_sizes_count():
    entries = [entry("forward", replace(ENCODER, N=n), {"warps": n}) for n in (2, 4)]
    found = [Choices(entries).axes("forward", replace(ENCODER, N=n)) for n in (2, 3, 4, 5)]
    assert [axes["warps"] for axes in found] == [2, 4, 4, 4]


def test_addresses_of_parts_of_vectors_take_the_default():
    gpu = with_choices(H100, entry("forward", ENCODER, {"warps": 1, "min_blocks": 1}))
    assert plan.forward(ENCODER, 8, gpu) == plan.forward(ENCODER, 8, H100)


@pytest.mark.parametrize(
    ("name", "axes", "deterministic"),
    [
        ("forward", {"warps": 3}, False),
        ("forward", {"warps": True}, False),
        ("forward", {"lanes": 8}, False),
        ("forward", {"lanes_per_query": 8}, True),
        ("reduce_buckets", {"unroll": 2}, True),
        ("grad_value", {"way": "fast"}, False),
        ("cast", {}, False),
    ],
)
def test_an_entry_with_anything_else_is_refused(name, axes, deterministic):
    with pytest.raises(ValueError, match="expected"):
        entry(name, replace(ENCODER, deterministic=deterministic), axes, ALL)
