"""Meta tensors: shapes without memory, through the functions and the layers, forward and backward."""

import pytest
import torch
from torch import nn

from cupy_msda.torch import (
    MSDeformAttn,
    MultiScaleDeformableAttention,
    decomposed,
    ms_deform_attn,
    ms_deform_attn_fused,
)
from tests.helpers.torch_calls import LEVELS, attention_module, module_inputs, tensors

METADATA = {
    "tensors on meta": lambda: (torch.tensor(LEVELS, device="meta"), torch.tensor([0, 42], device="meta")),
    "tensors on the CPU": lambda: (torch.tensor(LEVELS), torch.tensor([0, 42])),
    "numbers": lambda: (LEVELS, [0, 42]),
    "contiguous levels": lambda: (LEVELS, None),
}


def plain(device, **sizes):
    value, _, _, locations, weights, grad_output = tensors(device, **sizes)
    return [value, locations, weights], grad_output


def fused(packed):
    def make(device, **sizes):
        (value, locations, weights), grad_output = plain(device, **sizes)
        references = torch.rand(*value.shape[:1], locations.shape[1], 2, 4, device=device)
        leaves = [value, references, locations, weights]
        if packed:
            leaves = [value, references, torch.rand(*weights.shape[:3], 3 * 2 * weights.shape[4], device=device)]
        return [leaf.detach().requires_grad_() for leaf in leaves], grad_output

    return make


FORMS = {
    "plain": (plain, ms_deform_attn),
    "fused": (fused(False), ms_deform_attn_fused),
    "packed": (fused(True), ms_deform_attn_fused),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("metadata", METADATA)
@pytest.mark.parametrize("sizes", [{}, {"N": 0}, {"queries": 0}], ids=str)
def test_output_and_gradients_have_the_layouts_of_the_cpu(form, metadata, sizes):
    make, attend = FORMS[form]
    found = {}
    for device in ("meta", "cpu"):
        leaves, grad_output = make(device, **sizes)
        levels = METADATA["numbers" if device == "cpu" else metadata]()
        output = attend(leaves[0], *levels, *leaves[1:])
        assert output.device.type == device
        with torch.no_grad():
            assert attend(leaves[0], *levels, *leaves[1:]).shape == output.shape
        grads = torch.autograd.grad(output, leaves, grad_output)
        found[device] = [(tensor.shape, tensor.dtype, tensor.is_contiguous()) for tensor in (output, *grads)]
    assert found["meta"] == found["cpu"]


@pytest.mark.parametrize("mixed", [torch.float16, torch.bfloat16], ids=str)
def test_a_16_bit_value_on_meta_keeps_its_dtype(mixed):
    value, shapes, _, locations, weights, _ = tensors("meta", mixed, torch.float32)
    output = ms_deform_attn(value, shapes, None, locations, weights)
    output.sum().backward()
    assert (output.dtype, value.grad.dtype, locations.grad.dtype) == (mixed, mixed, torch.float32)


def wrong_calls():
    """Plain calls that the contract refuses, as changes of a right one."""
    return {
        "value": lambda value, *others: (value.flatten(2), *others),
        "heads": lambda value, shapes, locations, weights: (value[:, :, :1], shapes, locations, weights),
        "levels": lambda value, shapes, *others: (value, shapes[:1], *others),
        "locations": lambda value, shapes, locations, weights: (value, shapes, locations[..., :1], weights),
        "weights": lambda value, shapes, locations, weights: (value, shapes, locations, weights[:, :1]),
        "dtype": lambda value, shapes, locations, weights: (value, shapes, locations.double(), weights.double()),
        "whole numbers": lambda value, *others: (value.long(), *others),
        "sizes": lambda value, shapes, *others: (value, shapes.float(), *others),
    }


@pytest.mark.parametrize("wrong", wrong_calls())
@pytest.mark.parametrize("on_meta", [False, True], ids=["sizes on the CPU", "sizes on meta"])
def test_what_the_cpu_refuses_is_refused_on_meta_with_the_same_sentence(wrong, on_meta):
    messages = {}
    for device in ("cpu", "meta"):
        value, shapes, _, locations, weights, _ = tensors(device, requires_grad=False)
        shapes = shapes if on_meta else torch.tensor(LEVELS)
        value, shapes, locations, weights = wrong_calls()[wrong](value, shapes, locations, weights)
        with pytest.raises((TypeError, ValueError)) as error:
            ms_deform_attn(value, shapes, None, locations, weights)
        messages[device] = type(error.value), str(error.value)
    assert messages["meta"] == messages["cpu"]


def test_tensors_on_meta_and_on_the_cpu_do_not_mix():
    value, shapes, _, locations, weights, _ = tensors("meta", requires_grad=False)
    with pytest.raises(ValueError, match="attention_weights: expected value's device, meta, got cpu"):
        ms_deform_attn(value, shapes, None, locations, torch.rand(weights.shape))


@pytest.mark.parametrize("metadata", ["tensors on the CPU", "numbers", "contiguous levels"])
@pytest.mark.parametrize("lengths", [None, [2, 5]], ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_the_composition_takes_no_notice_of_the_default_device(form, lengths, metadata):
    make, attend = FORMS[form]
    (value, *samples), _ = make("cpu")
    levels = METADATA[metadata]()
    want = attend(value, *levels, *samples, query_lengths=lengths)
    with torch.device("meta"), decomposed():
        have = attend(value, *levels, *samples, query_lengths=lengths)
    torch.testing.assert_close(have, want)


def test_a_layer_on_meta_infers_shapes_forward_and_backward():
    with torch.device("meta"):
        layer = MSDeformAttn(d_model=16, n_levels=2, n_heads=2, n_points=3)
        query, references, memory = torch.rand(2, 5, 16), torch.rand(2, 5, 2, 2), torch.rand(2, 54, 16)
        shapes, starts, padding = torch.tensor(LEVELS), torch.tensor([0, 42]), torch.zeros(2, 54, dtype=torch.bool)
        output = layer(query, references, memory, shapes, starts, padding)
        output.sum().backward()
    assert (output.shape, output.device.type) == ((2, 5, 16), "meta")
    assert all(p.grad.shape == p.shape and p.grad.is_meta for p in layer.parameters())


def test_the_kernel_layer_on_meta_infers_shapes():
    value, shapes, _, locations, weights, _ = tensors("meta")
    output = MultiScaleDeformableAttention()(value, shapes, list(LEVELS), None, locations, weights, 64)
    assert (output.shape, output.device.type) == ((2, 5, value.shape[2] * value.shape[3]), "meta")


def test_weights_that_are_loaded_later_find_an_empty_layer():
    """What accelerate's ``init_empty_weights`` does: every parameter goes to meta as it is registered."""
    register = nn.Module.register_parameter

    def register_on_meta(module, name, parameter):
        register(module, name, None if parameter is None else nn.Parameter(parameter.to("meta")))

    trained, inputs = attention_module(), module_inputs()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nn.Module, "register_parameter", register_on_meta)
        layer = MSDeformAttn(d_model=16, n_levels=2, n_heads=2, n_points=3)
    assert all(parameter.is_meta for parameter in layer.parameters())
    layer.load_state_dict(trained.state_dict(), assign=True)
    assert torch.equal(layer(*inputs), trained(*inputs))


def test_parameters_made_on_meta_get_the_initial_values_afterwards():
    torch.manual_seed(3)
    want = MSDeformAttn(d_model=16, n_levels=2, n_heads=2, n_points=3)
    layer = MSDeformAttn(d_model=16, n_levels=2, n_heads=2, n_points=3, device="meta").to_empty(device="cpu")
    for parameter in layer.parameters():
        nn.init.constant_(parameter, torch.nan)
    layer.reset_parameters()
    for name, parameter in layer.named_parameters():
        assert parameter.isfinite().all()
        if name not in ("value_proj.weight", "output_proj.weight"):
            assert torch.equal(parameter, want.get_parameter(name))


def test_a_call_on_meta_may_be_validated():
    value, shapes, _, locations, weights, _ = tensors("meta", requires_grad=False)
    assert ms_deform_attn(value, shapes, None, locations, weights, validate=True).is_meta
