"""Results do not depend on which warp or lane runs first: adversarial schedules of the emulator."""

import functools

import numpy as np
import pytest

from cupy_msda.cuda import kernels, plan
from tests.helpers import emulator, schedules
from tests.helpers.covering import COVERING
from tests.helpers.schedules import SCHEDULES, SOME, first, last, warp_by_warp

pytestmark = pytest.mark.skipif(emulator.COMPILER is None, reason="needs g++")

expected = functools.cache(lambda name: COVERING[name].expected())


def check(name, of):
    for schedule, order in of.items():
        try:
            COVERING[name].check(expected(name), order=order)
        except AssertionError as error:
            raise AssertionError(f"{schedule}: {error}") from None


SMALL = [
    "forward: pixels, warps independent",
    "backward: pixels",
    "summation: sorted batches",
    "summation: unsorted batches",
]


@pytest.mark.parametrize("name", SMALL)
def test_results_are_right_whichever_warp_runs_first(name):
    check(name, SOME)


@pytest.mark.long
@pytest.mark.parametrize("name", COVERING)
def test_results_are_right_under_every_schedule(name):
    check(name, SCHEDULES)


# Writes the numbers of the threads as they come, before and after a barrier of each kind. Their count comes last.
NOTES = """
extern "C" __global__ void msda_cast(const float*, value_t* target, long long count) {
    unsigned short* numbers = reinterpret_cast<unsigned short*>(target);
    numbers[numbers[count]++] = threadIdx.x;
    __syncwarp();
    numbers[numbers[count]++] = threadIdx.x;
    __syncthreads();
    numbers[numbers[count]++] = threadIdx.x;
}
}  // namespace msda
"""


def order_of_threads(order):
    """The threads in the order in which they run: one after the other between barriers of the block."""
    launch = plan.cast_gradient("float16", 1)
    target = np.zeros(3 * launch.threads + 1, np.uint16)
    arguments = {"source": np.zeros(1, np.float32), "target": target, "count": 3 * launch.threads}
    header, _, _ = kernels.source("cast").partition('extern "C"')
    emulator.launch(launch, arguments, text=header + NOTES, order=order)
    return target[:-1]


@pytest.mark.parametrize("rule", [first(2), last(2)], ids=["first", "last"])
def test_one_warp_runs_before_or_after_the_others_from_barrier_to_barrier(rule):
    numbers = order_of_threads(warp_by_warp(rule))
    warps = numbers.size // 96
    of_phases = numbers.size // 3 * 2
    for phase, phases in ((numbers[:of_phases], 2), (numbers[of_phases:], 1)):
        order = [warp for warp in range(warps) if warp != 2]
        order.insert(0 if rule == first(2) else len(order), 2)
        np.testing.assert_array_equal(phase // 32, np.repeat(order, 32 * phases))


@pytest.mark.parametrize("rule", [first(5), last(5)], ids=["first", "last"])
def test_one_lane_runs_before_or_after_the_others_from_barrier_to_barrier(rule):
    lanes = [lane for lane in range(32) if lane != 5]
    lanes.insert(0 if rule == first(5) else 31, 5)
    numbers = order_of_threads(warp_by_warp(schedules.UPWARDS, rule))
    np.testing.assert_array_equal(numbers.reshape(-1, 32) % 32, np.tile(lanes, (numbers.size // 32, 1)))
