"""The net catches: each fault of planted_faults_*.py, planted into a copy of a source, turns a check red.

A fault that no longer fits its source, or that does not compile, is an error and not caught.
"""

from dataclasses import replace

import numpy as np
import pytest

from cupy_msda.call import Problem, Wanted
from cupy_msda.cuda import heuristics, kernels, plan, plan_backward, sorted_heuristics
from cupy_msda.cuda.gpu import H100
from tests.emulator import planted_faults_backward as backward_faults
from tests.emulator import planted_faults_forward as forward_faults
from tests.emulator import planted_faults_sorted as sorted_faults
from tests.emulator import planted_faults_variants as variant_faults
from tests.helpers import cases, emulator
from tests.helpers.cases import CROSS_LEVEL, Case
from tests.helpers.emulator import SMALL_GPU
from tests.helpers.faults import Fault
from tests.helpers.tolerance import assert_close

pytestmark = pytest.mark.skipif(emulator.COMPILER is None, reason="needs g++")


def check(kernel, text, case, **options):
    """The forward, or the gradients, of a case under the sanitizers, by a kernel of this text."""
    inputs = case.inputs(seed=21)
    want_output, want_grads = cases.expected(inputs, **case.variant)
    # In a process of its own: a fault may crash it.
    options |= {"text": text, "sanitize": True, "variant": case.variant}
    if kernel == "forward":
        assert_close(emulator.forward(inputs, **options), want_output, "float32")
        return
    for grad, want in zip(emulator.backward(inputs, **options), want_grads, strict=True):
        assert_close(grad, want, "float32")


def is_caught(run, *arguments):
    """Whether a check fails. Where the text does not compile, the error is of another type and passes through."""
    try:
        run(*arguments)
    except AssertionError:
        return True
    return False


# ---- forward and backward --------------------------------------------------------------------------------------------

BASIC = [
    Case("encoder_order", levels=((9, 11), (4, 5), (2, 2)), N=1, M=2, D=8, queries=None),
    Case("tail_and_chunks", levels=((4, 5), (3, 3), (2, 2)), N=2, M=2, D=32, P=24, queries=5),
]
# Queries are pixels, in two tiles per warp: with lanes beyond the last query, levels in shared memory, two heads per
# warp.
TWO_TILES = [
    Case("two_levels", levels=((13, 15), (4, 5)), N=2, M=4, D=32, P=3, queries=None),
    Case("idle_lanes", levels=((9, 11), (4, 5)), N=2, M=4, D=36, P=2, queries=None),
    Case("six_levels", levels=((9, 11), (4, 5), (2, 2), (1, 1), (1, 1), (1, 1)), N=2, M=8, D=16, P=1, queries=None),
]
MANY_CHANNELS = Case("many_channels", levels=((4, 5),), N=1, M=2, D=1058, queries=24)


def check_bad_level(text):
    """NaN for a level with a negative height."""
    inputs = BASIC[1].inputs(seed=22)
    options = {"text": text, "metadata_on_device": True, "shapes": [[4, 5], [-3, 3], [2, 2]], "sanitize": True}
    assert np.isnan(emulator.forward(inputs, **options)).all()


def check_levels_in_another_order(text):
    """Levels that do not follow each other in value."""
    for case, starts in ((BASIC[0], (20, 0, 119)), (TWO_TILES[-1], (20, 0, 119, 123, 124, 125))):
        inputs = case.inputs(seed=23)._replace(starts=np.array(starts))
        got = emulator.forward(inputs, text=text, gpu=SMALL_GPU, sanitize=True)
        assert_close(got, cases.expected(inputs)[0], "float32")


def check_infinity(text):
    """An infinity in value, in the outputs that use it and in no others."""
    inputs = BASIC[0].inputs(seed=24)
    inputs.value[0, 3] = np.inf
    got = emulator.forward(inputs, text=text, gpu=SMALL_GPU, sanitize=True)
    np.testing.assert_array_equal(np.isfinite(got), np.isfinite(cases.expected(inputs)[0]))


def check_all(kernel, text):
    """The forward or the backward on every case."""
    for case in BASIC:
        for order in (0, 1):
            check(kernel, text, case, order=order, gpu=SMALL_GPU)  # the shapes with many warps per block
    check(kernel, text, MANY_CHANNELS)
    if kernel == "forward":
        for case in TWO_TILES:
            check(kernel, text, case, gpu=SMALL_GPU)
        check_bad_level(text)
        check_levels_in_another_order(text)
        check_infinity(text)


def thinned(faults):
    """Every second fault, and the others among the longer proofs."""
    return [
        name if number % 2 == 0 else pytest.param(name, marks=pytest.mark.long) for number, name in enumerate(faults)
    ]


@pytest.mark.parametrize("kernel", ["forward", "backward"])
def test_sound_source_passes(kernel):
    check_all(kernel, kernels.source(kernel))


@pytest.mark.parametrize("name", thinned(forward_faults.FORWARD))
def test_fault_of_the_forward_is_caught(name):
    assert is_caught(check_all, "forward", forward_faults.FORWARD[name].planted())


@pytest.mark.parametrize("name", thinned(backward_faults.BACKWARD))
def test_fault_of_the_backward_is_caught(name):
    assert is_caught(check_all, "backward", backward_faults.BACKWARD[name].planted())


@pytest.mark.parametrize("kernel", ["forward", "backward"])
def test_block_beyond_the_last_head_that_works_is_caught(kernel, monkeypatch):
    monkeypatch.setattr(heuristics, "MAX_GRID_Y", 3)
    check(kernel, kernels.source(kernel), BASIC[1])
    fault = Fault(kernel, "first_head_of_block() >= heads) return;", "false) return;")
    assert is_caught(check, kernel, fault.planted(), BASIC[1])


def test_sum_in_float16_exceeds_the_tolerance_of_float16():
    fault = forward_faults.FORWARD["sum in float16"]
    inputs = Case("float16", levels=((9, 11), (4, 5)), N=1, M=2, D=32, P=32, queries=20).inputs("float16", seed=23)
    want, _ = cases.expected(inputs)
    assert_close(emulator.forward(inputs), want, "float16")
    with pytest.raises(AssertionError, match="exceeds"):
        assert_close(emulator.forward(inputs, text=fault.planted()), want, "float16")


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
        check("forward", None, BASIC[1])


SHARED_STRUCTS = {
    "forward": ("forward", "sample_pitch = config::chunk | 1", "sample_pitch = (config::chunk | 1) + 2"),
    "backward": ("backward", "sample_pitch = config::chunk | 1", "sample_pitch = (config::chunk | 1) + 2"),
    "block_reduce": ("block_reduce", "unsigned warp_sums[config::warps];", "unsigned warp_sums[config::warps + 4];"),
    "warp_reduce": ("warp_reduce", "contribution contributions[32];", "contribution contributions[33];"),
    "split_buckets": ("split_buckets", "address_t[config::warps][32]", "address_t[config::warps][33]"),
}


@pytest.mark.parametrize("kernel", SHARED_STRUCTS)
def test_shared_memory_of_another_size_than_planned_does_not_compile(kernel):
    text = Fault(*SHARED_STRUCTS[kernel]).planted()
    arguments = (check, kernel, text, BASIC[1]) if kernel in ("forward", "backward") else (check_sorted, kernel, text)
    with pytest.raises(RuntimeError, match="the planner and the kernel disagree"):
        is_caught(*arguments)


# ---- variants, ragged queries, fused calls ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", thinned(variant_faults.VARIANTS))
def test_fault_in_a_variant_is_caught(name):
    variant, fault = variant_faults.VARIANTS[name]
    case = Case("variant", levels=((5, 6), (2, 3)), N=1, P=3, queries=9, variant=variant)
    check(fault.kernel, kernels.source(fault.kernel), case)
    assert is_caught(check, fault.kernel, fault.planted(), case)


def check_ragged(kernel, text):
    case = Case("ragged", levels=((9, 11), (4, 5)), N=2, M=2, D=8, queries=None)
    inputs, lengths = case.inputs(seed=24), (50, 119)
    want_output, want_grads = cases.expected_ragged(inputs, lengths)
    for array in (inputs.locations, inputs.weights, inputs.grad_output):
        array[0, 50:] = 0.4  # in the image, so that it would count
    options = {"lengths": lengths, "sanitize": True}
    if kernel == "forward":
        assert_close(emulator.forward(inputs, text=text, **options), want_output, "float32")
    elif kernel == "backward":
        for grad, want in zip(emulator.backward(inputs, text=text, **options), want_grads, strict=True):
            assert_close(grad, want, "float32")
    else:
        assert_close(emulator.summation(inputs, texts={kernel: text}, **options), want_grads[0], "float32")


@pytest.mark.parametrize("name", thinned(variant_faults.RAGGED))
def test_fault_with_ragged_queries_is_caught(name):
    fault = variant_faults.RAGGED[name]
    check_ragged(fault.kernel, kernels.source(fault.kernel))
    assert is_caught(check_ragged, fault.kernel, fault.planted())


def check_fused(kernel, text, packed):
    P = 4 if kernel == "bucket_sort" else 3  # with 8 samples, the sort makes its locations and weights itself
    case = Case("fused", levels=((6, 7), (3, 4)), N=1, M=2, D=8, P=P)
    inputs = cases.to_fused(case.inputs(), coordinates=4, packed=packed)
    output, grads = cases.expected_fused(inputs)
    if kernel == "forward":
        want, got = [output], [emulator.forward(inputs, text=text)]
    elif kernel in ("bucket_sort", "materialise"):
        want, got = grads[:1], [emulator.summation(inputs, texts={kernel: text})]
    else:
        option = {"text" if kernel == "backward" else "text_of_references": text}
        want, got = grads, emulator.backward(inputs, wanted=Wanted(references=True), **option)
    for one, other in zip(got, want, strict=True):
        if other is not None:
            assert_close(one, other, "float32")


@pytest.mark.parametrize("name", thinned(variant_faults.FUSED))
def test_fault_in_a_fused_call_is_caught(name):
    packed, fault = variant_faults.FUSED[name]
    check_fused(fault.kernel, kernels.source(fault.kernel), packed)
    assert is_caught(check_fused, fault.kernel, fault.planted(), packed)


# ---- the sorted backward ---------------------------------------------------------------------------------------------

SORTED = (
    Case("dense", levels=((9, 11), (4, 5)), N=1, M=2, D=8, queries=None),
    Case("sparse", levels=((20, 26), (13, 13)), N=1, M=2, D=32, queries=320),
    Case("crowded", levels=((20, 26), (13, 13)), N=1, M=1, D=32, queries=60),
    Case("slabs", levels=((9, 11), (4, 5)), N=1, M=1, D=8, queries=20),
    Case("bucket_chunks", levels=((9, 11), (4, 5)), N=1, M=2, D=8, queries=800),
)


def check_sorted(kernel, text):
    """The sorted backward on every case, with one kernel of this text."""
    for case in SORTED:
        inputs = case.inputs(seed=31)
        if case.name == "crowded":
            inputs.locations[:] = 0.37
        elif case.name == "bucket_chunks":
            inputs.locations[:, :, :, 0] = 0.63
        want = cases.expected(inputs)[1][0]
        with pytest.MonkeyPatch.context() as patch:
            if case.name == "slabs":
                patch.setattr(sorted_heuristics, "MAX_BUCKETS", 1)
            elif case.name == "bucket_chunks":
                patch.setattr(plan_backward, "BUCKET_CHUNK", 512)
            for order in (0, 1):
                got = emulator.summation(inputs, texts={kernel: text}, sanitize=True, order=order)
                assert_close(got, want, "float32")


def test_sound_sorted_backward_passes():
    check_sorted("bucket_sort", kernels.source("bucket_sort"))


@pytest.mark.parametrize("name", thinned(sorted_faults.SORTED))
def test_fault_of_the_sorted_backward_is_caught(name):
    fault = sorted_faults.SORTED[name]
    assert is_caught(check_sorted, fault.kernel, fault.planted())


# ---- block-level aggregation -----------------------------------------------------------------------------------------


def check_aggregated(text):
    many = Case("aggregated", levels=((5, 6), (5, 6), (2, 2)), N=1, M=2, D=32, P=4, queries=64).inputs(seed=32)
    # The same pixels as two levels of different widths, and on both only the first cell.
    overlapping = Case("overlap", levels=((5, 6), (6, 5)), starts=(0, 0), S=30, N=1, M=1, D=32, queries=64).inputs()
    overlapping.locations[..., 0, :, :] = 0.9 / 6, 0.8 / 5
    overlapping.locations[..., 1, :, :] = 0.9 / 5, 0.8 / 6
    overlapping.locations[0, :10, :, 0] = 9
    # Two cells, one at the end of a row, the other left of the next row: their pixels follow each other.
    two = Case("two", levels=((5, 6),), N=1, M=1, D=32, P=4, queries=64).inputs()
    two.locations[0, :25] = 4.8 / 6, 1.9 / 5
    two.locations[0, 25:] = 0.1 / 6, 2.9 / 5
    for inputs in (many, overlapping, two):
        want = cases.expected(inputs)[1][0]
        for order in (0, 1):
            assert_close(emulator.backward(inputs, text=text, sanitize=True, order=order)[0], want, "float32")


@pytest.mark.parametrize("name", thinned(backward_faults.AGGREGATION))
def test_fault_of_the_aggregation_is_caught(name):
    check_aggregated(kernels.source("backward"))
    assert is_caught(check_aggregated, backward_faults.AGGREGATION[name].planted())


@pytest.mark.parametrize("name", thinned(backward_faults.CROSS_LEVEL_TILES))
def test_fault_of_cross_level_tiles_is_caught(name):
    which, fault = backward_faults.CROSS_LEVEL_TILES[name]
    (case,) = [case for case in CROSS_LEVEL if case.name == which]
    check("backward", kernels.source("backward"), case)
    assert is_caught(check, "backward", fault.planted(), case)


# ---- dot products by tensor cores ------------------------------------------------------------------------------------


def check_tensor_cores(D, aggregated, text, location_dtype="float16"):
    case = Case("tensor_cores", levels=((5, 6), (2, 2)), N=1, M=2, D=D, P=4, queries=70 if aggregated else 9)
    inputs = case.inputs("float16", location_dtype, seed=33)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(heuristics, "AGGREGATED_SAMPLES", 1)
        got = emulator.backward(inputs, text=text, wanted=Wanted(value=aggregated), sanitize=True)
    for grad, want in zip(got[1:], cases.expected(inputs)[1][1:], strict=True):
        assert_close(grad, want, location_dtype)


@pytest.mark.parametrize("location_dtype", ["float16", "float32"])
@pytest.mark.parametrize("aggregated", [False, True])
@pytest.mark.parametrize("D", [32, 64, 128, 256])
def test_tensor_cores_with_every_number_of_lanes(D, aggregated, location_dtype):
    check_tensor_cores(D, aggregated, kernels.source("backward"), location_dtype)


@pytest.mark.parametrize("name", thinned(backward_faults.TENSOR_CORES))
def test_fault_of_the_tensor_cores_is_caught(name):
    D, aggregated, fault = backward_faults.TENSOR_CORES[name]
    assert is_caught(check_tensor_cores, D, aggregated, fault.planted())
