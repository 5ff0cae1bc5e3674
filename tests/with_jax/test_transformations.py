"""What JAX's transformations do to a function, they do to the operator."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cupy_msda.jax import ms_deform_attn, reference
from cupy_msda.jax.metadata import words
from cupy_msda.jax.primitives import forward_p
from tests.helpers.jax_calls import (
    FORMS,
    SMALL,
    enable_x64,
    function_of,
    inputs_of,
    output_and_gradients,
    primitives_of,
)
from tests.helpers.thinning import every_other
from tests.helpers.tolerance import assert_close

LOOPS = {"scan", "while", "cond"}


@pytest.fixture(autouse=True)
def x64_on_the_cpu():
    with enable_x64(True), jax.default_device(jax.devices("cpu")[0]):
        yield


def in_jax(function, arrays):
    """The same function by functions of JAX alone, which JAX transforms as any other."""
    (equation,) = (
        equation
        for equation in jax.make_jaxpr(function)(*arrays.values()).jaxpr.eqns
        if equation.primitive is forward_p
    )
    operation, extra = equation.params["operation"], len(arrays)
    assert len(equation.invars) == extra
    return lambda *given: reference.forward(operation, *given)


def call(form="plain", **options):
    inputs = inputs_of(SMALL, FORMS[form], ("float64", "float64"))
    function, arrays = function_of(inputs, **options)
    return function, arrays, inputs


def tangents_of(arrays, seed=3):
    rng = np.random.default_rng(seed)
    return [rng.standard_normal(array.shape) for array in arrays.values()]


def names_of_calls(names):
    return [name for name in names if name.startswith("ms_deform_attn")]


@pytest.mark.parametrize("form", FORMS)
def test_forward_mode(form):
    function, arrays, _ = call(form)
    given = (list(arrays.values()), tangents_of(arrays))
    output, tangent = jax.jit(lambda given: jax.jvp(function, *given))(given)
    want_output, want = jax.jit(lambda given: jax.jvp(in_jax(function, arrays), *given))(given)
    assert_close(np.asarray(output), np.asarray(want_output), "float64")
    assert_close(np.asarray(tangent), np.asarray(want), "float64")


@pytest.mark.parametrize("form", ["plain", "packed"])
def test_second_derivatives(form):
    function, arrays, inputs = call(form)
    given, tangents = list(arrays.values()), tangents_of(arrays)
    places = tuple(range(len(given)))

    def loss_of(operator):
        return lambda *given: jnp.sum(operator(*given) ** 2 * inputs.grad_output)

    def of_gradients(operator, twice):
        gradient = jax.grad(loss_of(operator), argnums=places)
        if twice == "forward over reverse":
            return jax.jvp(gradient, given, tangents)[1]
        return jax.grad(lambda *given: sum(jnp.vdot(*pair) for pair in zip(gradient(*given), tangents, strict=True)),
                        argnums=places)(*given)  # fmt: skip

    for twice in ("forward over reverse", "reverse over reverse"):
        got, want = (
            jax.jit(of_gradients, static_argnums=(0, 1))(operator, twice)
            for operator in (function, in_jax(function, arrays))
        )
        for name, one, other in zip(arrays, got, want, strict=True):
            assert_close(np.asarray(one), np.asarray(other), "float64", f"{twice}: {name}")


@pytest.mark.parametrize("name", ["value", "locations", "weights"])
def test_only_the_gradients_that_are_needed(name):
    """One call of the backward, which wants no other gradient."""
    function, arrays, _ = call()
    place = list(arrays).index(name)
    gradient = jax.grad(lambda *given: function(*given).sum(), argnums=place)
    (equation,) = (
        equation
        for equation in jax.make_jaxpr(gradient)(*arrays.values()).jaxpr.eqns
        if equation.primitive.name == "ms_deform_attn_backward"
    )
    assert equation.params["operation"].gradients == (name,)
    assert len(equation.outvars) == 1


def test_checkpoint_computes_the_forward_once():
    """The backward needs the inputs and not the output."""
    function, arrays, _ = call()
    gradient = jax.grad(lambda *given: jax.checkpoint(function)(*given).sum())
    compiled = jax.jit(gradient).lower(*arrays.values()).as_text()
    assert compiled.count("@cupy_msda(") == 1


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("mapped", ["all", "value", "samples"])
def test_vmap_is_a_part_of_the_images(form, mapped):
    """Never a loop, forward and backward; arrays that are not mapped are shared."""
    function, arrays, inputs = call(form)
    given = {
        name: np.stack([array, 0.5 * array, array[::-1]])
        if mapped == "all" or (mapped == "value") == (name == "value")
        else array
        for name, array in arrays.items()
    }
    axes = tuple(0 if given[name].ndim > array.ndim else None for name, array in arrays.items())

    def both(*given):
        output, pullback = jax.vjp(function, *given)
        return output, pullback(jnp.asarray(inputs.grad_output))

    outputs, gradients = jax.jit(jax.vmap(both, in_axes=axes))(*given.values())
    for element in range(3):
        of_element = {
            name: array[element] if axis == 0 else array
            for (name, array), axis in zip(given.items(), axes, strict=True)
        }
        output, want = output_and_gradients(function, of_element, inputs.grad_output)
        assert_close(np.asarray(outputs[element]), output, "float64")
        for name, gradient in zip(arrays, gradients, strict=True):
            assert_close(np.asarray(gradient[element]), want[name], "float64", name)
    names = primitives_of(jax.vmap(both, in_axes=axes), *given.values())
    assert names_of_calls(names) == ["ms_deform_attn", "ms_deform_attn_backward"]
    assert not LOOPS & set(names)


def test_vmap_of_other_dimensions_and_of_vmap():
    function, arrays, _ = call()
    given = [np.stack([np.stack([array, 2 * array]), np.stack([array / 2, array])], -1) for array in arrays.values()]
    output = jax.vmap(jax.vmap(function), in_axes=-1, out_axes=1)(*given)
    for first in range(2):
        for second in range(2):
            want = function(*(array[first, ..., second] for array in given))
            assert_close(np.asarray(output[first, second]), np.asarray(want), "float64")


def test_vmap_of_query_lengths():
    _, arrays, inputs = call()
    lengths = np.array([[1, 2], [3, 0]])

    def function(lengths):
        return ms_deform_attn(arrays["value"], inputs.shapes.tolist(), None, arrays["locations"], arrays["weights"],
                              query_lengths=lengths)  # fmt: skip

    output = jax.vmap(function)(lengths)
    for element in range(2):
        assert_close(np.asarray(output[element]), np.asarray(function(lengths[element])), "float64")


def test_vmap_of_level_sizes_is_refused():
    _, arrays, inputs = call()
    with pytest.raises(NotImplementedError, match=r"spatial_shapes, level_start_index: .*in_axes=None"):
        jax.vmap(lambda shapes: ms_deform_attn(arrays["value"], shapes, None, arrays["locations"], arrays["weights"]))(
            np.stack([inputs.shapes] * 2)
        )


def test_scan():
    function, arrays, _ = call()
    scales = np.array([0.5, 1.0, 2.0])

    def total(value):
        return jax.lax.scan(
            lambda sum_, scale: (sum_ + function(value * scale, *list(arrays.values())[1:]).sum(), None), 0.0, scales
        )[0]

    value = arrays["value"]
    want = jax.grad(lambda value: function(value, *list(arrays.values())[1:]).sum() * scales.sum())(value)
    assert_close(np.asarray(jax.jit(jax.grad(total))(value)), np.asarray(want), "float64")


def test_donated_arrays():
    function, arrays, _ = call()
    want = function(*arrays.values())
    donated = jax.jit(lambda value, *samples: value + function(value, *samples).sum(), donate_argnums=0)
    value = jnp.array(arrays["value"])
    got = donated(value, *list(arrays.values())[1:])
    assert value.is_deleted()
    assert_close(np.asarray(got), arrays["value"] + np.asarray(want).sum(), "float64")


def test_eval_shape_computes_nothing():
    function, arrays, _ = call()
    huge = {name: jax.ShapeDtypeStruct((2**20, *array.shape[1:]), array.dtype) for name, array in arrays.items()}
    found = jax.eval_shape(function, *huge.values())
    assert (found.shape, found.dtype) == ((2**20, 3, 8), np.float64)


def test_the_nearest_pixel_has_no_gradient_of_locations():
    function, arrays, _ = call(interpolation="nearest")
    gradient = jax.grad(lambda locations: function(arrays["value"], locations, arrays["weights"]).sum())
    assert not np.asarray(gradient(arrays["locations"])).any()
    tangent = jax.jvp(lambda x: function(arrays["value"], x, arrays["weights"]), (arrays["locations"],),
                      (arrays["locations"],))[1]  # fmt: skip
    assert not np.asarray(tangent).any()


@pytest.mark.parametrize("draw", range(3))
def test_gradients_are_those_of_finite_differences(draw):
    """Fresh numbers in each run. The seed is printed where the test fails."""
    seed = int(np.random.SeedSequence().generate_state(1)[0])
    print("draw", draw, "seed", seed)
    inputs = inputs_of(SMALL, FORMS["fused"], ("float64", "float64"), seed=seed)
    function, arrays = function_of(inputs)
    given, direction, step = list(arrays.values()), tangents_of(arrays, seed), 1e-7

    def loss(*given):
        return jnp.vdot(function(*given), inputs.grad_output)

    moved = [loss(*(a + sign * step * d for a, d in zip(given, direction, strict=True))) for sign in (1, -1)]
    gradients = jax.grad(loss, argnums=tuple(range(len(given))))(*given)
    slope = sum(jnp.vdot(*pair) for pair in zip(gradients, direction, strict=True))
    assert float(slope) == pytest.approx(float(moved[0] - moved[1]) / (2 * step), rel=1e-4)


def test_without_compilation():
    inputs = inputs_of(SMALL)
    function, arrays = function_of(inputs)
    want = function(*arrays.values())
    with jax.disable_jit():
        np.testing.assert_array_equal(function(*arrays.values()), want)


@pytest.mark.parametrize("mapped", [0, 1])
def test_a_vmap_of_no_elements(mapped):
    function, arrays = function_of(inputs_of(SMALL))
    given = list(arrays.values())
    want = function(*given).shape
    given[mapped] = jnp.zeros((0, *given[mapped].shape), given[mapped].dtype)
    axes = [0 if place == mapped else None for place in range(len(given))]
    assert jax.vmap(function, in_axes=axes)(*given).shape == (0, *want)


# Of a call of 512 pixels and 3 queries. The pixels of a level of 65536 x 65536 are 0 in 32 bits.
WRONG_METADATA = {
    "too many rows": ([[16, 16], [16, 17]], None, [3]),
    "no rows": ([[0, 16], [16, 16]], None, [3]),
    "2^32 pixels": ([[65536, 65536], [16, 16]], [0, 256], [3]),
    "the last start": ([[16, 16], [16, 16]], [0, 2**31 - 1], [3]),
    "a negative length": ([[16, 16], [16, 16]], None, [-5]),
    "more queries than there are": ([[16, 16], [16, 16]], None, [4]),
}
# Of a square, as the output is linear in the weights.
DERIVATIVES = {
    "forward": jax.jacfwd,
    "forward over forward": lambda f: jax.jacfwd(jax.jacfwd(lambda *given: f(*given) ** 2)),
    "forward over reverse": lambda f: jax.jacfwd(jax.grad(lambda *given: f(*given) ** 2)),
    "reverse over forward": lambda f: jax.grad(lambda *given: jax.jacfwd(lambda *given: f(*given) ** 2)(*given).sum()),
}
VALUE = np.arange(512.0).reshape(1, 512, 1, 1)
SAMPLES = np.full((1, 3, 1, 2, 1, 3), 0.4)  # x, y and the weight
SAMPLES[0, 1] = 5.0  # no sample of this query is in bounds


def of_samples(samples, shapes, starts, lengths):
    return ms_deform_attn(VALUE, shapes, starts, samples[..., :2], samples[..., 2], query_lengths=lengths).sum()


def arrays_of(metadata):
    return [None if part is None else jnp.array(part) for part in metadata]


@pytest.mark.parametrize("name", every_other(DERIVATIVES))
def test_derivatives_of_wrong_metadata_that_jit_traces_are_nan(name):
    """Nothing else checks the metadata where the output is not used."""
    derivative = jax.jit(DERIVATIVES[name](of_samples))
    for kind, metadata in WRONG_METADATA.items():
        try:
            found = np.asarray(derivative(SAMPLES, *arrays_of(metadata)))
        except jax.errors.JaxRuntimeError:  # the output is used
            assert name != "forward", kind
        else:
            assert np.isnan(found).all(), kind
    right = derivative(SAMPLES, *arrays_of(([[16, 16], [16, 16]], None, [2])))
    assert np.isfinite(right).all()


@pytest.mark.parametrize("kind", WRONG_METADATA)
def test_the_composition_of_wrong_metadata_is_nan_with_all_gradients(kind):
    """What devices without kernels compute."""
    metadata = arrays_of(WRONG_METADATA[kind])
    (equation,) = (
        one for one in jax.make_jaxpr(of_samples)(SAMPLES, *metadata).jaxpr.eqns if one.primitive is forward_p
    )
    operation = equation.params["operation"]
    given = [words(part) for part in metadata if part is not None]
    inputs = jnp.array(VALUE), jnp.array(SAMPLES[..., :2]), jnp.array(SAMPLES[..., 2])
    output, pullback = jax.vjp(lambda *arrays: reference.forward(operation, *arrays, *given), *inputs)
    for found in (output, *pullback(jnp.ones_like(output))):
        assert np.isnan(found).all()
