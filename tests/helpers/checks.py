"""Run the public functions on one backend, and compare output and gradients with the float64 reference."""

import cupy_msda
from tests.helpers import cases
from tests.helpers.tolerance import assert_close

FUSED_GRADIENTS = ("grad_value", "grad_reference_points", "grad_sampling_offsets", "grad_attention_logits")


def run_operator(backend, inputs, im2col_step=64, **variant):
    """Output and gradients of value, locations and weights, as NumPy arrays."""
    put = [backend.put(array) for array in inputs]
    output = cupy_msda.ms_deform_attn(*put[:5], im2col_step, **variant)
    grads = cupy_msda.ms_deform_attn_backward(*put, im2col_step, **variant)
    return backend.get(output), [backend.get(grad) for grad in grads]


def check_operator(backend, inputs, value_dtype, location_dtype, im2col_step=64, **variant):
    output, grads = run_operator(backend, inputs, im2col_step, **variant)
    want_output, want_grads = cases.expected(inputs, **variant)
    assert output.dtype == inputs.value.dtype
    assert_close(output, want_output, value_dtype)
    assert_close(grads[0], want_grads[0], value_dtype, "grad_value")
    points = variant.get("num_points")
    got, want = (cases.pixel_units(grad, inputs.shapes, points) for grad in (grads[1], want_grads[1]))
    assert_close(got, want, location_dtype, "grad_sampling_loc")
    assert_close(grads[2], want_grads[2], location_dtype, "grad_attn_weight")
    assert [g.dtype for g in grads] == [inputs.value.dtype, inputs.locations.dtype, inputs.weights.dtype]


def fused_inputs(case, pair=("float32", "float32"), seed=0, **form):
    """The samples of a case as a fused call; `form` is what :func:`cases.to_fused` takes."""
    inputs = case.inputs(*pair, seed=seed)
    return cases.to_fused(inputs, num_points=case.variant.get("num_points"), seed=seed, **form)


def run_fused(backend, inputs, **options):
    """Output and gradients of value, references, offsets and logits, as NumPy arrays or None."""
    put = backend.put
    value, references = put(inputs.value), put(inputs.references)
    samples = [None if part is None else put(part) for part in (inputs.locations, inputs.weights)]
    arguments = (value, inputs.shapes, inputs.starts, references, *samples)
    output = cupy_msda.ms_deform_attn_fused(*arguments, **options)
    grads = cupy_msda.ms_deform_attn_fused_backward(*arguments, put(inputs.grad_output), **options)
    return backend.get(output), [None if grad is None else backend.get(grad) for grad in grads]


def check_fused(backend, case, pair=("float32", "float32"), seed=0, **form):
    inputs = fused_inputs(case, pair, seed, **form)
    want_output, (of_value, of_offsets, of_logits, of_references) = cases.expected_fused(inputs, **case.variant)
    output, grads = run_fused(backend, inputs, **case.variant)
    assert output.dtype == inputs.value.dtype
    assert_close(output, want_output, pair[0])
    dtypes = (pair[0], inputs.references.dtype.name, pair[1], pair[1])
    want_grads = (of_value, of_references, of_offsets, of_logits)
    for name, got, want, dtype in zip(FUSED_GRADIENTS, grads, want_grads, dtypes, strict=True):
        if want is None:
            assert got is None
        else:
            assert got.dtype.name == dtype
            assert_close(got, want, dtype, name)
