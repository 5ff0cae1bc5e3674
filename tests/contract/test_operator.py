"""The operator agrees with the float64 reference on every backend, for every dtype, size, variant and framework."""

import numpy as np
import pytest

import cupy_msda
from tests.helpers import cases, reference
from tests.helpers.cases import CASES, DTYPE_PAIRS, SMALL_CASES, VARIANTS, Case
from tests.helpers.checks import check_operator, run_operator
from tests.helpers.tolerance import assert_close

pytestmark = pytest.mark.sanitizer


@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_size_agrees_with_the_reference(main_backend, case):
    check_operator(main_backend, case.inputs("float32"), "float32", "float32")


@pytest.mark.parametrize("pair", DTYPE_PAIRS, ids="-".join)
@pytest.mark.parametrize("case", [*SMALL_CASES[:4], Case("D33", D=33), Case("D30", D=30)], ids=str)
def test_every_dtype_agrees_with_the_reference(main_backend, case, pair):
    check_operator(main_backend, case.inputs(*pair, seed=1), *pair)


# On a GPU, blocks aggregate these samples before the atomics, and tensor cores multiply 16-bit vectors.
@pytest.mark.parametrize("pair", DTYPE_PAIRS, ids="-".join)
@pytest.mark.parametrize("D", [16, 32, 64, 128])
def test_many_samples_per_pixel_agree_with_the_reference(main_backend, D, pair):
    case = Case("many", levels=((5, 6), (3, 3)), N=2, M=2, D=D, P=3, queries=70)
    check_operator(main_backend, case.inputs(*pair, seed=4), *pair)


@pytest.mark.parametrize("pair", DTYPE_PAIRS, ids="-".join)
@pytest.mark.parametrize("case", VARIANTS, ids=str)
def test_every_variant_agrees_with_the_reference(main_backend, case, pair):
    check_operator(main_backend, case.inputs(*pair, seed=2), *pair, **case.variant)


@pytest.mark.parametrize("variant", [{"interpolation": "nearest"}, {"padding_mode": "border"}], ids=str)
def test_far_locations_are_clamped_and_nan_gives_zero(main_backend, variant):
    inputs = CASES[0].inputs(seed=3)
    inputs.locations[:, :, :, 0, 0] = 3e38
    inputs.locations[:, :, :, 1, 1] = -np.inf
    inputs.locations[:, 0, 0, 0, 1] = np.nan
    output, grads = run_operator(main_backend, inputs, **variant)
    clamped = inputs._replace(locations=np.clip(inputs.locations, -9, 9))
    want_output, want_grads = cases.expected(clamped, **variant)
    assert_close(output, want_output, "float32")
    for grad, want in zip(grads, want_grads, strict=True):
        assert_close(grad, want, "float32")


def test_nearest_reads_one_pixel(main_backend):
    inputs = Case("square", levels=((4, 4),), M=1, N=1).inputs(seed=4)
    inputs.locations[...] = 0.3  # pixel (1, 1) of 4 x 4
    inputs.value[0, np.arange(16) != 5] = np.nan
    output, grads = run_operator(main_backend, inputs, interpolation="nearest")
    assert_close(output, cases.expected(inputs, interpolation="nearest")[0], "float32")
    assert np.isfinite(grads[2]).all()
    assert not grads[1].any()


@pytest.mark.parametrize("pair", DTYPE_PAIRS, ids="-".join)
def test_every_framework_agrees_with_the_reference(backend, pair):
    if backend.name == "cupy" and "bfloat16" in pair:
        pytest.skip("this CuPy cannot make a bfloat16 array")
    check_operator(backend, CASES[0].inputs(*pair, seed=2), *pair)


@pytest.mark.parametrize("step", [1, 2, 3, 64, 10**6])
def test_im2col_step_has_no_divisibility_rule(main_backend, step):
    check_operator(main_backend, Case("three", N=3).inputs(seed=3), "float32", "float32", im2col_step=step)


@pytest.mark.parametrize("symbol", ["N", "Q", "S", "P", "L"])
def test_empty_dimension_gives_zeros(main_backend, symbol):
    case = {
        "N": Case("N", N=0),
        "Q": Case("Q", queries=0),
        "S": Case("S", levels=(), S=0),
        "P": Case("P", P=0),
        "L": Case("L", levels=(), S=5),
    }[symbol]
    inputs = case.inputs()
    output, grads = run_operator(main_backend, inputs)
    assert output.shape == (inputs.value.shape[0], inputs.locations.shape[1], 16)
    assert not output.any()
    for grad, array in zip(grads, (inputs.value, inputs.locations, inputs.weights), strict=True):
        assert grad.shape == array.shape
        assert not grad.any()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 1e30, -1e30, 3e38], ids=str)
def test_location_outside_the_level_gives_zero(main_backend, bad):
    inputs = CASES[0].inputs(seed=4)
    inputs.locations[:, :, :, 0] = bad
    finite = inputs._replace(locations=np.where(np.isfinite(inputs.locations), inputs.locations, -9.0))
    output, grads = run_operator(main_backend, inputs)
    want_output, want_grads = cases.expected(finite)
    assert_close(output, want_output, "float32")
    assert not grads[1][:, :, :, 0].any()
    assert not grads[2][:, :, :, 0].any()
    assert_close(grads[0], want_grads[0], "float32")


@pytest.mark.parametrize("special", [np.nan, np.inf], ids=str)
def test_special_value_reaches_only_the_outputs_that_use_it(main_backend, special):
    inputs = CASES[0].inputs(seed=5)
    ordinary = reference.forward(*inputs[:5])
    inputs.value[0, 0, 0, 0] = special
    inputs.value[1, -1, 1, 3] = special
    want = reference.forward(*inputs[:5])
    output, _ = run_operator(main_backend, inputs)
    assert not np.isfinite(want).all(), "the case must use the special pixel"
    np.testing.assert_array_equal(np.isnan(output), np.isnan(want))
    np.testing.assert_array_equal(np.isinf(output), np.isinf(want))
    usable = np.isfinite(want)
    assert_close(output[usable], ordinary[usable], "float32")


def test_nan_weight_reaches_only_its_query_and_head(main_backend):
    inputs = Case("inside", levels=((6, 7),)).inputs(seed=6)
    inputs.locations[...] = 0.4
    inputs.weights[1, 2, 0, 0, 1] = np.nan
    output, grads = run_operator(main_backend, inputs)
    want = np.zeros(output.shape, bool)
    want[1, 2, :8] = True
    np.testing.assert_array_equal(np.isnan(output), want)
    assert np.isnan(grads[1][1, 2, 0, 0, 1]).all()
    assert np.isfinite(grads[2]).all()


def test_all_samples_on_one_pixel_are_summed(main_backend):
    inputs = Case("collide", levels=((3, 3),), queries=300, M=1, N=1).inputs(seed=7)
    inputs.locations[...] = np.float32(0.42)
    check_operator(main_backend, inputs, "float32", "float32")


def test_noncontiguous_inputs_are_accepted(main_backend):
    inputs = CASES[0].inputs(seed=8)
    strided = []
    for array in inputs:
        if array is None or array.ndim == 2:
            strided.append(main_backend.put(array))
            continue
        wide = np.repeat(array, 2, axis=1)
        strided.append(main_backend.put(wide)[:, ::2])
    output = cupy_msda.ms_deform_attn(*strided[:5])
    assert_close(main_backend.get(output), reference.forward(*inputs[:5]), "float32")
    grads = cupy_msda.ms_deform_attn_backward(*strided, 64)
    for grad, want in zip(grads, reference.backward(*inputs), strict=True):
        assert_close(main_backend.get(grad), want, "float32")


@pytest.mark.parametrize("kind", ["list", "numpy-int32", "numpy-uint8", "framework", "framework-int32", "starts"])
def test_metadata_may_be_any_integers_of_any_framework(backend, kind):
    inputs = CASES[0].inputs(seed=9)
    shapes, starts = inputs.shapes, None
    if kind == "list":
        shapes = [tuple(int(n) for n in row) for row in shapes]
    elif kind.startswith("numpy"):
        shapes = shapes.astype(kind.partition("-")[2])
    elif kind == "framework":
        shapes, starts = backend.put(shapes), backend.put(np.array([0, 42]))
    elif kind == "framework-int32":
        shapes = backend.put(shapes.astype(np.int32))
    else:
        starts = [0, 42]
    put = [backend.put(array) for array in inputs]
    output = cupy_msda.ms_deform_attn(put[0], shapes, starts, put[3], put[4])
    assert_close(backend.get(output), reference.forward(*inputs[:5]), "float32")
