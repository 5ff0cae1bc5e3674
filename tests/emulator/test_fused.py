"""The fused front end of the CUDA sources, run on the CPU: against the reference, under the sanitizers too."""

import itertools
from dataclasses import replace

import numpy as np
import pytest

from cupy_msda.call import Wanted
from tests.helpers import cases, emulator
from tests.helpers.cases import DTYPE_PAIRS, Case
from tests.helpers.thinning import every_other
from tests.helpers.tolerance import assert_close

pytestmark = pytest.mark.skipif(emulator.COMPILER is None, reason="needs g++")

ALL = Wanted(references=True)
# Queries are pixels and aggregated, tails, more samples than lanes, odd counts, several channel tiles.
PATHS = [
    Case("encoder_order", levels=((9, 11), (4, 5), (2, 2)), N=1, M=2, D=8, queries=None),
    Case("tail", levels=((5, 6), (3, 3)), N=2, M=1, D=32, P=4, queries=37),
    Case("forty_samples", levels=((4, 5), (3, 3)), N=1, M=2, D=4, P=20, queries=5),
    Case("three_samples", levels=((4, 5),), N=1, M=2, D=33, P=3, queries=3),
    Case("one_sample", levels=((3, 4),), N=1, M=2, D=1, P=1, queries=9),
    Case("gaps", starts=(4, 50), S=64, N=1, D=8),
    Case("few_samples", levels=((20, 26), (13, 13)), N=1, M=2, D=32, queries=60),
]
FORMS = [
    {"coordinates": c, "levels": levels, "packed": packed}
    for c, levels, packed in itertools.product((2, 4), (None, 1), (False, True))
]
VARIANTS = [
    {"num_points": (2, 5)},
    {"padding_mode": "border"},
    {"align_corners": True},
    {"interpolation": "nearest"},
]
NAMES = ("grad_value", "grad_offsets", "grad_logits", "grad_references")


def front_inputs(case, pair=("float32", "float32"), seed=0, **form):
    return cases.to_fused(case.inputs(*pair, seed=seed), num_points=case.variant.get("num_points"), seed=seed, **form)


def check(case, pair=("float32", "float32"), form=None, **options):
    inputs = front_inputs(case, pair, **(form or {}))
    want_output, want_grads = cases.expected_fused(inputs, **case.variant)
    options["variant"] = case.variant
    assert_close(emulator.forward(inputs, **options), want_output, pair[0])
    grads = emulator.backward(inputs, wanted=ALL, **options)
    dtypes = (pair[0], pair[1], pair[1], inputs.references.dtype.name)
    for name, got, want, dtype in zip(NAMES, grads, want_grads, dtypes, strict=True):
        if want is None:
            assert got is None
        else:
            assert_close(got, want, dtype, name)
    assert_close(emulator.summation(inputs, **options), want_grads[0], pair[0], "sorted")


@pytest.mark.parametrize("case", PATHS, ids=str)
def test_each_code_path_computes_the_reference(case):
    check(case)


@pytest.mark.parametrize("form", every_other(FORMS), ids=str)
def test_each_form_under_the_sanitizers(form):
    check(PATHS[5], form=form, sanitize=True)


@pytest.mark.parametrize("case", every_other([PATHS[0], PATHS[2], PATHS[3]]), ids=str)
@pytest.mark.parametrize("form", every_other([FORMS[1], FORMS[6]]), ids=str)
def test_each_code_path_under_the_sanitizers(case, form):
    check(case, form=form, sanitize=True, metadata_on_device=True)


@pytest.mark.parametrize("pair", DTYPE_PAIRS, ids="-".join)
@pytest.mark.parametrize("form", every_other([{"coordinates": 2, "packed": True}, {"coordinates": 4}]), ids=str)
def test_each_dtype_computes_the_reference(form, pair):
    boxes = form["coordinates"] == 4
    check(PATHS[3] if boxes else PATHS[1], pair, form if boxes else form | {"reference_dtype": pair[0]})


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
@pytest.mark.parametrize("form", [{"coordinates": 2}, {"coordinates": 4, "levels": 1}], ids=str)
def test_each_variant_computes_the_reference(form, variant):
    check(replace(PATHS[5], variant=variant), form=form)


SOME = [Wanted(*asked) for asked in itertools.product((True, False), repeat=4) if any(asked) and not all(asked)]


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("wanted", SOME, ids=cases.gradient_names)
def test_only_the_gradients_that_are_wanted_are_computed(wanted, packed):
    inputs = front_inputs(PATHS[1], packed=packed)
    _, want = cases.expected_fused(inputs)
    grads = [*emulator.backward(inputs, wanted=wanted), None][:4]
    for name, grad, exact, asked in zip(NAMES, grads, want, wanted, strict=True):
        if asked and exact is not None:
            assert_close(grad, exact, "float32", name)


@pytest.mark.parametrize("case", every_other([PATHS[0], PATHS[1]]), ids=str)
@pytest.mark.parametrize("packed", [False, True])
def test_query_lengths_under_the_sanitizers(case, packed):
    inputs = front_inputs(replace(case, N=3), packed=packed, coordinates=4)
    Q = inputs.locations.shape[1]
    lengths = (Q // 2, 0, Q)
    padding = np.arange(Q) >= np.array(lengths)[:, None]
    quiet = inputs._replace(grad_output=np.where(padding[..., None], 0, inputs.grad_output))
    want_output, want_grads = cases.expected_fused(quiet)
    for array in (inputs.locations, inputs.weights, inputs.references, inputs.grad_output):
        if array is not None:
            array[padding] = np.nan
    options = {"lengths": lengths, "sanitize": True}
    output = emulator.forward(inputs, **options)
    assert not output[padding].any()
    assert_close(output[~padding], want_output[~padding], "float32")
    for name, grad, want in zip(NAMES, emulator.backward(inputs, wanted=ALL, **options), want_grads, strict=True):
        if want is not None:
            assert_close(grad, want, "float32", name)
    assert_close(emulator.summation(inputs, **options), want_grads[0], "float32")


@pytest.mark.parametrize("bad", [np.nan, np.inf, 3e38], ids=str)
def test_hostile_inputs_under_the_sanitizers(bad):
    inputs = front_inputs(PATHS[5], coordinates=4)
    inputs.locations[:, :, :, 0] = bad
    inputs.references[:, 1, 0] = bad
    inputs.weights[:, 2, 0, 1, 0] = bad
    output = emulator.forward(inputs, sanitize=True)
    assert np.isfinite(np.delete(output, 2, axis=1)).all()
    emulator.backward(inputs, wanted=ALL, sanitize=True)
    emulator.summation(inputs, sanitize=True)


@pytest.mark.parametrize("shift", every_other([0, 40, 88, -40, -120, 120, 1e4, -1e4]))
@pytest.mark.parametrize("case", [PATHS[0], PATHS[1]], ids=["materialised", "softmax in the sort"])
def test_logits_far_from_zero(case, shift):
    """Where their exponentials have no largest logit taken out, overflow, or are all 0."""
    inputs = front_inputs(case)
    inputs.weights[:, ::2] += shift
    inputs.weights[:, 1::3, :, 0] -= shift
    want_output, want_grads = cases.expected_fused(inputs)
    assert_close(emulator.forward(inputs), want_output, "float32")
    for name, got, want in zip(NAMES, emulator.backward(inputs, wanted=ALL), want_grads, strict=True):
        assert_close(got, want, "float32", name)
    assert_close(emulator.summation(inputs), want_grads[0], "float32")


@pytest.mark.parametrize(("P", "shift"), [(2, 150), (4, -150), (16, -150)])
def test_all_logits_far_from_zero(P, shift):
    """Every lane of a warp has a sample, and all of their exponentials are infinite, or all are 0."""
    inputs = front_inputs(Case("filled", levels=((5, 6), (3, 3)), N=1, M=4, D=8, P=P, queries=64))
    inputs.weights[:] += np.float32(shift)
    want_output, want_grads = cases.expected_fused(inputs)
    assert_close(emulator.forward(inputs), want_output, "float32")
    for name, got, want in zip(NAMES, emulator.backward(inputs, wanted=ALL), want_grads, strict=True):
        assert_close(got, want, "float32", name)
    assert_close(emulator.summation(inputs), want_grads[0], "float32")


@pytest.mark.parametrize("order", [1, 7], ids=["downwards", "scattered"])
def test_order_of_threads_does_not_matter(order):
    for case in (PATHS[0], PATHS[2]):
        inputs = front_inputs(case, coordinates=4)
        np.testing.assert_array_equal(emulator.forward(inputs, order=order), emulator.forward(inputs))
        one, other = (emulator.backward(inputs, wanted=ALL, order=o) for o in (0, order))
        np.testing.assert_allclose(other[0], one[0], rtol=1e-4, atol=1e-5)
        for got, want in zip(other[1:], one[1:], strict=True):
            np.testing.assert_array_equal(got, want)
        np.testing.assert_array_equal(emulator.summation(inputs, order=order), emulator.summation(inputs))


def test_64_bit_offsets_under_the_sanitizers(monkeypatch):
    emulator.force_wide_index(monkeypatch, True)
    check(PATHS[0], form=FORMS[7], sanitize=True)
