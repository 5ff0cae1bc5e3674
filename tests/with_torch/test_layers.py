"""The layers: parameters of Deformable DETR, both kinds of reference points, padding, and the kernel layer."""

import inspect
import math

import pytest
import torch
import torch.nn.functional as F

from cupy_msda.torch import MSDeformAttn, MultiScaleDeformableAttention, decomposed, ms_deform_attn
from tests.helpers.torch_calls import DEVICES, LEVELS, attention_module, module_inputs, to_float32
from tests.helpers.torch_calls import PIXELS as S


def test_parameters_are_those_of_deformable_detr():
    """Names and shapes of models/ops/modules/ms_deform_attn.py, so that its checkpoints load."""
    shapes = {name: tuple(p.shape) for name, p in MSDeformAttn().state_dict().items()}
    assert shapes == {
        "sampling_offsets.weight": (256, 256),
        "sampling_offsets.bias": (256,),
        "attention_weights.weight": (128, 256),
        "attention_weights.bias": (128,),
        "value_proj.weight": (256, 256),
        "value_proj.bias": (256,),
        "output_proj.weight": (256, 256),
        "output_proj.bias": (256,),
    }


def test_initial_values_are_those_of_the_paper():
    layer = MSDeformAttn(d_model=32, n_levels=2, n_heads=8, n_points=3)
    bias = layer.sampling_offsets.bias.detach().view(8, 2, 3, 2)
    diagonal = [(1, 0), (1, 1), (0, 1), (-1, 1), (-1, 0), (-1, -1), (0, -1), (1, -1)]
    for point in range(3):
        want = (point + 1) * torch.tensor(diagonal, dtype=torch.float32)
        torch.testing.assert_close(bias[:, :, point], want[:, None].expand(8, 2, 2), rtol=0, atol=2e-6)
    for zero in (layer.sampling_offsets.weight, layer.attention_weights.weight, layer.attention_weights.bias,
                 layer.value_proj.bias, layer.output_proj.bias):  # fmt: skip
        assert not zero.any()
    for projection in (layer.value_proj, layer.output_proj):
        assert projection.weight.abs().max() <= math.sqrt(6 / 64)


@pytest.mark.parametrize("coordinates", [2, 4])
def test_forward_is_the_formula(coordinates):
    layer, (query, references, memory, shapes, starts) = attention_module(), module_inputs(coordinates)
    value = layer.value_proj(memory).view(2, S, 2, 8)
    offsets = layer.sampling_offsets(query).view(2, 5, 2, 2, 3, 2)
    weights = F.softmax(layer.attention_weights(query).view(2, 5, 2, 6), -1).view(2, 5, 2, 2, 3)
    locations = torch.empty_like(offsets)
    for level, (h, w) in enumerate(LEVELS):
        at = references[:, :, None, level, None]
        if coordinates == 2:
            locations[:, :, :, level] = at + offsets[:, :, :, level] / torch.tensor([w, h])
        else:
            locations[:, :, :, level] = at[..., :2] + offsets[:, :, :, level] / 3 * at[..., 2:] / 2
    want = layer.output_proj(ms_deform_attn(value, shapes, starts, locations, weights))
    torch.testing.assert_close(layer(query, references, memory, shapes, starts), want)


def test_level_sizes_may_be_numbers():
    layer, (query, references, memory, shapes, starts) = attention_module(), module_inputs()
    want = layer(query, references, memory, shapes, starts)
    torch.testing.assert_close(layer(query, references, memory, LEVELS, None), want, rtol=0, atol=0)


def test_padding_counts_as_zero():
    layer, (query, references, memory, shapes, starts) = attention_module(), module_inputs()
    padding = torch.rand(2, S) < 0.5
    have = layer(query, references, memory, shapes, starts, padding)
    bias = layer.value_proj.bias
    zeroed = torch.where(padding[..., None], -(bias @ torch.linalg.pinv(layer.value_proj.weight.T)), memory)
    torch.testing.assert_close(have, layer(query, references, zeroed, shapes, starts), rtol=1e-8, atol=1e-8)


def test_gradients_reach_every_parameter_and_agree_with_decomposed():
    layer, inputs = attention_module(), module_inputs(4)
    grads = []
    for way in (torch.enable_grad, decomposed):
        layer.zero_grad()
        with way():
            layer(*inputs).square().sum().backward()
        grads.append([p.grad.clone() for p in layer.parameters()])
    for ours, theirs in zip(*grads, strict=True):
        assert ours.any()
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_locations_are_float32_under_autocast(dtype):
    """16 bits of a location do not resolve half a pixel of a level of 1024 columns."""
    layer, (query, references, *_) = attention_module(n_levels=1).float(), to_float32(module_inputs())
    memory, levels = torch.randn(2, 1024, 16), [(1, 1024)]
    references = references[:, :, :1] * 0.2 + 0.75
    with torch.autocast("cpu", dtype):
        have = layer(query, references, memory, levels, None)
        offsets = layer.sampling_offsets(query).view(2, 5, 2, 1, 3, 2).float()
        weights = layer.attention_weights(query).view(2, 5, 2, 1, 3).float().softmax(-1)
        locations = references[:, :, None, :, None] + offsets / torch.tensor([1024.0, 1.0])
        value = layer.value_proj(memory).view(2, 1024, 2, 8)
        assert (value.dtype, locations.dtype) == (dtype, torch.float32)
        want = layer.output_proj(ms_deform_attn(value, levels, None, locations, weights))
        coarse = layer.output_proj(ms_deform_attn(value, levels, None, locations.to(dtype), weights.to(dtype)))
    assert have.dtype is dtype
    torch.testing.assert_close(have, want, rtol=0.02, atol=0.02)
    assert (coarse - want).abs().max() > 0.1


def test_wrong_sizes_are_refused():
    with pytest.raises(ValueError, match=r"d_model: expected a multiple of n_heads = 3, got 16"):
        attention_module(n_heads=3)
    layer, (query, references, *others) = attention_module(), module_inputs()
    with pytest.raises(ValueError, match=r"reference_points: expected shape \[N, Q, L, 2\] for points or"):
        layer(query, references.repeat(1, 1, 1, 2)[..., :3], *others)


def test_kernel_layer_has_the_signature_that_models_call():
    layer = MultiScaleDeformableAttention
    names = list(inspect.signature(layer.forward).parameters)
    assert names == [
        "self", "value", "value_spatial_shapes", "value_spatial_shapes_list", "level_start_index",
        "sampling_locations", "attention_weights", "im2col_step",
    ]  # fmt: skip
    assert "__init__" not in vars(layer)
    assert layer.can_torch_compile
    assert layer.has_backward


def test_kernel_layer_is_the_operator():
    torch.manual_seed(2)
    value, shapes, starts = torch.randn(2, S, 2, 4), torch.tensor(LEVELS), torch.tensor([0, 42])
    locations, weights = torch.rand(2, 5, 2, 2, 3, 2), torch.rand(2, 5, 2, 2, 3)
    have = MultiScaleDeformableAttention()(value, shapes, LEVELS, starts, locations, weights, 64)
    torch.testing.assert_close(have, ms_deform_attn(value, shapes, starts, locations, weights), rtol=0, atol=0)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("coordinates", [2, 4])
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_layer_compiles_into_one_graph_for_all_sizes(device, coordinates, mode):
    torch._dynamo.reset()
    layer = attention_module().float().to(device)
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, mode=mode)
    for Q in (5, 9, 7):
        inputs = [t.to(device) for t in to_float32(module_inputs(coordinates, Q=Q))]
        for _ in range(2):
            torch.testing.assert_close(compiled(*inputs), layer(*inputs), rtol=1e-4, atol=1e-5)
        grads = []
        for way in (compiled, layer):
            layer.zero_grad()
            way(*inputs).square().sum().backward()
            grads.append([p.grad.clone() for p in layer.parameters()])
        torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-4)
    torch._dynamo.reset()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_layer_in_sixteen_bits_with_float32_references(device, dtype):
    layer, inputs = attention_module().to(device), [t.to(device) for t in module_inputs()]
    want = layer(*inputs)
    query, references, memory, *metadata = inputs
    have = layer.to(dtype)(query.to(dtype), references.float(), memory.to(dtype), *metadata)
    assert have.dtype is dtype
    torch.testing.assert_close(have.double(), want, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_layer_trains_under_autocast(device, dtype):
    layer, inputs = attention_module().float().to(device), [t.to(device) for t in to_float32(module_inputs(4))]
    optimizer, losses = torch.optim.Adam(layer.parameters(), lr=0.03), []
    for _ in range(12):
        with torch.autocast(device, dtype):
            loss = (layer(*inputs).float() - 1).square().mean()
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad.isfinite().all() and p.grad.any() for p in layer.parameters())
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


def test_layer_refuses_references_with_another_number_of_levels():
    layer, (query, references, *others) = attention_module(), module_inputs()
    with pytest.raises(ValueError, match=r"reference_points: expected shape \[N, Q, L, 2\] = \[2, 5, 2, 2\]"):
        layer(query, references.repeat(1, 1, 2, 1)[:, :, :3], *others)
