"""What torch's counter of floating-point operations counts: two per multiply-add, sample, channel and neighbour."""

import itertools

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from cupy_msda.torch import decomposed, devices, ms_deform_attn, ms_deform_attn_fused
from tests.helpers.cases import VARIANTS, Case
from tests.helpers.torch_calls import (
    DEVICES,
    attention_module,
    backward_operator,
    forward_operator,
    module_inputs,
    tensors,
    tensors_of,
)

# N, Q, M, L, P, D of `tensors`
N, Q, M, L, P, D = 2, 5, 2, 2, 2, 8
ONE_PASS = 2 * (N * Q * M * L * P) * D * 4


def counted(function):
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


@pytest.mark.parametrize("device", [*DEVICES, "meta"])
def test_an_eager_call_counts_forward_and_backward(device):
    *inputs, grad_output = tensors(device, starts=True)
    assert counted(lambda: ms_deform_attn(*inputs)) == ONE_PASS
    assert counted(lambda: ms_deform_attn(*inputs).backward(grad_output)) == 3 * ONE_PASS


@pytest.mark.parametrize("device", DEVICES)
def test_repeated_calls_count_as_the_first(device):
    *inputs, grad_output = tensors(device, starts=True)
    for _ in range(4):
        ms_deform_attn(*inputs).backward(grad_output)
    assert counted(lambda: ms_deform_attn(*inputs).backward(grad_output)) == 3 * ONE_PASS


@pytest.mark.parametrize("device", DEVICES)
def test_a_backward_counts_where_the_forward_did_not(device):
    *inputs, grad_output = tensors(device, starts=True)
    output = ms_deform_attn(*inputs)
    assert counted(lambda: output.backward(grad_output)) == 2 * ONE_PASS


@pytest.mark.parametrize("mask", list(itertools.product((False, True), repeat=3)), ids=str)
def test_a_plain_backward_counts_the_gradients_in_its_mask(mask):
    *inputs, grad_output = tensors("cpu", requires_grad=False)
    passes = mask[0] + (mask[1] or mask[2])
    assert counted(lambda: backward_operator(grad_output, *inputs, 64, None, mask)) == passes * ONE_PASS


@pytest.mark.parametrize("mask", list(itertools.product((False, True), repeat=4)), ids=str)
@pytest.mark.parametrize("packed", [False, True])
def test_a_fused_backward_counts_the_gradients_in_its_mask(mask, packed):
    value, shapes, _, offsets, logits, grad_output = tensors("cpu", requires_grad=False)
    samples = (torch.cat((offsets.flatten(3), logits.flatten(3)), -1), None) if packed else (offsets, logits)
    settings = (64, None, None, "bilinear", "zeros", False, None, None)
    inputs = (value, shapes, None, torch.rand(N, Q, L, 2), *samples, *settings)
    operators = torch.ops.cupy_msda
    assert counted(lambda: operators.ms_deform_attn_fused(*inputs)) == ONE_PASS
    passes = mask[0] + any(mask[1:])
    backward = operators.ms_deform_attn_fused_backward
    assert counted(lambda: backward(grad_output, *inputs, mask)) == passes * ONE_PASS


@pytest.mark.parametrize("case", [Case("plain", N=1, D=3, M=1, queries=7), *VARIANTS[:7]], ids=str)
def test_variants_count_their_samples_and_neighbours(case):
    *inputs, _ = tensors_of(case)
    samples = inputs[4].numel()
    neighbours = 1 if case.variant.get("interpolation") == "nearest" else 4
    with torch.no_grad():
        count = counted(lambda: ms_deform_attn(*inputs, **case.variant))
    assert count == 2 * samples * case.D * neighbours


@pytest.mark.parametrize("sizes", [{"N": 0}, {"queries": 0}], ids=str)
def test_nothing_counts_nothing(sizes):
    *inputs, _ = tensors("cpu", requires_grad=False, **sizes)
    assert counted(lambda: ms_deform_attn(*inputs)) == 0


def test_level_sizes_may_be_numbers():
    value, _, _, locations, weights, _ = tensors("cpu", requires_grad=False)
    assert counted(lambda: ms_deform_attn(value, [(6, 7), (3, 4)], [0, 42], locations, weights)) == ONE_PASS
    sizes = {"level_sizes": [6, 7, 3, 4]}
    assert counted(lambda: forward_operator(value, None, None, locations, weights, **sizes)) == ONE_PASS


def test_padding_counts():
    *inputs, _ = tensors("cpu", requires_grad=False)
    assert counted(lambda: ms_deform_attn(*inputs, query_lengths=[1, 2])) == ONE_PASS


def test_the_layer_counts_its_projections_and_the_operator():
    layer, inputs = attention_module(), module_inputs()
    model = nn.Sequential(layer)
    query, _, memory, *_ = inputs
    linear = sum(
        2 * rows * projection.weight.numel()
        for projection, rows in (
            (layer.sampling_offsets, query[..., 0].numel()),
            (layer.attention_weights, query[..., 0].numel()),
            (layer.value_proj, memory[..., 0].numel()),
            (layer.output_proj, query[..., 0].numel()),
        )
    )
    samples = 2 * 5 * 2 * 2 * 3
    with FlopCounterMode(display=False) as counter:
        model[0](*inputs)
    assert counter.get_total_flops() == linear + 2 * samples * 8 * 4
    by_operator = counter.get_flop_counts()["MSDeformAttn"]
    assert by_operator[torch.ops.cupy_msda.ms_deform_attn_fused] == 2 * samples * 8 * 4


def test_a_device_without_kernels_counts_the_same(monkeypatch):
    monkeypatch.setattr(devices, "_WITH_KERNELS", ())
    monkeypatch.setattr(devices, "_noted", {"cpu"})
    *inputs, grad_output = tensors("cpu", starts=True)
    assert counted(lambda: ms_deform_attn(*inputs).backward(grad_output)) == 3 * ONE_PASS


def test_torchs_own_functions_count_as_torch_counts_them():
    *inputs, _ = tensors("cpu", requires_grad=False)
    with decomposed():
        assert counted(lambda: ms_deform_attn(*inputs)) == 0


def test_the_fused_function_counts():
    value, shapes, _, offsets, logits, _ = tensors("cpu")
    references = torch.rand(N, Q, 1, 4)
    assert counted(lambda: ms_deform_attn_fused(value, shapes, None, references, offsets, logits)) == ONE_PASS
