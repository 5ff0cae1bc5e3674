"""The NumPy path: tasks, blocks, groups, threads and memory. tests/contract/test_operator.py tests the formula."""

import concurrent.futures
import dataclasses
import tracemalloc

import ml_dtypes
import numpy as np
import pytest

import cupy_msda
from cupy_msda import api
from cupy_msda.call import PLAIN, Wanted
from cupy_msda.cpu import backward, cells, tasks
from cupy_msda.cpu import forward as forward_module
from tests.helpers import cases, non_finite
from tests.helpers.backends import NumPyBackend
from tests.helpers.calls import call_of
from tests.helpers.checks import run_operator
from tests.helpers.tolerance import assert_close


@pytest.fixture(autouse=True)
def _numpy_tier(monkeypatch):
    monkeypatch.setenv("CUPY_MSDA_CPU", "numpy")


# More samples per head than are worked on at all levels at once.
MANY = backward.ALL_LEVELS_SAMPLES + 1


def inputs(levels=((9, 11), (5, 4)), N=1, Q=7, M=4, D=8, P=2, starts=None, S=None, spread=0.6, seed=0):
    """value, levels, starts, locations, weights, grad_output; samples in every cell, and outside."""
    rng = np.random.default_rng(seed)
    L, S = len(levels), S or sum(h * w for h, w in levels)
    locations = 0.5 + spread * rng.uniform(-1, 1, (N, Q, M, L, P, 2))
    value, weights = rng.standard_normal((N, S, M, D)), rng.random((N, Q, M, L, P))
    return value, levels, starts, locations, weights, rng.standard_normal((N, Q, M * D))


def exact(value, levels, starts, locations, weights, grad_output):
    """Output and gradients in float64 by an implementation that shares nothing with the NumPy path."""
    torch = pytest.importorskip("torch")
    from cupy_msda.torch.reference import gather_attention

    leaves = [torch.from_numpy(a.astype(np.float64)).requires_grad_() for a in (value, locations, weights)]
    starts = None if starts is None else torch.tensor(starts)
    output = gather_attention(leaves[0], torch.tensor(levels), starts, *leaves[1:])
    grads = torch.autograd.grad(output, leaves, torch.from_numpy(grad_output.astype(np.float64)))
    return [output.detach().numpy(), *(grad.numpy() for grad in grads)]


def results(value, levels, starts, locations, weights, grad_output):
    return [
        cupy_msda.ms_deform_attn(value, levels, starts, locations, weights),
        *cupy_msda.ms_deform_attn_backward(value, levels, starts, locations, weights, grad_output, 64),
    ]


CASES = {
    "several heads per task": {},
    "all levels at once, one head": {"M": 1},
    "one head per task": {"Q": MANY // 4, "M": 3},
    "blocks of queries": {"Q": backward.SORTED_SAMPLES // 2 + 100, "M": 1, "P": 2, "levels": ((9, 11),), "D": 4},
    "overlapping levels": {"starts": (0, 40), "S": 110},
    "gap between levels": {"starts": (3, 130), "S": 160},
    "more than 65536 cells": {"levels": ((300, 260), (5, 4)), "Q": 200},
    "one cell": {"spread": 0.01, "Q": 1500},
    "everything outside": {"levels": ((4, 4),), "spread": 0.0, "Q": 50},
    "five heads": {"M": 5, "Q": 40},
    "odd channels": {"D": 7},
    "images of one query": {"N": 600, "Q": 1, "levels": ((4, 5), (2, 3))},
    "images whose value is copied": {"N": 5, "Q": 40, "levels": ((3, 4), (2, 2))},
    "images whose value is read in place": {"N": 5, "Q": 2, "levels": ((9, 11), (5, 4))},
    "images of several blocks": {"N": 5, "Q": 300, "M": 1, "levels": ((9, 11),)},
    "images with overlapping levels": {"N": 5, "Q": 3, "starts": (0, 40), "S": 110},
}


@pytest.mark.parametrize(("N", "M", "found"), [(5, 2, [2, 2, 1]), (4, 2, [2, 2]), (2, 2, [1, 1]), (1, 2, [1, 1])])
def test_small_images_share_a_task(monkeypatch, N, M, found):
    """As many images as have the samples of one task; where one task would have all of them, half of the heads."""
    monkeypatch.setattr(tasks, "TASK_SAMPLES", 2 * M * 7 * 4)
    monkeypatch.setattr(tasks, "ONE_TASK_SAMPLES", 0)
    problem = call_of(*inputs(N=N, M=M)).problem
    divided = tasks.divide(problem, None)
    assert [task.image_count for task in divided] == found
    assert {(image, head) for task in divided for image in range(N)[task.images] for head in range(M)[task.heads]} == {
        (image, head) for image in range(N) for head in range(M)
    }


@pytest.mark.parametrize(("Q", "count"), [(511, 1), (512, 1), (513, 2)])
def test_a_small_call_is_one_task(Q, count):
    problem = call_of(*inputs(N=4, M=2, Q=Q)).problem
    assert tasks.ONE_TASK_SAMPLES == 4 * 2 * 512 * problem.K
    assert len(tasks.divide(problem, None)) == count


def test_a_small_call_whose_sums_take_much_memory_is_several_tasks():
    problem = call_of(*inputs(N=4, M=2, Q=1, levels=((600, 400),), D=8)).problem
    assert len(tasks.divide(problem, None)) == 8


@pytest.mark.parametrize("wanted", [Wanted(), Wanted(locations=False), Wanted(value=False), Wanted(weights=False)])
@pytest.mark.parametrize("pair", [("float32", "float32"), ("bfloat16", "float32"), ("float16", "float16")], ids=str)
@pytest.mark.parametrize("variant", [{}, {"num_points": (1, 4)}, {"padding_mode": "border"}], ids=str)
def test_images_of_one_task_do_not_mix(monkeypatch, pair, variant, wanted):
    """Each image gives the bits that it gives alone, whatever NaN is in the others."""
    case = cases.Case("images", levels=((5, 6), (3, 3)), N=5, M=3, D=4, queries=6, variant=variant)
    whole = case.inputs(*pair, seed=5)
    whole.value[1:4:2] = np.nan
    monkeypatch.setattr(tasks, "ONE_TASK_SAMPLES", 0)
    monkeypatch.setattr(tasks, "TASK_SAMPLES", 3 * 3 * 6 * 5)

    def run(inputs):
        call = call_of(*inputs[:6], wanted=wanted, variant=PLAIN._replace(**variant))
        return [api.forward(call), *(grad for grad in api.backward(call) if grad is not None)]

    together = run(whole)
    for image in range(5):
        alone = whole._replace(**{
            name: np.ascontiguousarray(getattr(whole, name)[image : image + 1])
            for name in ("value", "locations", "weights", "grad_output")
        })  # fmt: skip
        for have, want in zip(together, run(alone), strict=True):
            np.testing.assert_array_equal(have[image : image + 1].astype(np.float64), want.astype(np.float64))


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_every_code_path_agrees_with_torch(name, dtype):
    drawn = inputs(**CASES[name])
    arrays = [a.astype(dtype) if isinstance(a, np.ndarray) else a for a in drawn]
    if name == "everything outside":
        arrays[3] += 7
    for index, (have, want) in enumerate(zip(results(*arrays), exact(*arrays), strict=True)):
        if index == 2 and dtype == "float32":
            continue  # rounding may move a sample across a pixel centre, where the gradient jumps
        if not want.any():
            assert not have.any()
        else:
            assert_close(have, want, dtype)


@pytest.mark.parametrize("dtypes", [("float16", "float16"), ("float16", "float32"), ("bfloat16", "float32")], ids=str)
@pytest.mark.parametrize("Q", [7, MANY // 4], ids=["all levels at once", "level by level"])
def test_sixteen_bit_dtypes_agree_with_torch(dtypes, Q):
    value, locations = (np.dtype(getattr(ml_dtypes, d, d)) for d in dtypes)
    drawn = inputs(Q=Q)
    arrays = [drawn[0].astype(value), *drawn[1:3], drawn[3].astype(locations), drawn[4].astype(locations),
              drawn[5].astype(value)]  # fmt: skip
    want = exact(*[a.astype(np.float64) if isinstance(a, np.ndarray) else a for a in arrays])
    for index, (have, right) in enumerate(zip(results(*arrays), want, strict=True)):
        if index != 2:
            assert_close(have.astype(np.float64), right, dtypes[0])


@pytest.mark.parametrize("Q", [7, MANY // 4], ids=["all levels at once", "level by level"])
def test_result_does_not_depend_on_the_number_of_threads(monkeypatch, Q):
    monkeypatch.setattr(tasks, "ONE_TASK_SAMPLES", 0)
    drawn = [a.astype(np.float32) if isinstance(a, np.ndarray) else a for a in inputs(N=2, Q=Q)]
    runs = []
    for threads in ("1", "2", "3", "7"):
        monkeypatch.setenv("CUPY_MSDA_NUM_THREADS", threads)
        runs.append(results(*drawn))
    for run in runs[1:]:
        for have, want in zip(run, runs[0], strict=True):
            np.testing.assert_array_equal(have, want)


def test_calls_from_a_thread_pool_are_right(monkeypatch):
    monkeypatch.setattr(tasks, "ONE_TASK_SAMPLES", 0)
    drawn = [a.astype(np.float32) if isinstance(a, np.ndarray) else a for a in inputs()]
    want = results(*drawn)
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        for run in pool.map(lambda _: results(*drawn), range(8)):
            for have, right in zip(run, want, strict=True):
                np.testing.assert_array_equal(have, right)


@pytest.mark.parametrize("count", ["1", "3"])
def test_error_of_a_thread_reaches_the_caller(monkeypatch, count):
    def fail(task, inputs, output):
        raise MemoryError(f"image {task.images.start}")

    monkeypatch.setenv("CUPY_MSDA_NUM_THREADS", count)
    monkeypatch.setattr(tasks, "ONE_TASK_SAMPLES", 0)
    monkeypatch.setattr(forward_module, "forward_task", fail)
    with pytest.raises(MemoryError, match="image"):
        cupy_msda.ms_deform_attn(*inputs(N=3)[:5])


@pytest.mark.parametrize("special", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("Q", [6, MANY], ids=["all levels at once", "level by level"])
def test_special_values_reach_only_the_outputs_that_use_them(special, Q):
    """A corner pixel; samples near it on the level's edge, in the middle of the level, and outside."""
    value = np.ones((1, 16, 2, 3))
    value[0, 0, 0, 1] = special
    pixels = np.array([[-0.4, -0.3], [-0.4, 0.3], [0.2, 0.1], [2.2, 1.7], [-3.0, 0.0], [np.nan, 0.0]])
    locations = np.resize((pixels + 0.5) / 4, (Q, 2))[None, :, None, None, None].repeat(2, 2)
    weights = np.ones((1, Q, 2, 1, 1))
    output = cupy_msda.ms_deform_attn(value, [(4, 4)], None, locations, weights).reshape(Q, 2, 3)
    reached = np.resize([True, True, True, False, False, False], Q)
    if np.isnan(special):
        assert np.isnan(output[reached, 0, 1]).all()
    else:
        np.testing.assert_array_equal(output[reached, 0, 1], special)
    output[reached, 0, 1] = 0
    assert np.isfinite(output).all()


@pytest.mark.parametrize("name", ["grad_output", "weights"])
def test_infinity_of_a_sample_stays_infinite_in_an_incomplete_group(name):
    """Three samples of a cell, and one of padding that repeats the last."""
    value, levels, starts, locations, weights, grad_output = inputs(levels=((4, 4),), Q=3, M=1, D=2, P=1, spread=0.01)
    grad_output[...] = 1
    {"grad_output": grad_output, "weights": weights}[name][0, -1] = np.inf
    grad_value = cupy_msda.ms_deform_attn_backward(value, levels, starts, locations, weights, grad_output, 64)[0]
    np.testing.assert_array_equal(grad_value[0, [5, 6, 9, 10]], np.inf)
    assert np.isinf(grad_value).sum() == 4 * 2


@pytest.mark.parametrize("S", [non_finite.PIXELS, 400], ids=["copied heads", "the caller's array"])
@pytest.mark.parametrize("kind", non_finite.PLAIN_KINDS)
@pytest.mark.parametrize("name", non_finite.VARIANTS)
def test_non_finite_numbers_level_by_level(monkeypatch, name, kind, S):
    monkeypatch.setattr(backward, "ALL_LEVELS_SAMPLES", 0)
    arrays, variant = non_finite.plain(kind, S=S), non_finite.VARIANTS[name]
    output, grads = run_operator(NumPyBackend(), arrays, **variant)
    non_finite.check_plain(output, grads, arrays, ("float32", "float32"), **variant)


LEVELS = ((100, 167), (50, 84), (25, 42), (13, 21))


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize(("N", "Q"), [(1, 30000), (3, 9000), (8, 300)])
def test_temporary_memory_is_bounded(monkeypatch, dtype, N, Q):
    monkeypatch.setenv("CUPY_MSDA_NUM_THREADS", "2")
    S, M, D, P, L = sum(h * w for h, w in LEVELS), 8, 32, 4, len(LEVELS)
    rng = np.random.default_rng(0)
    locations = rng.random((N, Q, M, L, P, 2), np.float32).astype(dtype)
    arrays = (np.ones((N, S, M, D), dtype), LEVELS, None, locations, np.ones((N, Q, M, L, P), dtype))
    grad_output = np.ones((N, Q, M * D), dtype)
    for call in (
        lambda: [cupy_msda.ms_deform_attn(*arrays)],
        lambda: cupy_msda.ms_deform_attn_backward(*arrays, grad_output, 64),
    ):
        tracemalloc.start()
        try:
            found = call()
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        assert peak <= sum(a.nbytes for a in found) + (64 << 20)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("Q", [7, 3000])
@pytest.mark.parametrize("wanted", [*cases.PARTIAL_GRADIENTS, Wanted(False, False, False)], ids=cases.gradient_names)
def test_only_wanted_gradients_are_computed(dtype, Q, wanted):
    value, levels, _, locations, weights, grad_output = inputs(Q=Q)
    arrays = [array.astype(dtype) for array in (value, locations, weights, grad_output)]
    call = call_of(arrays[0], levels, None, *arrays[1:])
    every = api.backward(call)
    some = api.backward(dataclasses.replace(call, wanted=wanted))
    for grad, want, asked in zip(some, every, wanted, strict=True):
        if asked:
            np.testing.assert_array_equal(grad, want)
        else:
            assert grad is None


@pytest.mark.parametrize("empty", [{"Q": 0}, {"D": 0}], ids=str)
def test_gradients_of_an_empty_fused_call_are_contiguous(empty):
    """As those of other calls, whatever the strides of the inputs."""
    value, levels, _, offsets, logits, grad_output = inputs(**empty)
    references = np.ones((1, offsets.shape[1], 2, 4))
    arrays = [np.asfortranarray(array) for array in (value, references, offsets, logits)]
    grads = cupy_msda.ms_deform_attn_fused_backward(arrays[0], levels, None, *arrays[1:], grad_output)
    assert all(grad.flags.c_contiguous for grad in grads)


def test_crowded_cell_takes_long_groups():
    """Half of the samples are in one cell, which gets longer groups than the other cells."""
    arguments = inputs(levels=((40, 40),), M=2, D=4, Q=2000, spread=0.5)
    arguments[3][:, ::2] = 0.511
    per_cell = 2000 * 2 / 40**2
    assert cells.MAX_PASSES * 4 * per_cell < 2000
    assert 3 * cells.MAX_GROUP < 2000
    for have, want in zip(results(*arguments), exact(*arguments), strict=True):
        assert_close(have, want, "float64")


CLAMPED = {
    "border": {"padding_mode": "border"},
    "border, align_corners": {"padding_mode": "border", "align_corners": True},
    "nearest": {"interpolation": "nearest"},
}


@pytest.mark.parametrize("W", [2**24 + 3, 2**24 + 4])
@pytest.mark.parametrize("name", CLAMPED)
def test_clamped_location_is_the_last_pixel_of_a_level_wider_than_float32_counts(name, W):
    value = np.zeros((1, W, 1, 1), np.float16)
    value[0, -3:, 0, 0] = 1, 2, 3
    locations = np.full((1, 1, 1, 1, 1, 2), 2, np.float32)
    weights, grad_output = np.ones((1, 1, 1, 1, 1), np.float32), np.ones((1, 1, 1), np.float16)
    arrays = value, [(1, W)], None, locations, weights
    assert cupy_msda.ms_deform_attn(*arrays, **CLAMPED[name]) == 3
    of_value, of_locations, of_weights = cupy_msda.ms_deform_attn_backward(*arrays, grad_output, 64, **CLAMPED[name])
    np.testing.assert_array_equal(np.flatnonzero(of_value), W - 1)
    assert not of_locations.any()
    assert of_weights == 3
