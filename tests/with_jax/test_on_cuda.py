"""JAX on a GPU: results, XLA's CUDA graphs, determinism, and several GPUs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import cupy_msda
from cupy_msda.jax import call_frame, ms_deform_attn
from tests.helpers import cases
from tests.helpers.cases import DTYPE_PAIRS, VARIANTS, Case
from tests.helpers.jax_calls import FORMS, SMALL, enable_x64, function_of, inputs_of, output_and_gradients
from tests.helpers.tolerance import assert_close

pytestmark = pytest.mark.gpu
NAMES = ("value", "locations", "weights", "references")
ENCODER = Case("encoder", levels=((17, 20), (9, 10), (5, 5)), N=2, M=4, D=32, P=4, queries=None)


@pytest.fixture(autouse=True)
def on_a_gpu():
    with enable_x64(True), jax.default_device(jax.devices("gpu")[0]):
        yield


def check(inputs, expected, pair, **options):
    function, arrays = function_of(inputs, **options)
    output, gradients = output_and_gradients(function, arrays, inputs.grad_output)
    assert_close(output, expected[0], pair[0])
    for name, want in zip(NAMES, expected[1], strict=False):
        if want is not None:
            got, dtype = gradients[name], arrays[name].dtype.name
            if name == "locations" and not hasattr(inputs, "references"):
                points = options.get("num_points")
                got, want = (cases.pixel_units(grad, inputs.shapes, points) for grad in (got, want))
            assert_close(got, want, dtype, name)


@pytest.mark.parametrize("case", [SMALL, ENCODER], ids=str)
@pytest.mark.parametrize("pair", DTYPE_PAIRS, ids="-".join)
def test_each_dtype(pair, case):
    inputs = inputs_of(case, pair=pair)
    check(inputs, cases.expected(inputs), pair)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("case", VARIANTS[:6], ids=str)
def test_each_variant_of_each_form(case, form):
    inputs = inputs_of(case, FORMS[form])
    want = cases.expected(inputs, **case.variant) if form == "plain" else cases.expected_fused(inputs, **case.variant)
    check(inputs, want, ("float32", "float32"), **case.variant)


def test_metadata_on_the_gpu():
    inputs = inputs_of(SMALL)
    check(inputs, cases.expected(inputs), ("float32", "float32"), shapes=jnp.asarray(inputs.shapes))
    output = jax.jit(lambda shapes: ms_deform_attn(inputs.value, shapes, None, inputs.locations, inputs.weights))(
        jnp.asarray(inputs.shapes) * 3
    )
    assert np.isnan(output).any()


@pytest.mark.parametrize("pair", DTYPE_PAIRS[1:5], ids="-".join)
def test_deterministic_gradients_have_the_same_bits(pair):
    inputs = inputs_of(ENCODER, pair=pair)
    function, arrays = function_of(inputs, deterministic=True)
    found = [output_and_gradients(function, arrays, inputs.grad_output)[1]["value"].tobytes() for _ in range(5)]
    assert len(set(found)) == 1


def test_a_cuda_graph_replays_the_kernels(monkeypatch):
    """With the same addresses, XLA replays its graph: the handlers are not called, and new numbers are computed."""
    inputs, calls = inputs_of(ENCODER), []
    asked = call_frame.CallFrame.stream_and_ordinal
    monkeypatch.setattr(
        call_frame.CallFrame, "stream_and_ordinal", lambda frame: calls.append(None) or asked(frame)
    )  # fmt: skip

    def loop(value):
        def step(value, _):
            for _ in range(6):
                output = ms_deform_attn(value, inputs.shapes.tolist(), None, inputs.locations, inputs.weights)
                value = value + output.reshape(value.shape) * 0.1
            return value, None

        return jax.lax.scan(step, value, length=20)[0]

    got = jax.jit(loop)(inputs.value)
    want = inputs.value
    for _ in range(120):
        output = cupy_msda.ms_deform_attn(want, inputs.shapes, None, inputs.locations, inputs.weights)
        want = want + output.reshape(want.shape) * np.float32(0.1)
    assert np.linalg.norm(got - want) <= 1e-4 * np.linalg.norm(want)
    assert 0 < len(calls) < 120


def test_array_functions_take_the_same_path():
    inputs = inputs_of(SMALL)
    given = [jnp.asarray(array) for array in (inputs.value, inputs.locations, inputs.weights)]
    metadata = (inputs.shapes, None)
    output = cupy_msda.ms_deform_attn(given[0], *metadata, *given[1:])
    grads = cupy_msda.ms_deform_attn_backward(
        given[0], *metadata, *given[1:], jnp.asarray(inputs.grad_output), 64
    )  # fmt: skip
    assert isinstance(output, jax.Array)
    want, want_grads = cases.expected(inputs)
    assert_close(np.asarray(output), want, "float32")
    assert_close(np.asarray(grads[0]), want_grads[0], "float32")


@pytest.mark.skipif("len(jax.devices()) < 2", reason="needs two GPUs")
def test_two_gpus_against_one():
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    inputs = inputs_of(ENCODER)
    function, arrays = function_of(inputs)
    mesh = Mesh(np.array(jax.devices()[:2]), ("n",))
    divided = {name: jax.device_put(array, NamedSharding(mesh, PartitionSpec("n"))) for name, array in arrays.items()}
    want, want_gradients = output_and_gradients(function, arrays, inputs.grad_output)
    got, gradients = output_and_gradients(function, divided, inputs.grad_output)
    assert_close(got, want, "float32")
    for name, gradient in gradients.items():
        assert_close(gradient, want_gradients[name], "float32", name)
