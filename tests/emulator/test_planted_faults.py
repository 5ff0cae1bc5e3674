"""The emulator catches faults that `tests.mutation` does not draw, because no small change of a source makes them.

A fault that no longer fits its source, or that does not compile, is an error and not caught.
"""

from dataclasses import replace

import numpy as np
import pytest

from cupy_msda.call import Problem
from cupy_msda.cuda import heuristics, plan
from cupy_msda.cuda.gpu import H100
from tests.helpers import cases, emulator
from tests.helpers.cases import Case
from tests.helpers.emulator import SMALL_GPU
from tests.helpers.faults import Fault
from tests.helpers.tolerance import assert_close

pytestmark = pytest.mark.skipif(emulator.COMPILER is None, reason="needs g++")

CHUNKS = Case("tail_and_chunks", levels=((4, 5), (3, 3), (2, 2)), N=2, M=2, D=32, P=24, queries=5)
TWO_TILES = Case("two_tiles", levels=((13, 15), (4, 5)), N=2, M=4, D=32, P=3, queries=None)
PREPARE = "else prepare_samples(samples, queries, raw, 0, k0);\n                __syncwarp();"
END_OF_CHUNK = "            __syncwarp();\n        }\n\n        sum_over_lane_groups(sum);"
SUM = "sum[tile][v] = fma(weight[c], x[v], sum[tile][v]);"
FLOAT16_SUM = "{ float16 half; narrow(fma(weight[c], x[v], sum[tile][v]), half); sum[tile][v] = widen(half); }"
FAULTS = {
    "barrier that some lanes do not reach": (
        CHUNKS, Fault("forward", PREPARE, PREPARE.replace("__syncwarp();", "if (active) __syncwarp();")),
    ),
    "barrier that is missing between query tiles alone": (
        TWO_TILES,
        Fault(
            "forward",
            END_OF_CHUNK,
            END_OF_CHUNK.replace("__syncwarp();", "if (config::query_tiles == 1) __syncwarp();"),
        ),
    ),
    "shuffle whose mask lacks lanes": (
        Case("many_levels", levels=((9, 11), *((2, 3),) * 7), N=2, M=4, D=32, P=1, queries=None),
        Fault("forward", "__shfl_up_sync(0xffffffffu, end, 1)", "__shfl_up_sync(0xffffu, end, 1)"),
    ),
    "vector at an address that is not aligned": (
        CHUNKS,
        Fault(
            "forward",
            "+ lane * config::vec) * sizeof(value_t);",
            "+ lane * config::vec) * sizeof(value_t) + sizeof(value_t);",
        ),
    ),
}  # fmt: skip


def check_forward(case, text, **options):
    """The forward of a case, by a kernel of this text: in a process of its own, which a fault may crash."""
    inputs = case.inputs(seed=21)
    got = emulator.forward(inputs, text=text, gpu=SMALL_GPU, sanitize=True, **options)
    assert_close(got, cases.expected(inputs)[0], "float32")


@pytest.mark.parametrize("name", FAULTS)
def test_fault_is_caught(name):
    case, fault = FAULTS[name]
    check_forward(case, None)
    for order in (1, 0):
        try:
            check_forward(case, fault.planted(), order=order)
        except AssertionError:
            return
    pytest.fail("the fault is not caught")


def test_block_beyond_the_last_head_that_works_is_caught(monkeypatch):
    monkeypatch.setattr(heuristics, "MAX_GRID_Y", 3)
    check_forward(CHUNKS, None)
    fault = Fault("forward", "first_head_of_block() >= heads) return;", "false) return;")
    with pytest.raises(AssertionError):
        check_forward(CHUNKS, fault.planted())


def test_sum_in_float16_exceeds_the_tolerance_of_float16():
    inputs = Case("float16", levels=((9, 11), (4, 5)), N=1, M=2, D=32, P=32, queries=20).inputs("float16", seed=23)
    want, _ = cases.expected(inputs)
    assert_close(emulator.forward(inputs), want, "float16")
    with pytest.raises(AssertionError, match="exceeds"):
        assert_close(emulator.forward(inputs, text=Fault("forward", SUM, FLOAT16_SUM).planted()), want, "float16")


# ---- 64-bit offsets and shared memory --------------------------------------------------------------------------------


def run_far_level(wide, text=None):
    """One pixel, 2**27 + 5 pixels into value, and samples out of bounds: offsets need 64 bits, and nothing is read."""
    start = 2**27 + 5
    problem = Problem(1, start + 1, 1, 1, 1, 1, 3, "float32", "float32", ("cuda", 0), ((1, 1, start),))
    launch = plan.forward(problem, 16, H100)
    assert launch.spec.axes()["wide_index"] == wide
    output = np.full((1, 3, 1), np.nan, np.float32)
    arguments = {
        "value": np.zeros(1, np.float32),
        "metadata": [np.array([[1, 1]], np.int64), np.array([start], np.int64)],
        "locations": np.full((1, 3, 1, 1, 1, 2), 9, np.float32),
        "weights": np.ones((1, 3, 1, 1, 1), np.float32),
        "references": None,
        "lengths": None,
        "output": output,
    }
    sizes = zip(("S", "Q", "image_stride", "head_stride", "heads"), plan.size_words(problem), strict=True)
    emulator.launch(launch, arguments | dict(sizes), text=text, sanitize=True)
    assert not output.any()


def test_product_that_overflows_32_bits_is_caught():
    run_far_level(True)
    fault = Fault("forward", "sample.pixel_and_mask = pixel * 16", "sample.pixel_and_mask = (int)pixel * 16")
    with pytest.raises(emulator.EmulatorError, match="overflow"):
        run_far_level(True, fault.planted())


def test_planner_that_forgets_64_bits_is_caught(monkeypatch):
    emulator.force_wide_index(monkeypatch, False)
    with pytest.raises(emulator.EmulatorError, match="overflow"):
        run_far_level(False)


def test_shared_memory_that_is_too_small_is_caught(monkeypatch):
    def forward(*arguments, planned=plan.forward):
        launch = planned(*arguments)
        return replace(launch, shared_bytes=launch.shared_bytes - 16)

    monkeypatch.setattr(plan, "forward", forward)
    with pytest.raises(emulator.EmulatorError, match="heap-buffer-overflow"):
        check_forward(CHUNKS, None)


SHARED_STRUCTS = {
    "forward": ("sample_pitch = config::chunk | 1", "sample_pitch = (config::chunk | 1) + 2"),
    "backward": ("sample_pitch = config::chunk | 1", "sample_pitch = (config::chunk | 1) + 2"),
    "reduce_buckets": ("acc_t sum[max_keys][channel_tile];", "acc_t sum[max_keys + 4][channel_tile];"),
}
SUMMATIONS = {"reduce_buckets": 800}  # queries


@pytest.mark.parametrize("kernel", SHARED_STRUCTS)
def test_shared_memory_of_another_size_than_planned_does_not_compile(kernel):
    text = Fault(kernel, *SHARED_STRUCTS[kernel]).planted()
    inputs = Case("sizes", levels=((9, 11), (4, 5)), N=1, M=1, D=8, queries=SUMMATIONS.get(kernel, 5)).inputs()
    function, option = getattr(emulator, kernel, emulator.summation), {"text": text}
    if kernel in SUMMATIONS:
        option = {"texts": {kernel: text}}
    with pytest.raises(RuntimeError, match="the planner and the kernel disagree"):
        function(inputs, **option)
