"""The functions of JAX on the CPU: every form and variant, held against the float64 reference."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import cupy_msda
from cupy_msda.jax import cpu_calls, ms_deform_attn, reference
from cupy_msda.jax.primitives import forward_p
from tests.helpers import cases
from tests.helpers.cases import DTYPE_PAIRS, SMALL_CASES, VARIANTS
from tests.helpers.jax_calls import FORMS, SMALL, enable_x64, function_of, inputs_of, output_and_gradients
from tests.helpers.tolerance import assert_close

NAMES = ("value", "locations", "weights", "references")


@pytest.fixture(autouse=True)
def x64_on_the_cpu():
    """The tests hold float64 too; :func:`test_without_x64` does without."""
    with enable_x64(True), jax.default_device(jax.devices("cpu")[0]):
        yield


def check(inputs, expected, pair, points=None, **options):
    function, arrays = function_of(inputs, **options)
    output, gradients = output_and_gradients(function, arrays, inputs.grad_output)
    assert output.dtype == inputs.value.dtype
    assert_close(output, expected[0], pair[0])
    for name, want in zip(NAMES, expected[1], strict=False):
        if want is None:
            continue
        got, dtype = gradients[name], arrays[name].dtype.name
        assert got.dtype.name == dtype
        if name == "locations" and not hasattr(inputs, "references"):
            got, want = (cases.pixel_units(grad, inputs.shapes, points) for grad in (got, want))
        assert_close(got, want, dtype, name)


@pytest.mark.parametrize("pair", DTYPE_PAIRS, ids="-".join)
def test_each_dtype(pair):
    inputs = inputs_of(SMALL, pair=pair)
    check(inputs, cases.expected(inputs), pair)


@pytest.mark.parametrize("case", [*SMALL_CASES, *VARIANTS], ids=str)
def test_each_case(case):
    inputs, points = inputs_of(case), case.variant.get("num_points")
    check(inputs, cases.expected(inputs, **case.variant), ("float32", "float32"), points, **case.variant)


@pytest.mark.parametrize("pair", [("float32", "float32"), ("bfloat16", "float32")], ids="-".join)
@pytest.mark.parametrize("case", [SMALL, *VARIANTS[:5]], ids=str)
@pytest.mark.parametrize("form", [name for name in FORMS if name != "plain"])
def test_each_fused_form(form, case, pair):
    inputs = inputs_of(case, FORMS[form], pair)
    check(inputs, cases.expected_fused(inputs, **case.variant), pair, **case.variant)


@pytest.mark.parametrize("traced", [False, True])
def test_ragged_queries(traced):
    inputs, lengths = inputs_of(SMALL), [1, 3]
    expected = cases.expected_ragged(inputs, lengths)
    if not traced:
        return check(inputs, expected, ("float32", "float32"), query_lengths=lengths)
    function = jax.jit(
        lambda lengths: ms_deform_attn(
            inputs.value, inputs.shapes, None, inputs.locations, inputs.weights, query_lengths=lengths
        )
    )
    return assert_close(np.asarray(function(np.array(lengths))), expected[0], "float32")


@pytest.mark.parametrize("dtype", ["int8", "int16", "int32", "int64", "uint8", "uint32", "uint64"])
@pytest.mark.parametrize("starts", [False, True])
def test_level_sizes_that_jit_traces(dtype, starts):
    inputs = cases.Case("gaps", levels=((4, 5), (3, 2)), starts=(2, 24), S=40).inputs()
    if not starts:
        inputs = inputs._replace(starts=None)
    given = [part for part in (inputs.shapes, inputs.starts) if part is not None]

    def function(*metadata):
        shapes, first = (*metadata, None)[:2]
        return output_and_gradients_of(inputs, shapes, first)

    output, gradients = jax.jit(function)(*(part.astype(dtype) for part in given))
    want_output, want = cases.expected(inputs)
    assert_close(np.asarray(output), want_output, "float32")
    assert_close(np.asarray(gradients[0]), want[0], "float32")


def output_and_gradients_of(inputs, shapes, starts):
    function, arrays = function_of(inputs, shapes, starts)
    output, pullback = jax.vjp(function, *arrays.values())
    return output, pullback(jnp.asarray(inputs.grad_output))


def test_without_x64():
    """Level sizes are int32 then, and the kernels read int64."""
    with enable_x64(False):
        inputs = inputs_of(SMALL)
        output = jax.jit(lambda shapes: ms_deform_attn(inputs.value, shapes, None, inputs.locations, inputs.weights))(
            jnp.asarray(inputs.shapes)
        )
        assert_close(np.asarray(output), cases.expected(inputs)[0], "float32")


@pytest.mark.parametrize("empty", ["N", "Q", "P", "L", "S"])
def test_an_empty_problem_gives_zeros(empty):
    sizes = {"N": 2, "Q": 3, "L": 2, "P": 2, "S": 26} | {empty: 0}
    levels = [(4, 5), (3, 2)][: sizes["L"]] if sizes["S"] else []
    L = len(levels)
    value = np.ones((sizes["N"], sizes["S"], 2, 4), "f4")
    locations = np.full((sizes["N"], sizes["Q"], 2, L, sizes["P"], 2), 0.5, "f4")
    weights = np.ones(locations.shape[:-1], "f4")

    def function(*given):
        return ms_deform_attn(given[0], levels, None, *given[1:])

    output = jax.jit(function)(value, locations, weights)
    assert output.shape == (sizes["N"], sizes["Q"], 8)
    assert not output.any()
    gradients = jax.grad(lambda *given: function(*given).sum(), argnums=(0, 1, 2))(value, locations, weights)
    assert [grad.shape for grad in gradients] == [value.shape, locations.shape, weights.shape]
    assert not any(grad.any() for grad in gradients)


def test_numpy_reads_the_memory_of_xla(monkeypatch):
    """Zero copy: the addresses that the NumPy path gets are those of the caller's arrays."""
    inputs, seen = inputs_of(SMALL), []
    compute = cpu_calls.compute
    monkeypatch.setattr(
        cpu_calls, "compute",
        lambda operation, arrays: seen.append([array.ctypes.data for array in arrays]) or compute(operation, arrays),
    )  # fmt: skip
    function, arrays = function_of(inputs)
    given = [jnp.asarray(array) for array in arrays.values()]
    jax.jit(function)(*given).block_until_ready()
    assert seen == [[array.unsafe_buffer_pointer() for array in given]]


# Every branch of the functions of JAX, which take a second each to compile.
IN_JAX = [("plain", case) for case in (SMALL, SMALL_CASES[4], *VARIANTS[:1], *VARIANTS[3:6])]
IN_JAX += [(form, case) for form in FORMS if form != "plain" for case in (SMALL, VARIANTS[0])]


@pytest.mark.parametrize(("form", "case"), IN_JAX, ids=str)
def test_functions_of_jax_compute_the_same(form, case):
    """What serves devices without kernels, forward mode and second derivatives."""
    inputs = inputs_of(case, FORMS[form], ("float64", "float64"))
    function, arrays = function_of(inputs, **case.variant)
    (equation,) = (
        equation
        for equation in jax.make_jaxpr(function)(*arrays.values()).jaxpr.eqns
        if equation.primitive is forward_p
    )
    operation = equation.params["operation"]
    want, want_gradients = output_and_gradients(function, arrays, inputs.grad_output)
    got, gradients = output_and_gradients(
        lambda *given: reference.forward(operation, *given), arrays, inputs.grad_output
    )
    assert_close(got, want, "float64")
    for name, gradient in gradients.items():
        assert_close(gradient, want_gradients[name], "float64", name)


@pytest.mark.parametrize("form", FORMS)
def test_numbers_that_are_not_finite(form):
    """As the array functions: NaN and infinity reach what uses them and nothing else."""
    rng = np.random.default_rng(7)
    inputs = inputs_of(SMALL, FORMS[form])
    for name in ("value", "locations"):
        array = getattr(inputs, name)
        array.reshape(-1)[rng.integers(array.size, size=5)] = [np.nan, np.inf, -np.inf, np.nan, np.inf]
    function, arrays = function_of(inputs)
    output, gradients = output_and_gradients(function, arrays, inputs.grad_output)
    metadata = (arrays["value"], inputs.shapes, None)
    samples = [arrays["locations"], arrays.get("weights")]
    if form == "plain":
        want = cupy_msda.ms_deform_attn(*metadata, *samples)
        want_gradients = cupy_msda.ms_deform_attn_backward(*metadata, *samples, inputs.grad_output, 64)
        order = ("value", "locations", "weights")
    else:
        want = cupy_msda.ms_deform_attn_fused(*metadata, inputs.references, *samples)
        want_gradients = cupy_msda.ms_deform_attn_fused_backward(
            *metadata, inputs.references, *samples, inputs.grad_output
        )
        order = ("value", "references", "locations", "weights")
    np.testing.assert_array_equal(output, want)
    for name, gradient in zip(order, want_gradients, strict=False):
        if gradient is not None:
            np.testing.assert_array_equal(gradients[name], gradient)
