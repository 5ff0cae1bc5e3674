"""The fused front end agrees with the float64 reference on every backend: reference points, offsets and logits."""

import itertools
import re
from dataclasses import replace

import numpy as np
import pytest

from cupy_msda import ms_deform_attn, ms_deform_attn_fused, ms_deform_attn_fused_backward
from tests.helpers import backends, cases
from tests.helpers.backends import BACKENDS, MAIN_BACKENDS
from tests.helpers.cases import DTYPE_PAIRS, Case
from tests.helpers.checks import FUSED_GRADIENTS, check_fused, fused_inputs, run_fused
from tests.helpers.tolerance import assert_close

pytestmark = pytest.mark.sanitizer

CASE = Case("fused", levels=((6, 7), (3, 4)), N=2, M=2, D=8, P=3)
FORMS = [
    pytest.param({"coordinates": c, "levels": levels, "packed": packed}, id=f"{c}-{levels or 'L'}-{packed}")
    for c, levels, packed in itertools.product((2, 4), (None, 1), (False, True))
]
VARIANTS = (
    {},
    {"num_points": (2, 5)},
    {"padding_mode": "border"},
    {"align_corners": True},
    {"padding_mode": "border", "align_corners": True},
    {"interpolation": "nearest"},
    {"interpolation": "nearest", "num_points": (1, 4)},
)


@pytest.mark.parametrize("backend", BACKENDS, ids=lambda backend: backend.name)
def test_every_backend_agrees_with_the_reference(backend):
    check_fused(backend, CASE)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("backend", MAIN_BACKENDS, ids=lambda backend: backend.name)
def test_points_and_boxes_separate_and_packed(backend, form):
    check_fused(backend, CASE, **form)


@pytest.mark.parametrize("pair", DTYPE_PAIRS, ids="-".join)
@pytest.mark.parametrize("coordinates", [2, 4])
@pytest.mark.parametrize("backend", MAIN_BACKENDS, ids=lambda backend: backend.name)
def test_every_dtype_agrees_with_the_reference(backend, coordinates, pair):
    for reference_dtype in {pair[0], "float32" if pair[0] != "float64" else pair[0]}:
        check_fused(backend, CASE, pair, coordinates=coordinates, reference_dtype=reference_dtype)


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
@pytest.mark.parametrize("coordinates", [2, 4])
@pytest.mark.parametrize("backend", MAIN_BACKENDS, ids=lambda backend: backend.name)
def test_every_variant_agrees_with_the_reference(backend, coordinates, variant):
    check_fused(backend, replace(CASE, variant=variant), coordinates=coordinates)


# Encoders with block-level aggregation, an incomplete block, more samples than lanes, one sample, and 16-bit pairs that
# are not aligned.
@pytest.mark.parametrize(
    "case",
    [
        Case("encoder_order", levels=((9, 11), (4, 5), (2, 2)), N=1, M=3, D=32, P=4, queries=None),
        Case("tail", levels=((5, 6), (3, 3)), N=2, M=1, D=32, queries=37),
        Case("forty_samples", levels=((4, 5), (3, 3)), M=1, D=4, P=20, queries=3),
        Case("one_sample", levels=((4, 5),), P=1, D=33),
        Case("three_samples", levels=((4, 5),), P=3, D=1),
        Case("gaps", starts=(4, 50), S=64),
    ],
    ids=str,
)
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("backend", MAIN_BACKENDS, ids=lambda backend: backend.name)
def test_every_size_agrees_with_the_reference(backend, packed, case):
    for pair in (("float32", "float32"), ("float16", "float16")):
        check_fused(backend, case, pair, packed=packed)


@pytest.mark.parametrize("backend", MAIN_BACKENDS, ids=lambda backend: backend.name)
@pytest.mark.parametrize("packed", [False, True])
def test_padding_is_not_read_and_gets_zeros(backend, packed):
    inputs = fused_inputs(replace(CASE, N=3), packed=packed, coordinates=4)
    lengths = (2, 0, 5)
    padding = np.arange(5) >= np.array(lengths)[:, None]
    full, full_grads = run_fused(
        backend, inputs._replace(grad_output=np.where(padding[..., None], 0, inputs.grad_output))
    )
    for array in (inputs.locations, inputs.weights, inputs.references, inputs.grad_output):
        if array is not None:
            array[padding] = np.nan
    output, grads = run_fused(backend, inputs, query_lengths=lengths)
    assert not output[padding].any()
    np.testing.assert_array_equal(output[~padding], full[~padding])
    for name, grad, want in zip(FUSED_GRADIENTS, grads, full_grads, strict=True):
        if grad is not None:
            np.testing.assert_allclose(grad, want, rtol=1e-5, atol=1e-5, err_msg=name)


@pytest.mark.parametrize("backend", MAIN_BACKENDS, ids=lambda backend: backend.name)
def test_deterministic_changes_the_sums_of_value_only(backend):
    inputs = fused_inputs(CASE, coordinates=4)
    _, want = cases.expected_fused(inputs)
    _, grads = run_fused(backend, inputs)
    put = backend.put
    arrays = (inputs.references, inputs.locations, inputs.weights, inputs.grad_output)
    ordered = ms_deform_attn_fused_backward(
        put(inputs.value), inputs.shapes, inputs.starts, *map(put, arrays), deterministic=True
    )
    assert_close(backend.get(ordered[0]), want[0], "float32")
    for got, other in zip(ordered[1:], grads[1:], strict=True):
        np.testing.assert_array_equal(backend.get(got), other)


@pytest.mark.parametrize("backend", MAIN_BACKENDS, ids=lambda backend: backend.name)
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("size", ["N", "Q", "S", "P"])
def test_empty_dimension_gives_zeros(backend, size, packed):
    N, Q, S, P = (0 if name == size else n for name, n in (("N", 2), ("Q", 5), ("S", 8), ("P", 3)))
    shapes = np.array([[2, 4]] if S else np.empty((0, 2), np.int64))
    L = len(shapes)
    value, grad_output = np.ones((N, S, 2, 4), np.float32), np.ones((N, Q, 8), np.float32)
    offsets, logits = np.ones((N, Q, 2, L, P, 2), np.float32), np.ones((N, Q, 2, L, P), np.float32)
    if packed:
        offsets, logits = np.ones((N, Q, 2, 3 * L * P), np.float32), None
    references = np.ones((N, Q, L or 1, 2), np.float32)
    inputs = cases.FusedInputs(value, shapes, None, offsets, logits, grad_output, references)
    output, grads = run_fused(backend, inputs)
    assert output.shape == (N, Q, 8)
    assert not output.any()
    for grad, like in zip(grads, (value, references, offsets, logits), strict=True):
        if like is not None:
            assert grad.shape == like.shape
            assert not grad.any()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 3e38])
@pytest.mark.parametrize("backend", MAIN_BACKENDS, ids=lambda backend: backend.name)
def test_offset_that_is_not_finite_gives_zero(backend, bad):
    inputs = fused_inputs(CASE)
    inputs.locations[:, :, :, 0] = bad
    far = inputs._replace(locations=np.where(np.abs(inputs.locations) < 1e3, inputs.locations, 1e3))
    want_output, want_grads = cases.expected_fused(far)
    output, grads = run_fused(backend, inputs)
    assert_close(output, want_output, "float32")
    for got, want in zip(grads, (want_grads[0], want_grads[3], *want_grads[1:3]), strict=True):
        assert_close(got, want, "float32")


@pytest.mark.parametrize("backend", MAIN_BACKENDS, ids=lambda backend: backend.name)
def test_large_logits_do_not_overflow(backend):
    inputs = fused_inputs(CASE)
    inputs.weights[:] += 1e4 * np.arange(5).reshape(5, 1, 1, 1)
    inputs.weights[0, 0, 0, 0, 0] = -np.inf
    inputs.weights[0, 1, 0, 1, 1] = 3e38
    finite = inputs._replace(weights=np.where(np.isinf(inputs.weights), -1e6, inputs.weights))
    want_output, _ = cases.expected_fused(finite)
    output, grads = run_fused(backend, inputs)
    assert_close(output, want_output, "float32")
    assert all(np.isfinite(grad).all() for grad in grads)


@pytest.mark.parametrize("backend", MAIN_BACKENDS, ids=lambda backend: backend.name)
def test_nan_logit_reaches_only_its_query_and_head(backend):
    inputs = fused_inputs(CASE)
    inputs.weights[1, 3, 0, 1, 2] = np.nan
    output, _ = run_fused(backend, inputs)
    reached = np.zeros((2, 5, 2, 8), bool)
    reached[1, 3, 0] = True
    np.testing.assert_array_equal(np.isnan(output), reached.reshape(output.shape))


def test_equals_the_plain_operator_after_the_arithmetic_of_the_models():
    inputs = fused_inputs(CASE, ("float64", "float64"))
    size = inputs.shapes[:, None, ::-1]
    locations = inputs.references[:, :, None, :, None, :] + inputs.locations / size
    exponentials = np.exp(inputs.weights)
    weights = exponentials / exponentials.sum((3, 4), keepdims=True)
    want = ms_deform_attn(inputs.value, inputs.shapes, None, locations, weights)
    got = ms_deform_attn_fused(inputs.value, inputs.shapes, None, inputs.references, inputs.locations, inputs.weights)
    np.testing.assert_allclose(got, want, rtol=1e-10, atol=1e-12)


def test_gradients_agree_with_finite_differences():
    rng = np.random.default_rng(3)
    inputs = fused_inputs(CASE, ("float64", "float64"), coordinates=4)
    arrays = {
        "value": inputs.value,
        "references": inputs.references,
        "offsets": inputs.locations,
        "logits": inputs.weights,
    }

    def loss(**moved):
        of = arrays | moved
        output = ms_deform_attn_fused(of["value"], inputs.shapes, None, of["references"], of["offsets"], of["logits"])
        return float((output * inputs.grad_output).sum())

    _, grads = run_fused(backends.NumPyBackend(), inputs)
    for (name, array), grad in zip(arrays.items(), grads, strict=True):
        direction = rng.standard_normal(array.shape) * 1e-7
        slope = loss(**{name: array + direction}) - loss(**{name: array - direction})
        np.testing.assert_allclose(slope / 2, float((grad * direction).sum()), rtol=1e-5, err_msg=name)


BAD = {
    "reference_points: expected shape [N, Q, L, 2], got [2, 5, 2]": {"references": (2, 5, 2)},
    "reference_points: expected shape [N, Q, L, 2] = [2, 5, 2, 2], got [2, 5, 3, 2]; L = 2 is that of spatial_shapes "
    "[2, 2]": {"references": (2, 5, 3, 2)},
    "reference_points: expected shape [N, Q, L, 2] for points or [N, Q, L, 4] for boxes, got [2, 5, 2, 3]": {
        "references": (2, 5, 2, 3)
    },
    "reference_points: expected shape [N, Q, 1, 4] = [2, 5, 1, 4], got [2, 4, 1, 4]; Q = 5 is that of sampling_offsets "
    "[2, 5, 2, 2, 3, 2]": {"references": (2, 4, 1, 4)},
    "sampling_offsets: expected shape [N, Q, M, L, P, 2], got [2, 5, 2, 18]": {"locations": (2, 5, 2, 18)},
    "attention_logits: expected shape [N, Q, M, L, P] = [2, 5, 2, 2, 3], got [2, 5, 2, 6]": {"weights": (2, 5, 2, 6)},
    "sampling_offsets without attention_logits: expected shape [N, Q, M, L*P*3], got [2, 5, 2, 2, 3, 2]": {
        "weights": None
    },
    "sampling_offsets without attention_logits: expected shape [N, Q, M, L*P*3] = [2, 5, 2, 18], got [2, 5, 2, 20]; "
    "it is a multiple of 3*L, and L = 2 is that of spatial_shapes": {
        "weights": None,
        "locations": (2, 5, 2, 20),
    },
}


@pytest.mark.parametrize("message", BAD)
def test_wrong_shape_is_named(message):
    inputs = fused_inputs(CASE)
    changed = {name: None if shape is None else np.zeros(shape, np.float32) for name, shape in BAD[message].items()}
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        run_fused(backends.NumPyBackend(), inputs._replace(**changed))


def test_wrong_dtype_is_named():
    inputs = fused_inputs(CASE)
    with pytest.raises(TypeError, match="reference_points: expected dtype float32 with a float32 value, got float16"):
        run_fused(backends.NumPyBackend(), inputs._replace(references=inputs.references.astype(np.float16)))
    with pytest.raises(TypeError, match="reference_points: expected an array"):
        run_fused(backends.NumPyBackend(), inputs._replace(references=[0.5]))
    half = inputs._replace(value=inputs.value.astype(np.float16), locations=inputs.locations.astype(np.float16))
    with pytest.raises(TypeError, match="attention_logits: expected the dtype of sampling_offsets, float16"):
        run_fused(backends.NumPyBackend(), half)
