"""naive.cu and the Python code that launches it, on the CPU, against the reference."""

from dataclasses import replace

import numpy as np
import pytest

from cupy_msda.call import ALL
from cupy_msda.cuda import naive
from tests.helpers import cases, emulated_naive, emulator
from tests.helpers.cases import CASES, DTYPE_PAIRS, PARTIAL_GRADIENTS, VARIANTS, Case
from tests.helpers.emulated_naive import backward, forward
from tests.helpers.tolerance import assert_close

pytestmark = pytest.mark.skipif(emulator.COMPILER is None, reason="needs g++")
device = pytest.fixture(autouse=True)(emulated_naive.device)

SMALL = [case for case in CASES if case.name in ("plain", "one_pixel_levels", "overlapping_levels", "D33")]
FORMS = [
    {"coordinates": 2, "packed": False},
    {"coordinates": 2, "levels": 1, "packed": True},
    {"coordinates": 4, "packed": True},
    {"coordinates": 4, "levels": 1, "packed": False},
]
NAMES = ("grad_value", "grad_locations", "grad_weights", "grad_references")


def check_gradients(inputs, grads, want, dtypes, num_points=None):
    for name, got, expected, dtype in zip(NAMES, grads, want, dtypes, strict=False):
        if name == "grad_locations" and not hasattr(inputs, "references"):
            got, expected = (cases.pixel_units(grad, inputs.shapes, num_points) for grad in (got, expected))
        if expected is not None:
            assert_close(got, expected, dtype, name)


def check(case, pair=("float32", "float32"), seed=0):
    inputs = case.inputs(*pair, seed=seed)
    want_output, want_grads = cases.expected(inputs, **case.variant)
    assert_close(forward(inputs, **case.variant), want_output, pair[0])
    grads = backward(inputs, **case.variant)
    check_gradients(inputs, grads, want_grads, (pair[0], pair[1], pair[1]), case.variant.get("num_points"))


@pytest.mark.parametrize("case", SMALL, ids=str)
def test_each_size_computes_the_reference(case):
    check(case)


@pytest.mark.parametrize("pair", DTYPE_PAIRS, ids="-".join)
def test_each_dtype_computes_the_reference(pair):
    check(SMALL[0], pair, seed=1)


@pytest.mark.parametrize("case", VARIANTS, ids=str)
def test_each_variant_computes_the_reference(case):
    check(case, seed=2)


@pytest.mark.parametrize("pair", [DTYPE_PAIRS[1], DTYPE_PAIRS[3]], ids="-".join)
@pytest.mark.parametrize("form", FORMS, ids=str)
def test_each_fused_form_computes_the_reference(form, pair):
    inputs = cases.to_fused(SMALL[0].inputs(*pair), **form)
    want_output, want_grads = cases.expected_fused(inputs)
    assert_close(forward(inputs), want_output, pair[0])
    dtypes = (pair[0], pair[1], pair[1], inputs.references.dtype.name)
    check_gradients(inputs, backward(inputs), want_grads, dtypes)


@pytest.mark.parametrize("wanted", PARTIAL_GRADIENTS, ids=cases.gradient_names)
def test_only_the_gradients_that_are_wanted_are_computed(wanted):
    inputs = SMALL[0].inputs("float16")
    want = backward(inputs)
    for got, all_, asked in zip(backward(inputs, wanted=wanted), want, wanted, strict=True):
        assert (got is not None) == asked
        if asked:
            np.testing.assert_allclose(got.astype(float), all_.astype(float), rtol=2e-3, atol=1e-4)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("wanted", PARTIAL_GRADIENTS, ids=cases.gradient_names)
def test_only_the_gradients_of_a_fused_call_that_are_wanted_are_computed(wanted, packed):
    inputs = cases.to_fused(SMALL[0].inputs(), packed=packed)
    for references in (False, True):
        want = cases.expected_fused(inputs)[1]
        asked = wanted._replace(references=references)
        for name, got, expected in zip(NAMES, backward(inputs, wanted=asked), want, strict=True):
            if got is not None:
                assert_close(got, expected, "float32", name)


@pytest.mark.parametrize(
    "levels", [((6, 7, 0), (3, 4, 54)), ((-6, 7, 0), (3, 4, 42)), ((6, 7, -1), (3, 4, 42))], ids=str
)
def test_a_level_that_does_not_fit_gives_nan(monkeypatch, levels):
    inputs = SMALL[0].inputs()
    table = np.array(levels, np.int64)
    metadata = [np.ascontiguousarray(table[:, :2]), np.ascontiguousarray(table[:, 2])]
    monkeypatch.setattr(emulated_naive, "metadata_of", lambda problem: metadata)
    fits = np.array([h > 0 and 0 <= start <= 54 - h * w for h, w, start in levels])
    assert np.isnan(forward(inputs)).all()
    of_locations, of_weights = backward(inputs)[1:3]
    for grad in (of_locations, of_weights[..., None]):
        assert np.isnan(grad[:, :, :, ~fits]).all()
        assert np.isfinite(grad[:, :, :, fits]).all()


def test_queries_beyond_the_valid_ones_give_zeros():
    case, lengths = SMALL[0], (2, 0)
    for inputs in (case.inputs(), cases.to_fused(case.inputs())):
        output, grads = forward(inputs, lengths), backward(inputs, lengths)
        for n, length in enumerate(lengths):
            assert np.any(output[n, :length]) or not length
            assert not output[n, length:].any()
            for grad in grads[1:]:
                assert grad is None or not grad[n, length:].any()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_sample_out_of_bounds_gives_zero_and_no_gradient(bad):
    inputs = Case("one", N=1, M=1, queries=1).inputs()
    inputs.locations[..., 0, 0, :] = bad
    inputs.weights[..., 0, 0] = np.nan
    want_output, want_grads = cases.expected(inputs)
    assert_close(forward(inputs), want_output, "float32")
    check_gradients(inputs, backward(inputs), want_grads, ("float32",) * 3)


def test_a_deterministic_backward_is_refused():
    problem = replace(emulator.prepare(SMALL[0].inputs(), False, None), deterministic=True)
    with pytest.raises(NotImplementedError, match="deterministic: expected False with CUPY_MSDA_KERNELS=naive"):
        naive.NaiveBackward(problem, ALL, 0)


@pytest.mark.parametrize(("setting", "selected"), [(None, False), ("", False), ("fast", False), ("naive", True)])
def test_the_environment_selects_these_kernels(monkeypatch, setting, selected):
    if setting is None:
        monkeypatch.delenv("CUPY_MSDA_KERNELS", raising=False)
    else:
        monkeypatch.setenv("CUPY_MSDA_KERNELS", setting)
    assert naive.selected() == selected


def test_another_setting_is_refused(monkeypatch):
    monkeypatch.setenv("CUPY_MSDA_KERNELS", "slow")
    with pytest.raises(ValueError, match="CUPY_MSDA_KERNELS: expected 'fast' or 'naive', got 'slow'"):
        naive.selected()
