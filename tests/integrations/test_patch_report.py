"""What cupy_msda.torch.patch leaves to the original, and what it says of that."""

import functools
import inspect
import random

import numpy as np
import pytest
import torch
from torch import nn

import cupy_msda.torch
from cupy_msda.torch.integrations import conventions
from tests.helpers import model_functions as stand_ins
from tests.helpers import patched_modules
from tests.helpers.model_functions import SHAPES, by_level, samples
from tests.helpers.patched_modules import NAME, call, line, put
from tests.helpers.torch_calls import assert_same

module = pytest.fixture(patched_modules.module)


def double(function):
    @functools.wraps(function)
    def wrapper(*arguments, **named):
        return 2 * function(*arguments, **named)

    return wrapper


def wrong_gradient(function):
    @functools.wraps(function)
    def wrapper(value, *others):
        return function(2 * value.detach() - value, *others)

    return wrapper


REFUSED = {
    "another result": (double(stand_ins.pixels_first()), "it computes something else"),
    "another gradient": (wrong_gradient(stand_ins.pixels_first()), "its gradients are not"),
    "a parameter that is demanded": (
        lambda value, value_spatial_shapes, sampling_locations, attention_weights, depth: None, "it demands depth",
    ),
    "other parameters": (lambda query, key: None, "no parameter value, value_spatial_shapes, sampling_locations"),
    "any parameters": (lambda *arguments: None, "parameters without names"),
    "no tensor": (
        lambda value, value_spatial_shapes, sampling_locations, attention_weights: None, "its output is not",
    ),
    "an error": (
        lambda value, value_spatial_shapes, sampling_locations, attention_weights: 1 / 0, "it raised ZeroDivisionError",
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_not_the_operator_is_kept_and_named(module, kind):
    function, reason = REFUSED[kind]
    function.__name__ = function.__qualname__ = "ms_deform_attn_core_pytorch"
    code = put(module, function).__code__
    with cupy_msda.torch.patch() as patch:
        assert function.__code__ is code
        assert line(patch).status == "kept"
        assert reason in line(patch).reason


def test_a_function_of_another_name_is_not_called(module):
    def attention(value, value_spatial_shapes, sampling_locations, attention_weights):
        raise AssertionError("it was called")

    put(module, attention)
    with cupy_msda.torch.patch() as patch:
        assert not [line for line in patch.report() if line.name.startswith(NAME)]


def test_a_call_of_an_unknown_form_goes_to_the_original(module):
    def ms_deform_attn_core_pytorch(
        value, value_spatial_shapes, sampling_locations, attention_weights, return_value=False
    ):
        output = stand_ins.composition(
            value, value_spatial_shapes, sampling_locations.unbind(3), attention_weights.unbind(3)
        )
        return (output, value) if return_value else output

    function = put(module, ms_deform_attn_core_pytorch)
    value, locations, weights, _ = samples()
    with cupy_msda.torch.patch() as patch:
        output, also = function(value, SHAPES, by_level(locations), by_level(weights), return_value=True)
        assert also is value
        assert_same([function(value, SHAPES, by_level(locations), by_level(weights))], [output], 1e-9)
        assert line(patch).calls == 1
        assert "1 calls went to the original: return_value is given" in line(patch).reason


def test_a_layout_that_was_not_compared_goes_to_the_original(module):
    function = put(module, stand_ins.pixels_first())
    value, locations, weights, _ = samples()
    with cupy_msda.torch.patch() as patch:
        with pytest.raises(RuntimeError):
            function(value, SHAPES, locations, weights)
        assert "unknown layout" in line(patch).reason


def test_random_generators_and_modes_are_as_before(module):
    def ms_deform_attn_core_pytorch(value, value_spatial_shapes, sampling_locations, attention_weights):
        random.random(), np.random.rand(), torch.rand(1)  # noqa: NPY002
        assert torch.is_grad_enabled()
        value.zero_()

    put(module, ms_deform_attn_core_pytorch)
    states = random.getstate(), str(np.random.get_state()), torch.get_rng_state()  # noqa: NPY002
    with torch.no_grad(), cupy_msda.torch.patch():
        assert not torch.is_grad_enabled()
    assert (random.getstate(), str(np.random.get_state())) == states[:2]  # noqa: NPY002
    assert torch.equal(torch.get_rng_state(), states[2])


class DeformableAttention(nn.Module):
    """A layer that computes by itself."""

    def forward(self, x):
        return x


def test_self_attention_of_deformable_detr_is_no_deformable_attention():
    class DeformableDetrSelfAttention(DeformableAttention):
        pass

    class DeformableDetrMultiscaleDeformableAttention(DeformableAttention):
        pass

    model = nn.Sequential(DeformableDetrSelfAttention(), DeformableDetrMultiscaleDeformableAttention())
    with cupy_msda.torch.patch(model) as patch, pytest.warns(UserWarning, match="the layer '1'") as warned:
        model(torch.ones(1))
    assert len(warned) == 1
    assert "kept: 1;" in str(patch.report())
    assert "kept: 0;" not in str(patch.report())


def test_an_attention_layer_that_does_not_reach_the_operator_is_named_once():
    model = nn.Sequential(DeformableAttention())
    with cupy_msda.torch.patch(model) as patch:
        with pytest.warns(UserWarning, match="a call of the layer '0' did not reach the operator"):
            model(torch.ones(1))
        model(torch.ones(1))
        assert line(patch, "0").reason == "a call of this layer did not reach the operator"
    assert not model[0]._forward_hooks
    assert not model[0]._forward_pre_hooks


def test_an_attention_layer_that_reaches_the_operator_is_not_named(module):
    function = put(module, stand_ins.pixels_first())

    class DeformableAttention(nn.Module):
        def forward(self, *arguments):
            return function(*arguments)

    model = nn.Sequential()
    model.append(DeformableAttention())
    with cupy_msda.torch.patch(model) as patch:
        call(model[0])
        assert [line.status for line in patch.report() if line.name in ("0", f"{NAME}.x")] == []
        assert line(patch).calls == 1


def test_a_scripted_function_is_named(module):
    scripted = torch.jit.trace(lambda value: value * 2, torch.ones(1))
    module.ms_deform_attn_core_pytorch = scripted
    with cupy_msda.torch.patch() as patch:
        assert line(patch, "ms_deform").status == "compiled already"


def test_patches_nest(module):
    function = put(module, stand_ins.pixels_first())
    code = function.__code__
    with cupy_msda.torch.patch() as outer:
        with cupy_msda.torch.patch() as inner:
            call(function)
            assert line(inner).calls == 1
        call(function)
        assert (line(outer).calls, line(inner).calls) == (2, 1)
    assert function.__code__ is code


def test_undo_restores_the_module(module):
    function = put(module, stand_ins.pixels_first())
    before = dict(function.__globals__), function.__code__
    cupy_msda.torch.patch().undo()
    assert (dict(function.__globals__), function.__code__) == before


def test_a_patched_function_keeps_its_signature(module):
    function = put(module, stand_ins.points_per_level())
    before = str(inspect.signature(function))
    with cupy_msda.torch.patch():
        assert str(inspect.signature(function)) == before


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_other_dtypes_are_served(module, dtype):
    function = put(module, stand_ins.pixels_first())
    value, locations, weights, _ = samples(dtype=dtype)
    with cupy_msda.torch.patch() as patch:
        output = function(value, SHAPES, by_level(locations.float()), by_level(weights))
        assert output.dtype is dtype
        assert line(patch).calls == 1


def test_names_of_code_bases_are_recognised():
    names = (
        "ms_deform_attn_core_pytorch MSDeformAttnFunction MultiScaleDeformableAttnFunction_fp16 "
        "multi_scale_deformable_attn_pytorch deformable_attention_core_func_v2 MultiScaleDeformableAttention"
    )
    assert all(map(conventions.NAME.search, names.split()))
    assert not conventions.NAME.search("DeformConv2d")
