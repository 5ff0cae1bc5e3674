"""The CUDA sources run on the CPU: every dtype and code path against the reference, under the sanitizers too."""

from dataclasses import replace

import numpy as np
import pytest

from cupy_msda.cuda import heuristics, plan, plan_backward, sorted_heuristics
from cupy_msda.cuda.gpu import H100
from tests.helpers import cases, emulator, reference
from tests.helpers.cases import CASES, CROSS_LEVEL, DTYPE_PAIRS, VARIANTS, Case
from tests.helpers.emulator import SMALL_GPU
from tests.helpers.thinning import every_other
from tests.helpers.tolerance import assert_close

pytestmark = pytest.mark.skipif(emulator.COMPILER is None, reason="needs g++")

# Queries are pixels (tiles of the image), tails, several chunks of samples, odd D, several channel tiles, one lane.
PATHS = [
    Case("encoder_order", levels=((9, 11), (4, 5), (2, 2)), N=1, M=2, D=8, queries=None),
    Case("tail", levels=((5, 6), (3, 3)), N=2, M=1, D=32, queries=37),
    Case("chunks", levels=((4, 5), (3, 3), (2, 2)), N=1, M=2, D=4, P=9, queries=5),
    Case("odd", levels=((4, 5), (2, 3)), N=1, M=2, D=33, queries=3),
    Case("many_channels", levels=((3, 4),), N=1, M=1, D=259, P=3, queries=2),
    Case("one_lane", levels=((3, 4), (1, 1)), N=1, M=2, D=1, P=3, queries=9),
    Case("gaps", starts=(4, 50), S=64, N=1, D=8),
    Case("few_samples", levels=((20, 26), (13, 13)), N=1, M=2, D=32, queries=60),
    Case("few_samples_three_channel_tiles", levels=((9, 13),), N=1, M=1, D=260, P=3, queries=20),
    Case("overlap", starts=(3, 10), S=60, N=1, D=8),
    Case("heads_of_a_cache_line", levels=((5, 6), (3, 3)), N=2, M=6, D=32, queries=None),
    Case("many_levels", levels=((2, 3),) * 33, N=1, M=2, D=8, P=1, queries=None),
]


def check(case, pair, seed=0, **options):
    inputs = case.inputs(*pair, seed=seed)
    want_output, want_grads = cases.expected(inputs, **case.variant)
    of_sum = {name: option for name, option in options.items() if name != "gpu"}
    assert_close(emulator.summation(inputs, variant=case.variant, **of_sum), want_grads[0], pair[0], "sorted")
    assert_close(emulator.forward(inputs, variant=case.variant, **options), want_output, pair[0])
    check_gradients(case, pair, inputs, want_grads, **options)


def check_gradients(case, pair, inputs, want_grads, **options):
    grads = emulator.backward(inputs, variant=case.variant, **options)
    assert_close(grads[0], want_grads[0], pair[0], "grad_value")
    points = case.variant.get("num_points")
    got, want = (cases.pixel_units(grad, inputs.shapes, points) for grad in (grads[1], want_grads[1]))
    assert_close(got, want, pair[1], "grad_sampling_loc")
    assert_close(grads[2], want_grads[2], pair[1], "grad_attn_weight")


@pytest.mark.parametrize("pair", DTYPE_PAIRS, ids="-".join)
@pytest.mark.parametrize("case", every_other([PATHS[3], PATHS[10]]), ids=str)
def test_each_dtype_computes_the_reference(case, pair):
    check(case, pair, seed=1)


# Without aggregation, aggregated with products by FMA and by tensor cores, and pixels that would take two query tiles.
@pytest.mark.parametrize(
    ("pair", "queries"), [(DTYPE_PAIRS[0], 7), (DTYPE_PAIRS[1], 30), (DTYPE_PAIRS[2], 30), (DTYPE_PAIRS[1], None)]
)
def test_blocks_beyond_the_last_head_do_nothing(monkeypatch, pair, queries):
    monkeypatch.setattr(heuristics, "MAX_GRID_Y", 5)
    case = Case("twelve_heads", levels=((4, 5), (3, 3)), N=3, M=4, D=64, queries=queries)
    check(case, pair, gpu=SMALL_GPU, sanitize=True)


@pytest.mark.parametrize("pair", [("float16", "float16"), ("bfloat16", "float32")], ids="-".join)
def test_odd_channels_of_sixteen_bits_under_the_sanitizers(pair):
    check(PATHS[3], pair, sanitize=True)


@pytest.mark.parametrize("pair", DTYPE_PAIRS, ids="-".join)
@pytest.mark.parametrize("case", [VARIANTS[-1], VARIANTS[-2]], ids=str)
def test_each_variant_in_every_dtype(case, pair):
    check(case, pair, seed=3)


@pytest.mark.parametrize("case", every_other(VARIANTS), ids=str)
def test_variants_under_the_sanitizers(case):
    check(case, ("float32", "float32"), sanitize=True, metadata_on_device=True)


@pytest.mark.parametrize("variant", [{"interpolation": "nearest"}, {"padding_mode": "border"}], ids=str)
@pytest.mark.parametrize("bad", every_other([np.nan, np.inf, 3e38, -np.inf]), ids=str)
def test_hostile_locations_in_variants_under_the_sanitizers(variant, bad):
    inputs = CASES[0].inputs(seed=4)
    inputs.locations[:, :, :, 0] = bad
    near = inputs._replace(locations=np.clip(inputs.locations, -9, 9))
    want_output, want_grads = cases.expected(near, **variant)
    assert_close(emulator.forward(inputs, variant=variant, sanitize=True), want_output, "float32")
    for grad, want in zip(emulator.backward(inputs, variant=variant, sanitize=True), want_grads, strict=True):
        assert_close(grad, want, "float32")


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf], ids=str)
@pytest.mark.parametrize("pair", [DTYPE_PAIRS[0], DTYPE_PAIRS[2]], ids="-".join)
@pytest.mark.parametrize("gpu", [SMALL_GPU, H100], ids=["masked neighbours", "zeros"])
def test_infinity_and_nan_in_value_reach_the_outputs_that_use_them_only(gpu, pair, bad):
    inputs = PATHS[0].inputs(*pair, seed=6)
    inputs.value[0, [0, 7, 40, 98, 100]] = bad
    want = cases.expected(inputs)[0]
    got = emulator.forward(inputs, gpu=gpu).astype(np.float64)
    np.testing.assert_array_equal(np.isfinite(got), np.isfinite(want))
    finite = np.isfinite(want)
    assert finite.any()
    assert not finite.all()
    assert_close(got[finite], want[finite], pair[0])


@pytest.mark.parametrize("pair", DTYPE_PAIRS, ids="-".join)
def test_pixels_as_queries_that_fill_the_gpu(pair):
    check(PATHS[0], pair, seed=7, gpu=SMALL_GPU, sanitize=pair[0] == "float32")


# Two query tiles per warp, but for the last heads: two samples per load, lanes beyond the last query, an odd number of
# samples, two heads per warp, more levels than registers hold.
TWO_TILES = [
    Case("three_levels", levels=((9, 11), (4, 5), (2, 2)), N=2, M=4, D=32, queries=None),
    Case("idle_lanes", levels=((9, 11), (4, 5)), N=2, M=8, D=40, P=3, queries=None),
    Case("odd_samples", levels=((9, 11), (4, 5), (2, 3)), N=2, M=4, D=32, P=3, queries=None),
    Case("two_heads", levels=((9, 11), (4, 5), (2, 3), (1, 2)), N=2, M=16, D=16, queries=None),
    Case("five_levels", levels=((9, 11), (4, 5), (2, 3), (1, 2), (1, 1)), N=2, M=8, D=32, P=4, queries=None),
    Case("six_levels", levels=((9, 11), (4, 5), (2, 3), (1, 2), (1, 1), (1, 1)), N=2, M=8, D=32, queries=None),
]


def in_float32_and(pairs, cases):
    """Each case in float32, and the first ones in the other pairs of dtypes, one each."""
    others = [pytest.param(pair, case, id=f"{'-'.join(pair)}-{case}") for pair, case in zip(pairs, cases, strict=False)]
    return [*(pytest.param(DTYPE_PAIRS[1], case, id=f"float32-{case}") for case in cases), *others]


@pytest.mark.parametrize(("pair", "case"), in_float32_and(DTYPE_PAIRS[2:], TWO_TILES))
def test_pixels_in_two_query_tiles(case, pair):
    inputs = case.inputs(*pair, seed=8)
    launch = plan.forward(emulator.prepare(inputs, True, None), 16, SMALL_GPU)
    assert launch.spec.queries.query_tiles == 2
    heads = case.N * case.M // launch.spec.heads_per_warp
    assert 0 < launch.grid[1] - heads < heads
    got = emulator.forward(inputs, gpu=SMALL_GPU, metadata_on_device=True, sanitize=True)
    assert_close(got, cases.expected(inputs)[0], pair[0])
    if pair[0] == "float32":
        np.testing.assert_array_equal(emulator.forward(inputs, gpu=SMALL_GPU, sanitize=True), got)


@pytest.mark.parametrize(("pair", "case"), in_float32_and((DTYPE_PAIRS[0], *DTYPE_PAIRS[2:4]), CROSS_LEVEL))
def test_pixels_in_cross_level_tiles(case, pair):
    inputs = case.inputs(*pair, seed=9)
    assert emulator.is_dense(emulator.prepare(inputs, True, None))
    check_gradients(case, pair, inputs, cases.expected(inputs)[1], metadata_on_device=True, sanitize=True)


@pytest.mark.parametrize("lengths", [(123, 0), (64, 1)])
def test_ragged_pixels_in_two_query_tiles(lengths):
    inputs = TWO_TILES[0].inputs(seed=9)
    want = cases.expected_ragged(inputs, lengths)[0]
    got = emulator.forward(inputs, gpu=SMALL_GPU, lengths=np.array(lengths), sanitize=True)
    assert_close(got, want, "float32")


@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("starts", [(0, 99, 119), (24, 4, 0), (0, 0, 0)], ids=str)
def test_two_query_tiles_wherever_the_levels_begin(starts, wide, monkeypatch):
    emulator.force_wide_index(monkeypatch, wide)
    inputs = TWO_TILES[0].inputs(seed=10)._replace(starts=np.array(starts))
    got = emulator.forward(inputs, gpu=SMALL_GPU, metadata_on_device=True, sanitize=True)
    assert_close(got, cases.expected(inputs)[0], "float32")


@pytest.mark.parametrize("start", [-1, 25, 2**62], ids=str)
def test_two_query_tiles_give_nan_for_a_level_that_does_not_fit(start):
    inputs = TWO_TILES[0].inputs(seed=11)
    bad = {"shapes": inputs.shapes, "starts": [start, 99, 119]}
    got = emulator.forward(inputs, gpu=SMALL_GPU, metadata_on_device=True, sanitize=True, **bad)
    assert np.isnan(got).all()


@pytest.mark.parametrize("gpu", [SMALL_GPU, H100], ids=["throughput", "latency"])
def test_launches_for_throughput_and_for_latency(gpu):
    case = Case("wide", levels=((5, 6), (3, 3)), N=2, M=2, D=16, queries=45)
    check(case, ("float32", "float32"), gpu=gpu)


def test_levels_from_device_memory():
    for case in (PATHS[0], PATHS[6]):
        check(case, ("float32", "float32"), metadata_on_device=True)


@pytest.mark.parametrize("order", [1, 7], ids=["downwards", "scattered"])
def test_order_of_threads_does_not_matter(order):
    for case in (PATHS[0], PATHS[2]):
        inputs = case.inputs(seed=2)
        np.testing.assert_array_equal(emulator.forward(inputs, order=order), emulator.forward(inputs))
        for got, want in zip(emulator.backward(inputs, order=order), emulator.backward(inputs), strict=True):
            np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("wanted", cases.PARTIAL_GRADIENTS, ids=cases.gradient_names)
def test_only_the_gradients_that_are_wanted_are_written(wanted):
    inputs = PATHS[1].inputs(seed=3)
    _, want = cases.expected(inputs)
    grads = emulator.backward(inputs, wanted=wanted)
    for grad, exact, asked in zip(grads, want, wanted[:3], strict=True):
        if asked:
            assert_close(grad, exact, "float32")
        else:
            assert grad is None


@pytest.mark.parametrize("case", [PATHS[0], PATHS[1], PATHS[3]], ids=str)
def test_strided_value_under_the_sanitizers(case):
    inputs = case.inputs(seed=10)
    N, S, M, D = inputs.value.shape
    wide = np.full((N, 2, M, S, 2 * D), np.nan, np.float32)
    wide[:, 1, :, :, D:] = inputs.value.swapaxes(1, 2)
    strided = inputs._replace(value=wide[:, 1, :, :, D:].swapaxes(1, 2))
    want_output, want_grads = cases.expected(inputs)
    assert_close(emulator.forward(strided, sanitize=True), want_output, "float32")
    for grad, want in zip(emulator.backward(strided, sanitize=True), want_grads, strict=True):
        assert_close(grad, want, "float32")


@pytest.mark.parametrize("case", every_other([PATHS[0], PATHS[2], PATHS[7], VARIANTS[-1]]), ids=str)
def test_query_lengths_under_the_sanitizers(case):
    inputs = replace(case, N=3).inputs(seed=11)
    Q = inputs.locations.shape[1]
    lengths = (Q // 2, 0, Q)
    want_output, want_grads = cases.expected_ragged(inputs, lengths, **case.variant)
    for array in (inputs.locations, inputs.weights, inputs.grad_output):
        array[0, Q // 2 :] = array[1] = np.nan
    options = {"lengths": lengths, "variant": case.variant, "sanitize": True}
    assert_close(emulator.forward(inputs, **options), want_output, "float32")
    for grad, want in zip(emulator.backward(inputs, **options), want_grads, strict=True):
        assert_close(grad, want, "float32")
    assert_close(emulator.summation(inputs, **options), want_grads[0], "float32")


@pytest.mark.parametrize("hostile", every_other([-(2**63), 2**31, -1, 2**63 - 1]))
def test_hostile_lengths_under_the_sanitizers(hostile):
    inputs = CASES[0].inputs(seed=12)
    lengths = (0, 5) if hostile < 0 else (5, 5)
    described = emulator.lengths_of
    want = emulator.forward(inputs, lengths=lengths)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(emulator, "lengths_of", lambda _: described((hostile, 5)))
        np.testing.assert_array_equal(emulator.forward(inputs, lengths=lengths, sanitize=True), want)
        emulator.summation(inputs, lengths=lengths, sanitize=True)


def crowded(where, queries=150, S=None):
    """All samples on one pixel, so that a warp, or with little value a block, gets them all."""
    levels = ((20, 26), (13, 13)) if S is None else ((2, 3),)
    inputs = Case("crowded", levels=levels, N=1, M=1, D=32, P=4, queries=queries).inputs(seed=5)
    inputs.locations[:] = where
    return inputs


@pytest.mark.parametrize("S", [None, 6], ids=["few samples per value vector", "many"])
@pytest.mark.parametrize("where", [0.37, 0.0, 1.0, 2.0])
def test_all_samples_on_one_pixel(where, S):
    inputs = crowded(where, S=S)
    _, want = cases.expected(inputs)
    got = emulator.summation(inputs, sanitize=True), emulator.backward(inputs, sanitize=True)[0]
    for grad in got:
        np.testing.assert_allclose(grad, want[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("case", [PATHS[0], PATHS[8], PATHS[9], VARIANTS[-2]], ids=str)
def test_the_sorted_sum_does_not_depend_on_the_order_of_threads(case):
    inputs = case.inputs(seed=6)
    one = emulator.summation(inputs, variant=case.variant)
    for order in (1, 7, 12):
        np.testing.assert_array_equal(emulator.summation(inputs, variant=case.variant, order=order), one)


@pytest.mark.parametrize("order", [0, 1, 7])
@pytest.mark.parametrize("where", [None, 0.37])
def test_large_buckets_are_reduced_in_chunks(monkeypatch, where, order):
    """Buckets of many chunks, and others of one."""
    monkeypatch.setattr(sorted_heuristics, "SMALLEST_CHUNK", 64)
    inputs = Case("chunks_of_buckets", levels=((9, 11), (5, 6)), N=1, M=2, D=32, P=4, queries=400).inputs(seed=9)
    if where is not None:
        inputs.locations[:, ::2, 0] = where
    assert plan_backward.summation(emulator.prepare(inputs, False, None), 16, H100).queued
    got = emulator.summation(inputs, sanitize=True, order=order)
    assert_close(got, cases.expected(inputs)[1][0], "float32")
    np.testing.assert_array_equal(emulator.summation(inputs), got)


def test_slabs_and_groups_of_heads_change_nothing(monkeypatch):
    inputs = Case("slabs", levels=((15, 17), (4, 5)), N=2, M=3, D=8, queries=40).inputs(seed=7)
    one = emulator.summation(inputs)
    monkeypatch.setattr(sorted_heuristics, "MAX_BUCKETS", 4)
    monkeypatch.setattr(plan_backward, "WORKSPACE", 1 << 15)
    planned = plan_backward.summation(emulator.prepare(inputs, False, None), 16, H100)
    assert planned.pixels < 275
    assert 1 <= planned.heads < 6
    assert_close(emulator.summation(inputs, sanitize=True), one, "float32")


def test_64_bit_offsets_of_the_sorted_sum_under_the_sanitizers(monkeypatch):
    emulator.force_wide_index(monkeypatch, True)
    for case in (PATHS[0], PATHS[8]):
        inputs = case.inputs(seed=8)
        assert_close(emulator.summation(inputs, sanitize=True), cases.expected(inputs)[1][0], "float32")


BAD_LEVELS = {
    "negative height": ([[-6, 7], [3, 4]], [0, 42]),
    "product wraps around": ([[2**32, 2**32], [3, 4]], [0, 42]),
    "huge": ([[2**63 - 1, 2**63 - 1], [3, 4]], [0, 42]),
    "start beyond S": ([[6, 7], [3, 4]], [0, 54]),
    "huge start": ([[6, 7], [3, 4]], [0, 2**63 - 1]),
    "smallest start": ([[6, 7], [3, 4]], [-(2**63), 42]),
    "packed, wraps around": ([[2**62, 2], [3, 4]], None),
}


@pytest.mark.parametrize("name", BAD_LEVELS)
def test_hostile_metadata_under_the_sanitizers(name):
    shapes, starts = BAD_LEVELS[name]
    inputs = CASES[0].inputs()
    options = {"metadata_on_device": True, "shapes": shapes, "starts": starts, "sanitize": True}
    assert np.isnan(emulator.forward(inputs, **options)).all()
    grads = emulator.backward(inputs, **options)
    assert np.isnan(grads[1]).any()
    assert np.isnan(grads[2]).any()
    np.testing.assert_allclose(emulator.summation(inputs, **options), grads[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["negative height", "start beyond S"])
@pytest.mark.parametrize(
    "variant", [{"interpolation": "nearest"}, {"padding_mode": "border"}, {"align_corners": True}], ids=str
)
def test_hostile_metadata_in_variants(variant, name):
    """Where locations are clamped, too: a level that does not fit has no pixel to clamp them to."""
    shapes, starts = BAD_LEVELS[name]
    inputs = CASES[0].inputs()
    inputs.locations[:, 0] = 0.5
    options = {"metadata_on_device": True, "shapes": shapes, "starts": starts, "variant": variant}
    assert np.isnan(emulator.forward(inputs, **options)).all()
    bad = [h < 0 or start > 42 for (h, _), start in zip(shapes, starts, strict=True)]
    of_weights = emulator.backward(inputs, **options)[2]
    assert np.isnan(of_weights[..., bad, :]).all()
    assert np.isfinite(of_weights[..., [not one for one in bad], :]).all()


@pytest.mark.parametrize("bad", every_other([np.nan, -np.inf, np.inf, 1e30, 3e38]), ids=str)
def test_hostile_locations_under_the_sanitizers(bad):
    inputs = CASES[0].inputs(seed=4)
    inputs.locations[:, :, :, 0] = bad
    ordinary = inputs._replace(locations=np.where(np.isfinite(inputs.locations), inputs.locations, -9.0))
    assert_close(emulator.forward(inputs, sanitize=True), reference.forward(*ordinary[:5]), "float32")
    grads = emulator.backward(inputs, sanitize=True)
    assert not grads[1][:, :, :, 0].any()


@pytest.mark.parametrize("case", every_other(PATHS), ids=str)
def test_each_code_path_under_the_sanitizers(case):
    check(case, ("float32", "float32"), sanitize=True)


@pytest.mark.parametrize("pair", every_other([DTYPE_PAIRS[0], DTYPE_PAIRS[2], DTYPE_PAIRS[5]]), ids="-".join)
def test_each_dtype_under_the_sanitizers(pair):
    check(PATHS[1], pair, sanitize=True)


def test_64_bit_offsets_under_the_sanitizers(monkeypatch):
    emulator.force_wide_index(monkeypatch, True)
    check(PATHS[0], ("float32", "float32"), sanitize=True)
