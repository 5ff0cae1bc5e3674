"""Sizes just below, at and just above what kernels and planner branch on; each test shows that its branch turns.

Sizes of a call cost nothing here where they need no other kernel: those tests take every size of a range.
"""

from dataclasses import replace

import ml_dtypes
import numpy as np
import pytest

import cupy_msda
from cupy_msda.call import Wanted
from cupy_msda.cuda import heuristics, plan, plan_backward, sorted_heuristics
from cupy_msda.cuda.axes import MAX_LEVELS_IN_REGISTERS, MAX_LEVELS_OF_WARP
from cupy_msda.cuda.gpu import H100
from tests.helpers import cases, emulator
from tests.helpers.cases import Case
from tests.helpers.emulator import SMALL_GPU
from tests.helpers.tolerance import assert_close

pytestmark = pytest.mark.skipif(emulator.COMPILER is None, reason="needs g++")

ONE_HEAD = Case("one_head", levels=((3, 4),), N=1, M=1, D=4, P=1)


def expected(inputs):
    """Output and gradients by the NumPy path in float64, which loops over no sample."""
    value, locations, weights, grad_output = (
        array.astype(np.float64) for array in (inputs.value, inputs.locations, inputs.weights, inputs.grad_output)
    )
    arguments = (value, inputs.shapes, inputs.starts, locations, weights)
    return cupy_msda.ms_deform_attn(*arguments), cupy_msda.ms_deform_attn_backward(*arguments, grad_output, 64)


def check_forward_and_backward(case, gpu=H100, seed=41):
    inputs = case.inputs(seed=seed)
    output, grads = expected(inputs)
    assert_close(emulator.forward(inputs, gpu=gpu), output, "float32")
    for got, want in zip(emulator.backward(inputs, gpu=gpu), grads, strict=True):
        assert_close(got, want, "float32")


def check_summation(case, seed=42):
    inputs = case.inputs(seed=seed)
    assert_close(emulator.summation(inputs), expected(inputs)[1][0], "float32")


def problem_of(case, *pair):
    return emulator.prepare(case.inputs(*pair), True, case.variant)


def around(threshold):
    return threshold - 1, threshold, threshold + 1


# ---- queries ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gpu", [SMALL_GPU, H100], ids=["one query tile per warp fills the GPU", "few queries"])
def test_blocks_hold_every_number_of_queries(gpu):
    def blocks(Q):
        found = problem_of(replace(ONE_HEAD, queries=Q))
        return [launch.grid[0] for launch in (plan.forward(found, 16, gpu), plan.backward(found, 16, gpu))]

    for kernel in range(2):
        full = next(Q for Q in range(1, 2000) if blocks(Q + 1)[kernel] == 2)
        assert [blocks(Q)[kernel] for Q in around(full)] == [1, 1, 2]
        for Q in (1, *around(full), 2 * full, 2 * full + 1):
            check_forward_and_backward(replace(ONE_HEAD, queries=Q), gpu)


@pytest.mark.parametrize("gpu", [SMALL_GPU, H100], ids=["tiles of neighbouring patches", "few queries"])
def test_tiles_of_pixels_fit_levels_of_every_width(gpu):
    """The tile of a query is found by a division that is exact for every width."""
    for W in (*range(1, 50), *around(64), *around(128)):
        case = replace(ONE_HEAD, levels=((10, W), (2, 3)), queries=None)
        inputs = case.inputs(seed=W)
        output, grads = expected(inputs)
        assert_close(emulator.forward(inputs, gpu=gpu), output, "float32", f"width {W}")
        if W % 5 == 1:
            assert_close(emulator.backward(inputs, gpu=gpu)[1], grads[1], "float32", f"width {W}")


@pytest.mark.parametrize("H", [1, *around(8), *around(16), 33])
def test_tiles_of_pixels_fit_levels_of_every_height(H):
    check_forward_and_backward(replace(ONE_HEAD, levels=((H, 7), (3, H)), queries=None), SMALL_GPU)


def test_more_queries_than_tiles_are_exact_for_are_taken_in_their_order(monkeypatch):
    case = replace(ONE_HEAD, levels=((5, 6), (3, 3)), queries=None)
    tiled = []
    for most in around(39):
        monkeypatch.setattr(heuristics, "MAX_TILED_QUERIES", most)
        tiled.append(plan.forward(problem_of(case), 16, SMALL_GPU).spec.queries.tile_rows > 0)
        check_forward_and_backward(case, SMALL_GPU)
    assert tiled == [False, True, True]


CROSS_LEVEL_SHAPES = {
    "halved": lambda H: ((H, 6), (-(-H // 2), 3), (-(-H // 4), 2)),
    "halved and rounded down": lambda H: ((H, 5), (max(H // 2, 1), 4), (max(H // 4, 1), 1)),
    "of one height": lambda H: ((H, 1), (H, 2), (H, 5)),
    "tallest last": lambda H: ((1, 9), (max(H - 1, 1), 2), (H, 4)),
}


@pytest.mark.parametrize("name", CROSS_LEVEL_SHAPES)
def test_tiles_across_levels_fit_every_height(name):
    """Bands of rows: a level has a row more or less than whole bands, no row in a band, or is the only tall one."""
    for H in range(1, 36):
        case = replace(ONE_HEAD, levels=CROSS_LEVEL_SHAPES[name](H), D=32, P=2, queries=None)
        assert plan.backward(
            problem_of(case), 16, H100, aggregated=emulator.is_dense(problem_of(case))
        ).spec.aggregation_bits
        inputs = case.inputs(seed=H)
        for got, want in zip(emulator.backward(inputs), expected(inputs)[1], strict=True):
            assert_close(got, want, "float32", f"height {H}")


# ---- levels, samples and channels ------------------------------------------------------------------------------------


@pytest.mark.parametrize("L", [*around(MAX_LEVELS_IN_REGISTERS)[1:], *around(MAX_LEVELS_OF_WARP)[1:]])
def test_levels_in_registers_and_levels_of_a_warp(L):
    case = replace(ONE_HEAD, levels=((2, 3),) * L, N=4, M=4, D=32, queries=None)
    spec = plan.forward(problem_of(case), 16, SMALL_GPU).spec
    assert spec.levels_in_registers == (L <= MAX_LEVELS_IN_REGISTERS)
    assert bool(spec.queries.tile_rows) == (L <= MAX_LEVELS_OF_WARP)
    check_forward_and_backward(case, SMALL_GPU)


def most_in_chunk(gpu, D):
    """The most samples of a query that the forward takes at a time."""
    case = replace(ONE_HEAD, D=D)
    return next(
        P - 1 for P in range(1, 400) if plan.forward(problem_of(replace(case, P=P)), 16, gpu).spec.queries.chunk < P
    )


@pytest.mark.parametrize("chunks", [1, 2])
@pytest.mark.parametrize("gpu", [SMALL_GPU, H100], ids=["unrolled", "loops"])
def test_samples_of_a_query_in_chunks(gpu, chunks):
    most = chunks * most_in_chunk(gpu, 16)
    for P in around(most):
        case = replace(ONE_HEAD, D=16, P=P)
        assert -(-P // plan.forward(problem_of(case), 16, gpu).spec.queries.chunk) == chunks + (most < P)
        check_forward_and_backward(case, gpu)


@pytest.mark.parametrize("D", [7, 128, 132, 512, 516])
def test_lanes_and_channel_tiles(D):
    check_forward_and_backward(replace(ONE_HEAD, D=D, P=2))
    check_summation(replace(ONE_HEAD, D=D, P=2))


def test_channel_tiles_turn_at_32_vectors():
    found = [plan.forward(problem_of(replace(ONE_HEAD, D=D)), 16, H100).spec for D in (128, 132, 512, 516)]
    assert [spec.channels.channel_tiles for spec in found] == [1, 2, 4, 5]


# ---- the sorted sum --------------------------------------------------------------------------------------------------


def summation_of(case):
    return plan_backward.summation(problem_of(case), 16, H100)


@pytest.mark.parametrize("height", [40, 400], ids=["reduced by blocks", "reduced by warps"])
@pytest.mark.parametrize("runs", [1, 2, 8, 33])
def test_sorted_runs_of_every_number(runs, height):
    """Warps and lanes of the later kernels share the runs: as many as they are, fewer and more."""
    case = replace(ONE_HEAD, levels=((height, 20),), P=4)
    samples = summation_of(case).sort.spec.chunk * summation_of(case).sort.spec.bounds.warps
    for surplus in (-1, 0) if runs == 2 else (0,):
        queries = (runs * samples) // 4 + surplus
        assert summation_of(replace(case, queries=queries)).runs == runs
        check_summation(replace(case, queries=queries))


def test_more_queries_than_16_bits_count():
    """Only queries from 65,536 on have a gradient: those of the same number without its upper bits have none."""
    first, queries = 2**16, 2**16 + 40
    inputs = replace(ONE_HEAD, levels=((8, 8),), P=1, queries=queries).inputs(seed=44)
    inputs.grad_output[:, :first] = 0
    few = inputs._replace(**{
        name: np.ascontiguousarray(getattr(inputs, name)[:, first:])
        for name in ("locations", "weights", "grad_output")
    })  # fmt: skip
    assert_close(emulator.summation(inputs), expected(few)[1][0], "float32")


@pytest.mark.parametrize("buckets", [1, 2, *around(32), *around(64)])
def test_buckets_of_every_number(buckets, monkeypatch):
    monkeypatch.setattr(sorted_heuristics, "SMALLEST_CHUNK", 64)
    size = summation_of(replace(ONE_HEAD, queries=2000)).reduce.spec.bucket_size
    for S in around(buckets * size)[:2] if buckets < 32 else (buckets * size,):
        case = replace(ONE_HEAD, levels=((1, S),), N=2, P=4, queries=max(100, S // 4))
        planned = summation_of(case)
        assert planned.buckets >= buckets
        assert planned.queued
        inputs = case.inputs(seed=43)
        inputs.locations[:, ::2] = 0.5 / S  # the first bucket, in chunks
        assert_close(emulator.summation(inputs), expected(inputs)[1][0], "float32")


@pytest.mark.parametrize("S", [20_799, 98_176, 98_177])
def test_many_buckets_of_a_block(S):
    """The beginnings of all segments are in shared memory; with more than 1536 buckets the image is done in slabs."""
    case = replace(ONE_HEAD, levels=((1, S),), queries=300)
    planned = summation_of(case)
    assert planned.reduce.spec.bucket_size == sorted_heuristics.MAX_BUCKET_SIZE
    assert -(-S // planned.pixels) == 1 + (S > (1536 - 2) * 64)
    inputs = case.inputs(seed=44)
    assert_close(emulator.summation(inputs, sanitize=True), expected(inputs)[1][0], "float32")


def test_a_bucket_of_just_two_chunks_is_not_split(monkeypatch):
    monkeypatch.setattr(sorted_heuristics, "SMALLEST_CHUNK", 256)
    for contributions in (*around(2 * 256), *around(3 * 256)):
        # In a level one pixel high a sample has one contribution.
        case = replace(ONE_HEAD, levels=((1, 256),), queries=contributions + 4 * 256)
        assert summation_of(case).queued
        inputs = case.inputs(seed=45)
        inputs.locations[..., 0] = np.linspace(0.5, 0.98, case.queries)[:, None, None, None]
        inputs.locations[:, :contributions, ..., 0] = 2.75 / 256  # pixels 2 and 3, in the first bucket
        inputs.locations[..., 1] = 0.5
        assert_close(emulator.summation(inputs), expected(inputs)[1][0], "float32")


def test_heads_of_few_contributions_have_no_chunks(monkeypatch):
    monkeypatch.setattr(sorted_heuristics, "SMALLEST_CHUNK", 256)
    queries = around(4 * 256 // 2)
    assert [bool(summation_of(replace(ONE_HEAD, queries=Q)).queued) for Q in queries] == [False, False, True]


def test_a_warp_sorts_batches_of_buckets_with_many_contributions():
    batches, S = [], 48
    for queries in around(sorted_heuristics.SORTED_FROM * S // (2 * 64 * 4)):
        case = replace(ONE_HEAD, levels=((6, 8),), P=4, queries=queries)
        batches.append(summation_of(case).reduce.spec.chunk)
        check_summation(case)
    assert batches == [32, 128, 128]


@pytest.mark.parametrize("contributions", [1, 31, 32, 33, 127, 128, 129, 257])
@pytest.mark.parametrize("chunk", [32, 128])
def test_batches_of_every_size(contributions, chunk, monkeypatch):
    monkeypatch.setattr(sorted_heuristics, "SORTED_FROM", 0 if chunk == 128 else 10**9)
    # In a level one pixel high a sample has one contribution.
    case = replace(ONE_HEAD, levels=((1, 40),), P=1, queries=contributions)
    assert summation_of(case).reduce.spec.chunk == chunk
    inputs = case.inputs(seed=47)
    inputs.locations[..., 1] = 0.5
    assert_close(emulator.summation(inputs), expected(inputs)[1][0], "float32")


@pytest.mark.parametrize("levels", [((16, 40), (4, 4), (1, 1)), ((2, 3), (16, 40)), ((1, 1),) * 33], ids=len)
@pytest.mark.parametrize("fewest", [1, 8, 10**6])
def test_bucket_sizes_by_level(levels, fewest, monkeypatch):
    """Small buckets where a level gets many contributions, up to one region per level."""
    monkeypatch.setattr(sorted_heuristics, "FEWEST_CONTRIBUTIONS", fewest)
    monkeypatch.setattr(sorted_heuristics, "MOST_CONTRIBUTIONS", max(fewest, 2))
    check_summation(replace(ONE_HEAD, levels=levels, N=2, P=2, queries=40))


@pytest.mark.parametrize("K", [3, 8, 17, 32, 33])
def test_samples_of_a_fused_call_are_sorted_or_materialised(K):
    inputs = cases.to_fused(replace(ONE_HEAD, P=K, queries=70).inputs(seed=46))
    found = emulator.prepare(inputs, False, None)
    assert sorted_heuristics.is_materialised(found) == (K not in (1, 2, 4, 8, 16, 32))
    output, grads = cases.expected_fused(inputs)
    assert_close(emulator.forward(inputs), output, "float32")
    assert_close(emulator.summation(inputs), grads[0], "float32")
    for got, want in zip(emulator.backward(inputs, wanted=Wanted(references=True)), grads, strict=True):
        assert_close(got, want, "float32")


# ---- kernels over elements -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("count", [0, 1, 2, 3, 4, 5, 7, 8, *around(1024), *around(2048)])
def test_a_cast_writes_every_element_and_no_other(count, dtype):
    source = np.random.default_rng(count).standard_normal(count + 8).astype(np.float32)
    target = np.full(count + 8, 7, cases.dtype_of(dtype))
    launch = plan.cast_gradient(dtype, count)
    assert launch.grid[0] == max(1, -(-count // (4 * launch.threads)))
    emulator.launch(launch, {"source": source, "target": target, "count": count})
    np.testing.assert_array_equal(target[:count], source[:count].astype(target.dtype))
    assert (target[count:] == 7).all()


@pytest.mark.parametrize("blocks", [1, 2])
def test_a_cast_by_fewer_blocks_than_it_has_elements_for(blocks):
    source = np.random.default_rng(1).standard_normal(5000).astype(np.float32)
    target = np.zeros(5000, np.float16)
    launch = replace(plan.cast_gradient("float16", 5000), grid=(blocks, 1, 1))
    emulator.launch(launch, {"source": source, "target": target, "count": 5000})
    np.testing.assert_array_equal(target, source.astype(np.float16))


@pytest.mark.parametrize("queries", [*around(64), *around(128)])
def test_gradients_of_reference_points_by_several_blocks(queries):
    inputs = cases.to_fused(replace(ONE_HEAD, M=2, queries=queries).inputs(seed=47), coordinates=4)
    want = cases.expected_fused(inputs)[1][3]
    assert_close(emulator.backward(inputs, wanted=Wanted(references=True))[3], want, "float32")


# ---- numbers ---------------------------------------------------------------------------------------------------------


def sixteen_bit_edges(dtype):
    """Numbers of a 16-bit dtype, those half-way between two of them, their neighbours, and the ends of the range."""
    bits = np.arange(0, 2**16, 7, dtype=np.uint16)
    with np.errstate(invalid="ignore"):
        exact = bits.view(dtype).astype(np.float32)
    exact = exact[np.isfinite(exact)]
    following = np.nextafter(exact.astype(dtype), dtype.type(np.inf)).astype(np.float32)
    half = ((exact.astype(np.float64) + following) / 2).astype(np.float32)
    around_half = [half, np.nextafter(half, np.float32(np.inf)), np.nextafter(half, np.float32(-np.inf))]
    ends = np.array([0.0, -0.0, np.inf, -np.inf, np.nan, 65504, 65519, 65520, 3.4e38, 1e-45, 6e-8], np.float32)
    return np.concatenate((exact, *around_half, ends))


@pytest.mark.parametrize("dtype", [np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16)], ids=str)
def test_a_cast_rounds_to_the_nearest_and_to_even(dtype):
    source = sixteen_bit_edges(dtype)
    target = np.zeros(source.size, dtype)
    emulator.launch(
        plan.cast_gradient(dtype.name, source.size), {"source": source, "target": target, "count": source.size}
    )
    with np.errstate(over="ignore"):
        want = source.astype(dtype)
    nan = np.isnan(want)
    np.testing.assert_array_equal(np.isnan(target), nan)
    np.testing.assert_array_equal(target[~nan].view(np.uint16), want[~nan].view(np.uint16))
