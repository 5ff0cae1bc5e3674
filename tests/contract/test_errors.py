"""Every error rule of the contract, on every backend: the type of the error, and a message that names the argument."""

import ml_dtypes
import numpy as np
import pytest

import cupy_msda
from tests.helpers.backends import BACKENDS
from tests.helpers.cases import Case

CASE = Case("plain")
FUNCTIONS = ("ms_deform_attn", "ms_deform_attn_forward", "ms_deform_attn_backward")


def call(backend, function="ms_deform_attn_backward", im2col_step=64, **changes):
    inputs = CASE.inputs()._asdict() | changes
    # Metadata stays on the host, where it is checked without validate=True.
    put = [
        a if name in ("shapes", "starts") or not isinstance(a, np.ndarray) else backend.put(a)
        for name, a in inputs.items()
    ]
    if function == "ms_deform_attn_backward":
        return cupy_msda.ms_deform_attn_backward(*put, im2col_step)
    return getattr(cupy_msda, function)(*put[:5], im2col_step)


VALUE = CASE.inputs().value
LOCATIONS = CASE.inputs().locations
WEIGHTS = CASE.inputs().weights
GRAD = CASE.inputs().grad_output

# name: (changed arguments, type of the error, pattern of the message)
WRONG = {
    "value of rank 3": ({"value": VALUE[0]}, ValueError, r"value: .*\[N, S, M, D\].*\[54, 2, 8\]"),
    "locations of rank 5": ({"locations": LOCATIONS[0]}, ValueError, r"sampling_loc.*: .*\[N, Q, M, L, P, 2\]"),
    "weights of rank 6": ({"weights": LOCATIONS}, ValueError, r"attn_weight: .*\[N, Q, M, L, P\]"),
    "locations with 3 numbers": ({"locations": LOCATIONS[..., [0, 1, 0]]}, ValueError, r"sampling_loc: .*P, 2\]"),
    "other N": ({"locations": LOCATIONS[:1]}, ValueError, r"sampling_loc: .*\[2, 5, 2, 2, 2, 2\].*\[1, "),
    "other M": ({"value": VALUE[:, :, :1]}, ValueError, r"sampling_loc: .*N, Q, M"),
    "other L": ({"shapes": np.array([[6, 9]])}, ValueError, r"sampling_loc: .*N, Q, M, L"),
    "other P": ({"weights": WEIGHTS[..., :1]}, ValueError, r"attn_weight: .*N, Q, M, L, P"),
    "other Q": ({"weights": WEIGHTS[:, :3]}, ValueError, r"attn_weight: .*\[2, 5, 2, 2, 2\].*\[2, 3"),
    "level beyond S": ({"shapes": np.array([[6, 7], [4, 4]])}, ValueError, r"spatial_shapes: .*level 1.*S = 54.*58"),
    "start beyond S": ({"starts": np.array([0, 43])}, ValueError, r"spatial_shapes: .*level 1.*pixel 43"),
    "product beyond 64 bits": ({"shapes": np.array([[2**62, 4], [3, 4]])}, ValueError, r"spatial_shapes: .*level 0"),
    "zero height": ({"shapes": np.array([[0, 7], [3, 4]])}, ValueError, r"spatial_shapes: .*positive.*\(0, 7\)"),
    "negative width": ({"shapes": np.array([[6, 7], [3, -4]])}, ValueError, r"spatial_shapes: .*\(3, -4\) for level 1"),
    "negative start": ({"starts": np.array([0, -1])}, ValueError, r"level_start_index: .*-1 for level 1"),
    "starts of other length": ({"starts": np.array([0])}, ValueError, r"level_start_index: .*L = 2.*\[1\]"),
    "shapes of rank 1": ({"shapes": np.array([6, 7])}, ValueError, r"spatial_shapes: .*\[L, 2\]"),
    "ragged shapes": ({"shapes": [(6, 7), (3,)]}, ValueError, r"spatial_shapes: .*equal length"),
    "float shapes": ({"shapes": np.array([[6.0, 7.0], [3.0, 4.0]])}, TypeError, r"spatial_shapes: .*integer.*float64"),
    "float starts": ({"starts": np.array([0.0, 42.0])}, TypeError, r"level_start_index: .*integer.*float64"),
    "bool shapes": ({"shapes": np.ones((2, 2), bool)}, TypeError, r"spatial_shapes: .*integer"),
    "shapes of strings": ({"shapes": [("a", "b")]}, TypeError, r"spatial_shapes: .*integer"),
    "shapes missing": ({"shapes": None}, TypeError, r"spatial_shapes: expected an array.*NoneType"),
    "integer value": ({"value": VALUE.astype(np.int32)}, TypeError, r"value: .*float16.*float64.*int32"),
    "complex value": ({"value": VALUE.astype(np.complex64)}, TypeError, r"value: .*float16.*complex64"),
    "float64 locations": ({"locations": LOCATIONS.astype(np.float64)}, TypeError, r"loc: .*float32 .*float64"),
    "float64 value": ({"value": VALUE.astype(np.float64)}, TypeError, r"sampling_loc: .*float64 .*float32"),
    "float16 locations": ({"locations": LOCATIONS.astype(np.float16)}, TypeError, r"sampling_loc: .*float32.*float16"),
    "float16 weights": ({"weights": WEIGHTS.astype(np.float16)}, TypeError, r"attn_weight: .*float32.*float16"),
    "grad_output of other shape": ({"grad_output": GRAD[:, :4]}, ValueError, r"grad_output: .*= \[2, 5, 16\]"),
    "grad_output by heads": ({"grad_output": GRAD.reshape(2, 5, 2, 8)}, ValueError, r"grad_output: .*\[N, Q, M\*D\]"),
    "grad_output of other dtype": ({"grad_output": GRAD.astype(np.float16)}, TypeError, r"grad_output: .*float32.*16"),
    "value is a list": ({"value": [[1.0]]}, TypeError, r"value: expected an array.*list"),
    "value is None": ({"value": None}, TypeError, r"value: expected an array.*NoneType"),
    "im2col_step 0": ({"im2col_step": 0}, ValueError, r"im2col_step: expected a positive int, got 0"),
    "im2col_step -1": ({"im2col_step": -1}, ValueError, r"im2col_step: expected a positive int, got -1"),
    "im2col_step 1.5": ({"im2col_step": 1.5}, TypeError, r"im2col_step: expected a positive int, got 1.5"),
    "im2col_step True": ({"im2col_step": True}, TypeError, r"im2col_step: expected a positive int, got True"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_wrong_argument_is_named(main_backend, name):
    changes, error, message = WRONG[name]
    with pytest.raises(error, match=message):
        call(main_backend, **changes)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_every_function_names_its_own_parameters(main_backend, function):
    name = "sampling_locations" if function == "ms_deform_attn" else "sampling_loc"
    with pytest.raises(ValueError, match=rf"^{name}: expected shape"):
        call(main_backend, function, locations=LOCATIONS[:, :, :, :, :, :1])


def test_mixed_sixteen_bit_dtypes_are_refused(main_backend):
    if main_backend.name == "numpy":
        value = VALUE.astype(ml_dtypes.bfloat16)
        with pytest.raises(TypeError, match=r"sampling_loc: .*bfloat16 or float32.*float16"):
            call(main_backend, value=value, locations=LOCATIONS.astype(np.float16))
    with pytest.raises(TypeError, match=r"attn_weight: expected the dtype of sampling_loc, float16, got float32"):
        call(main_backend, value=VALUE.astype(np.float16), locations=LOCATIONS.astype(np.float16))


@pytest.mark.parametrize("other", BACKENDS, ids=lambda b: b.name)
def test_mixed_frameworks_are_refused(main_backend, other):
    frameworks = {one.name.partition("-")[0].replace("numba", "numpy") for one in (main_backend, other)}
    if len(frameworks) == 1:
        pytest.skip("the same framework")
    inputs = CASE.inputs()
    put = [main_backend.put(a) if a is not None else None for a in inputs]
    put[3] = other.put(inputs.locations)
    with pytest.raises(TypeError, match=r"sampling_locations: expected an array of value's framework"):
        cupy_msda.ms_deform_attn(*put[:5])


@pytest.mark.gpu
def test_mixed_devices_are_refused():
    torch = pytest.importorskip("torch")

    put = [None if a is None else torch.from_numpy(a) for a in CASE.inputs()]
    put[3] = put[3].cuda()
    with pytest.raises(ValueError, match=r"sampling_locations: expected value's device, cpu, got cuda:0"):
        cupy_msda.ms_deform_attn(*put[:5])


@pytest.mark.parametrize("wrong", [1, "yes", 0.0], ids=str)
def test_deterministic_must_be_a_bool(wrong):
    inputs = CASE.inputs()
    with pytest.raises(TypeError, match=r"deterministic: expected True, False or None"):
        cupy_msda.ms_deform_attn(*inputs[:5], deterministic=wrong)


def test_other_byte_order_is_refused():
    inputs = CASE.inputs()
    with pytest.raises(TypeError, match=r"value: expected an array in native byte order"):
        cupy_msda.ms_deform_attn(inputs.value.astype(">f4"), *inputs[1:5])


def test_tensor_on_another_device_is_refused():
    torch = pytest.importorskip("torch")

    put = [None if a is None else torch.from_numpy(a) for a in CASE.inputs()]
    with pytest.raises(TypeError, match=r"value: expected a tensor on the CPU or a CUDA device, got one on meta"):
        cupy_msda.ms_deform_attn(put[0].to("meta"), *put[1:5])


def test_jax_tracer_is_refused():
    jax = pytest.importorskip("jax")

    inputs = CASE.inputs()
    with pytest.raises(TypeError, match=r"value: expected a concrete JAX array"):
        jax.jit(lambda value: cupy_msda.ms_deform_attn(value, *inputs[1:5]))(inputs.value)


def test_arguments_are_not_changed(main_backend):
    put = [main_backend.put(array) for array in CASE.inputs()]
    cupy_msda.ms_deform_attn(*put[:5])
    cupy_msda.ms_deform_attn_backward(*put, 64)
    for before, after in zip(CASE.inputs(), put, strict=True):
        if before is not None:
            np.testing.assert_array_equal(main_backend.get(after), before)


WRONG_VARIANTS = {
    "other interpolation": ({"interpolation": "bicubic"}, ValueError, r"interpolation: .*bilinear.*nearest.*bicubic"),
    "other padding": ({"padding_mode": "reflection"}, ValueError, r"padding_mode: .*zeros.*border.*reflection"),
    "padding of None": ({"padding_mode": None}, ValueError, r"padding_mode: .*None"),
    "align_corners of 1": ({"align_corners": 1}, TypeError, r"align_corners: expected True or False, got int"),
    "border with nearest": (
        {"interpolation": "nearest", "padding_mode": "border"}, ValueError, r"padding_mode: expected 'zeros' with"
    ),
    "align_corners with nearest": (
        {"interpolation": "nearest", "align_corners": True}, ValueError, r"align_corners: expected False with"
    ),
    "points of another L": ({"num_points": [1, 2, 1]}, ValueError, r"num_points: .*L = 2, got \[1, 2, 1\]"),
    "points of 0": ({"num_points": [4, 0]}, ValueError, r"num_points: expected a positive int, got 0"),
    "points of a float": ({"num_points": [2.0, 2.0]}, TypeError, r"num_points: expected a positive int, got 2.0"),
    "points that are a number": ({"num_points": 4}, TypeError, r"num_points: expected a list or tuple.*int"),
    "points and locations with levels": ({"num_points": [2, 2]}, ValueError, r"sampling_loc.*sum\(num_points\), 2\]"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG_VARIANTS)
def test_wrong_variant_is_named(main_backend, name):
    variant, error, message = WRONG_VARIANTS[name]
    put = [main_backend.put(a) if isinstance(a, np.ndarray) else a for a in CASE.inputs()]
    for function, count in ((cupy_msda.ms_deform_attn, 5), (cupy_msda.ms_deform_attn_backward, 6)):
        with pytest.raises(error, match=message):
            function(*put[:count], 64, **variant)


def test_num_points_must_match_the_samples(main_backend):
    inputs = Case("points", variant={"num_points": (1, 3)}).inputs()
    put = [main_backend.put(a) if isinstance(a, np.ndarray) else a for a in inputs]
    with pytest.raises(ValueError, match=r"sum\(num_points\), 2\] = \[2, 5, 2, 5, 2\], got \[2, 5, 2, 4, 2\]"):
        cupy_msda.ms_deform_attn(*put[:5], num_points=(1, 4))
