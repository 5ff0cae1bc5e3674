"""Value in other layouts than one contiguous array: it is read in place where its value vectors are contiguous."""

import numpy as np
import pytest

import cupy_msda
from cupy_msda.arrays import frameworks
from cupy_msda.call import ValueStrides
from cupy_msda.cuda import plan
from cupy_msda.cuda.gpu import H100
from tests.helpers import cases
from tests.helpers.calls import call_of
from tests.helpers.cases import Case
from tests.helpers.tolerance import assert_close

pytestmark = pytest.mark.sanitizer

CASE = Case("plain", levels=((6, 7), (3, 4)), N=2, M=3, D=16, queries=9)


def projection_slice(value, part):
    """A slice of one projection that holds two values."""
    wide = np.full((*value.shape[:2], 2, *value.shape[2:]), np.nan, value.dtype)
    wide[:, :, part] = value
    return wide, lambda array: array[:, :, part]


def heads_first(value):
    return np.ascontiguousarray(value.swapaxes(1, 2)), lambda array: array.swapaxes(1, 2)


def some_pixels(value):
    """Every third pixel, from the second on."""
    wide = np.full((value.shape[0], 3 * value.shape[1], *value.shape[2:]), np.nan, value.dtype)
    wide[:, 1::3] = value
    return wide, lambda array: array[:, 1::3]


def channels_first(value):
    """[N, M, D, S], as in RF-DETR."""
    return np.ascontiguousarray(value.transpose(0, 2, 3, 1)), lambda array: array.swapaxes(2, 3).swapaxes(1, 2)


LAYOUTS = {
    "projection slice, first": lambda value: projection_slice(value, 0),
    "projection slice, second": lambda value: projection_slice(value, 1),
    "heads first": heads_first,
    "some pixels": some_pixels,
    "channels first": channels_first,
}
IN_PLACE = [name for name in LAYOUTS if name != "channels first"]


def with_layout(backend, inputs, layout):
    """The inputs in the backend's framework, value in that layout."""
    whole, view = LAYOUTS[layout](inputs.value)
    return [view(backend.put(whole)), *(backend.put(array) for array in inputs[1:])]


@pytest.mark.parametrize("pair", [("float32", "float32"), ("float16", "float32"), ("float64", "float64")], ids="-".join)
@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_agrees_with_the_reference(main_backend, layout, deterministic, pair):
    inputs = CASE.inputs(*pair, seed=1)
    want_output, want_grads = cases.expected(inputs)
    put = with_layout(main_backend, inputs, layout)
    output = cupy_msda.ms_deform_attn(*put[:5])
    assert_close(main_backend.get(output), want_output, pair[0])
    grads = cupy_msda.ms_deform_attn_backward(*put, 64, deterministic=deterministic)
    assert_close(main_backend.get(grads[0]), want_grads[0], pair[0], "grad_value")
    assert_close(main_backend.get(grads[2]), want_grads[2], pair[1], "grad_attn_weight")


@pytest.mark.gpu
@pytest.mark.parametrize("layout", LAYOUTS)
def test_only_channels_first_is_copied(monkeypatch, layout):
    from tests.helpers.backends import TorchBackend

    copied = []
    contiguous = frameworks.TorchFramework.contiguous
    monkeypatch.setattr(
        frameworks.TorchFramework, "contiguous", lambda self, view: copied.append(view.shape) or contiguous(self, view)
    )
    inputs = CASE.inputs(seed=2)
    put = with_layout(TorchBackend("cuda"), inputs, layout)
    cupy_msda.ms_deform_attn(*put[:5])
    cupy_msda.ms_deform_attn_backward(*put, 64)
    assert len(copied) == (0 if layout in IN_PLACE else 2)


def problem_of(value, inputs):
    return call_of(value, *inputs[1:5]).problem


def test_strides_of_the_problem():
    inputs = CASE.inputs()
    whole, view = projection_slice(inputs.value, 1)
    assert problem_of(view(whole), inputs).strides == ValueStrides(54 * 96, 96, 16)
    whole, view = heads_first(inputs.value)
    assert problem_of(view(whole), inputs).strides == ValueStrides(54 * 48, 16, 54 * 16)
    assert problem_of(inputs.value, inputs).strides == ValueStrides(54 * 48, 48, 16)
    assert problem_of(inputs.value, inputs).value_strides is None
    for other in (channels_first(inputs.value), (inputs.value, lambda array: array[:, ::-1])):
        assert problem_of(other[1](other[0]), inputs).value_strides is None
    repeated = np.broadcast_to(inputs.value[:1], inputs.value.shape)
    assert problem_of(repeated, inputs).strides == ValueStrides(0, 48, 16)


def test_strides_bound_the_vector_width():
    inputs = CASE.inputs()
    wide = np.zeros((2, 54, 3, 18), np.float32)
    found = problem_of(wide[..., :16], inputs)
    assert found.stride_alignment == 8
    assert plan.forward(found, 16, H100).spec.channels.vec == 2
    assert plan.forward(found, 16, H100).spec.pixel_stride == 54


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_torch_gradients_in_every_layout(layout, device):
    torch = pytest.importorskip("torch")

    from cupy_msda.torch import ms_deform_attn
    from tests.helpers.backends import TorchBackend

    backend = TorchBackend(device)
    inputs = CASE.inputs(seed=3)
    want_output, want_grads = cases.expected(inputs)
    arrays = with_layout(backend, inputs, layout)
    for _ in range(3):  # the first call of a layout, and repeated ones
        leaves = [arrays[index].detach().requires_grad_() for index in (0, 3, 4)]
        output = ms_deform_attn(leaves[0], *arrays[1:3], *leaves[1:])
        assert_close(backend.get(output), want_output, "float32")
        grads = torch.autograd.grad(output, leaves, arrays[5])
        assert_close(backend.get(grads[0]), want_grads[0], "float32", "grad_value")
        assert_close(backend.get(grads[2]), want_grads[2], "float32", "grad_attn_weight")
