"""Symbolic tracing by torch.fx: the functions are leaves of the graph, and the traced module computes the same."""

import copy
import pickle

import pytest
import torch
from torch import fx, nn
from torch.fx.passes.shape_prop import ShapeProp

from cupy_msda.torch import (
    MSDeformAttnFunction,
    MultiScaleDeformableAttention,
    mmcv,
    ms_deform_attn,
    ms_deform_attn_fused,
    transformers,
)
from tests.helpers.cases import Case
from tests.helpers.torch_calls import LEVELS, PIXELS, attention_module, module_inputs, tensors, tensors_of


class Call(nn.Module):
    """Calls `function` with the inputs of the module, and `options` as they are."""

    def __init__(self, function, **options):
        super().__init__()
        self.function, self.options = function, options

    def forward(self, value, shapes, starts, locations, weights):
        return self.function(value * 1.0, shapes, starts, locations, weights, **self.options)


def targets(traced):
    return [node.target for node in traced.graph.nodes if node.op == "call_function"]


def plain_inputs(num_points=None):
    case = Case("fx", variant={"num_points": num_points} if num_points else {})
    *inputs, _ = tensors_of(case)
    return inputs


OPTIONS = {
    "defaults": {},
    "points": {"num_points": [3, 1]},
    "border": {"padding_mode": "border", "align_corners": True},
    "ragged": {"query_lengths": [2, 5], "deterministic": True},
    "step": {"im2col_step": 2, "validate": True},
}


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("function", [ms_deform_attn, MSDeformAttnFunction.apply], ids=["function", "apply"])
def test_the_plain_function_is_a_leaf(name, function):
    options = OPTIONS[name]
    module, inputs = Call(function, **options), plain_inputs(options.get("num_points"))
    traced = fx.symbolic_trace(module)
    assert ms_deform_attn in targets(traced)
    assert torch.equal(traced(*inputs), module(*inputs))


@pytest.mark.parametrize("packed", [False, True])
def test_the_fused_function_is_a_leaf(packed):
    class Fused(nn.Module):
        def forward(self, value, references, offsets, logits):
            if packed:
                offsets, logits = torch.cat((offsets.flatten(3), logits.flatten(3)), -1), None
            return ms_deform_attn_fused(value, LEVELS, None, references, offsets, logits)

    value, _, _, offsets, logits, _ = tensors("cpu")
    inputs = value, torch.rand(2, 5, 2, 2), offsets, logits
    traced = fx.symbolic_trace(Fused())
    assert ms_deform_attn_fused in targets(traced)
    assert torch.equal(traced(*inputs), Fused()(*inputs))


def test_metadata_alone_may_be_traced():
    inputs = plain_inputs()

    class Fixed(nn.Module):
        def forward(self, shapes, starts):
            value, _, _, locations, weights = inputs
            return ms_deform_attn(value, shapes, starts, locations, weights)

    traced = fx.symbolic_trace(Fixed())
    assert ms_deform_attn in targets(traced)
    assert torch.equal(traced(inputs[1], inputs[2]), ms_deform_attn(*inputs))


@pytest.mark.parametrize("root", [False, True], ids=["inside", "root"])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("coordinates", [2, 4])
def test_the_layer_is_traced_through(root, padded, coordinates):
    class Around(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = attention_module()

        def forward(self, *inputs):
            return self.attention(*inputs)

    class Padded(Around):
        def forward(self, query, references, memory, shapes, starts, padding):
            return self.attention(query, references, memory, shapes, starts, padding)

    class Unpadded(Around):
        def forward(self, query, references, memory, shapes, starts):
            return self.attention(query, references, memory, shapes, starts)

    module, inputs = attention_module() if root else (Padded if padded else Unpadded)(), module_inputs(coordinates)
    if padded:
        inputs = (*inputs, torch.rand(2, PIXELS) < 0.5)
    traced = fx.symbolic_trace(module)
    assert targets(traced).count(ms_deform_attn_fused) == 1
    assert torch.equal(traced(*inputs), module(*inputs))
    more = module_inputs(coordinates, N=3, Q=7)
    padding = [torch.rand(3, PIXELS) < 0.5] * padded
    assert torch.equal(traced(*more, *padding), module(*more, *padding))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda traced: pickle.loads(pickle.dumps(traced))])
def test_a_copy_of_a_traced_layer_computes_the_same(copied):
    layer, inputs = attention_module(), module_inputs()
    assert torch.equal(copied(fx.symbolic_trace(layer))(*inputs), layer(*inputs))


def test_a_traced_layer_trains():
    layer, inputs = attention_module(), module_inputs()
    want = copy.deepcopy(layer)
    fx.symbolic_trace(layer)(*inputs).square().sum().backward()
    want(*inputs).square().sum().backward()
    for name, parameter in layer.named_parameters():
        assert torch.equal(parameter.grad, want.get_parameter(name).grad)


def test_the_kernel_layer_is_traced_through():
    value, shapes, starts, locations, weights = plain_inputs()
    traced = fx.symbolic_trace(MultiScaleDeformableAttention())
    inputs = value, shapes, shapes.tolist(), starts, locations, weights, 64
    assert ms_deform_attn in targets(traced)
    assert torch.equal(traced(*inputs), MultiScaleDeformableAttention()(*inputs))


@pytest.mark.parametrize(
    "function",
    [mmcv.multi_scale_deformable_attn_pytorch, transformers.multi_scale_deformable_attention],
    ids=lambda function: function.__name__,
)
def test_the_functions_of_other_libraries_are_traced_through(function):
    class Model(nn.Module):
        def forward(self, value, shapes, locations, weights):
            return function(value, shapes, locations, weights)

    value, shapes, _, locations, weights = plain_inputs()
    traced = fx.symbolic_trace(Model())
    assert ms_deform_attn in targets(traced)
    assert torch.equal(traced(value, shapes, locations, weights), function(value, shapes, locations, weights))


def test_shapes_are_propagated_through_a_traced_layer_on_meta():
    traced = fx.symbolic_trace(attention_module().to("meta"))
    ShapeProp(traced).propagate(*(tensor.to("meta") for tensor in module_inputs()), None)
    (node,) = (node for node in traced.graph.nodes if node.target is ms_deform_attn_fused)
    assert node.meta["tensor_meta"].shape == (2, 5, 16)


def test_other_things_in_place_of_tensors_are_refused_as_before():
    value, shapes, starts, locations, weights = plain_inputs()
    with pytest.raises(TypeError, match=r"attention_weights: expected a torch.Tensor, got list"):
        ms_deform_attn(value, shapes, starts, locations, weights.tolist())
