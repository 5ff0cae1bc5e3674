"""What stands in for a function of a model leaves tensors on devices without kernels to the model's own function.

The CPU stands in for such a device: the rule of the package does not count it among those with kernels.
"""

import importlib
import sys
from types import ModuleType

import pytest
import torch
from torch import nn

from cupy_msda.torch import devices, mmcv, modules, ms_deform_attn, transformers
from cupy_msda.torch.integrations.patch import Patch
from cupy_msda.torch.integrations.transformers import serve_function, serve_layer
from tests.helpers import model_functions
from tests.helpers.cases import Case
from tests.helpers.torch_calls import tensors_of


@pytest.fixture
def without_kernels(monkeypatch):
    monkeypatch.setattr(devices, "_WITH_KERNELS", ())


@pytest.fixture
def operator_calls(monkeypatch):
    """Calls of the operator by what stands in for functions of models."""
    calls = []
    for module in (modules, mmcv, transformers):
        monkeypatch.setattr(module, "ms_deform_attn", lambda *a, **k: calls.append(1) or ms_deform_attn(*a, **k))
    return calls


class MultiScaleDeformableAttention(nn.Module):
    """A layer of a model, by the signature of transformers; it marks its results."""

    def forward(self, value, value_spatial_shapes, value_spatial_shapes_list, level_start_index, sampling_locations,
                attention_weights, im2col_step):  # fmt: skip
        return ("the model's own", value)


def multi_scale_deformable_attention(value, value_spatial_shapes, sampling_locations, attention_weights):
    return ("the model's own", value)


class Keeper(nn.Module):
    """Keeps the function, as layers of D-FINE do."""

    def __init__(self):
        super().__init__()
        self.ms_deformable_attn_core = multi_scale_deformable_attention


@pytest.fixture
def model():
    """A module with a layer and functions, as transformers has them."""
    module = ModuleType(__name__)
    for part in (MultiScaleDeformableAttention, multi_scale_deformable_attention, Keeper):
        setattr(module, part.__name__, part)
    return module


def layer_arguments():
    value, shapes, starts, locations, weights, _ = tensors_of(Case("model"))
    return value, shapes, shapes.tolist(), starts, locations, weights, 64


def function_arguments():
    value, shapes, _, locations, weights, _ = tensors_of(Case("model"))
    return value, shapes, locations, weights


@pytest.mark.parametrize("by_name", [False, True], ids=["by position", "by name"])
def test_a_served_layer_leaves_other_devices_to_the_model(model, monkeypatch, by_name):
    layer, arguments = model.MultiScaleDeformableAttention(), layer_arguments()
    names = ("value", "value_spatial_shapes", "value_spatial_shapes_list", "level_start_index", "sampling_locations",
             "attention_weights", "im2col_step")  # fmt: skip

    def call():
        return layer(**dict(zip(names, arguments, strict=True))) if by_name else layer(*arguments)

    with Patch() as done:
        serve_layer(done, model.MultiScaleDeformableAttention, modules.MultiScaleDeformableAttention)
        assert torch.is_tensor(call())
        monkeypatch.setattr(devices, "_WITH_KERNELS", ())
        assert call() == ("the model's own", arguments[0])
        on_meta = [part.to("meta") if torch.is_tensor(part) else part for part in arguments]
        assert layer(*on_meta).is_meta
    assert layer(*arguments) == ("the model's own", arguments[0])


@pytest.mark.parametrize("by_name", [False, True], ids=["by position", "by name"])
def test_a_served_function_leaves_other_devices_to_the_model(model, monkeypatch, by_name):
    arguments, kept = function_arguments(), Keeper()
    names = ("value", "value_spatial_shapes", "sampling_locations", "attention_weights")

    def call(function):
        return function(**dict(zip(names, arguments, strict=True))) if by_name else function(*arguments)

    with Patch() as done:
        serve_function(done, model, transformers.multi_scale_deformable_attention)
        for function in (model.multi_scale_deformable_attention, kept.ms_deformable_attn_core):
            assert torch.is_tensor(call(function))
        monkeypatch.setattr(devices, "_WITH_KERNELS", ())
        for function in (model.multi_scale_deformable_attention, kept.ms_deformable_attn_core):
            assert call(function) == ("the model's own", arguments[0])


def test_serving_twice_serves_once(model):
    with Patch() as outer, Patch() as inner:
        for done in (outer, inner):
            serve_layer(done, model.MultiScaleDeformableAttention, modules.MultiScaleDeformableAttention)
            serve_function(done, model, transformers.multi_scale_deformable_attention)
        served = model.MultiScaleDeformableAttention.forward, model.multi_scale_deformable_attention
        inner.undo()
        assert served == (model.MultiScaleDeformableAttention.forward, model.multi_scale_deformable_attention)
    assert model.multi_scale_deformable_attention is multi_scale_deformable_attention
    assert model.MultiScaleDeformableAttention().forward(*layer_arguments())[0] == "the model's own"


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family", ["deformable_detr", "d_fine"])
def test_a_patched_model_of_transformers_runs_its_own_code(without_kernels, operator_calls, family):
    pytest.importorskip("transformers")
    from tests.helpers.transformers_models import MODELS

    torch.manual_seed(0)
    model, inputs = MODELS[family]()
    model.double().eval()
    with torch.no_grad():
        want = model(**inputs).to_tuple()
        with transformers.patch(family) as patch:
            assert patch.served
            have = model(**inputs).to_tuple()
    assert not operator_calls
    for one, other in zip(have, want, strict=True):
        assert not torch.is_tensor(one) or torch.equal(one, other)


@pytest.fixture
def library(monkeypatch):
    """mmcv's module with its two functions."""
    name = "mmcv.ops.multi_scale_deform_attn"
    module = ModuleType(name)
    function = model_functions.autograd_function()
    function.__name__ = function.__qualname__ = "MultiScaleDeformableAttnFunction"
    for part in (function, model_functions.pixels_first()):
        part.__module__ = name
        setattr(module, part.__name__, part)
    for part in ("mmcv", "mmcv.ops", name):
        monkeypatch.setitem(sys.modules, part, module if part == name else ModuleType(part))
    return importlib.import_module(name)


def test_patched_mmcv_leaves_other_devices_to_its_own_functions(library, monkeypatch):
    value, shapes, starts, locations, weights, _ = tensors_of(Case("mmcv"))

    def call():
        library.MultiScaleDeformableAttnFunction.apply(value, shapes, starts, locations, weights, 64)
        library.multi_scale_deformable_attn_pytorch(value, shapes, locations, weights)

    with mmcv.patch() as patch:
        call()
        assert [line.calls for line in patch.report()] == [1, 1]
        monkeypatch.setattr(devices, "_WITH_KERNELS", ())
        call()
        assert [line.calls for line in patch.report()] == [1, 1]
        assert all("1 calls went to the original: its device has no kernels" in line.reason for line in patch.report())
