"""Calls of the torch operator for the tests: inputs as tensors, outputs with gradients, and the layer around it."""

import pytest
import torch
from torch import nn

from cupy_msda.torch import MSDeformAttn, ms_deform_attn

from .cases import Case

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
LEVELS = ((6, 7), (3, 4))
PIXELS = 6 * 7 + 3 * 4
forward_operator = torch.ops.cupy_msda.ms_deform_attn.default
backward_operator = torch.ops.cupy_msda.ms_deform_attn_backward.default


def tensors(device, dtype=torch.float32, location_dtype=None, requires_grad=True, starts=False, N=2, queries=5, seed=0,
            levels=LEVELS):  # fmt: skip
    """value, shapes, starts, locations, weights, grad_output."""
    inputs = Case("torch", levels=levels, N=N, queries=queries).inputs(seed=seed)
    value, locations, weights, grad_output = (
        torch.from_numpy(inputs[i]).to(device, d)
        for i, d in ((0, dtype), (3, location_dtype or dtype), (4, location_dtype or dtype), (5, dtype))
    )
    shapes = torch.tensor(levels, device=device)
    first = (shapes.prod(1).cumsum(0) - shapes.prod(1)) if starts else None
    leaves = [t.requires_grad_(requires_grad) for t in (value, locations, weights)]
    return leaves[0], shapes, first, leaves[1], leaves[2], grad_output


def tensors_of(case, device="cpu", dtype=torch.float32, location_dtype=None, seed=0):
    """value, shapes, starts, locations, weights, grad_output of a case; with nearest, locations require no gradient."""
    inputs = case.inputs(seed=seed)
    shapes = torch.from_numpy(inputs.shapes).to(device)
    starts = shapes.prod(1).cumsum(0) - shapes.prod(1)
    value, grad_output = (torch.from_numpy(inputs[i]).to(device, dtype) for i in (0, 5))
    locations, weights = (torch.from_numpy(inputs[i]).to(device, location_dtype or dtype) for i in (3, 4))
    for tensor in (value, weights, *(() if case.variant.get("interpolation") else (locations,))):
        tensor.requires_grad_()
    return value, shapes, starts, locations, weights, grad_output


def results(function, arguments):
    """Output and gradients of function(value, shapes, starts, locations, weights), by the inputs that require them."""
    *inputs, grad_output = arguments
    output = function(*inputs)
    leaves = [tensor for tensor in (inputs[0], inputs[3], inputs[4]) if tensor.requires_grad]
    return [output.detach(), *torch.autograd.grad(output, leaves, grad_output)]


def assert_same(have, want, rtol=1e-5):
    for a, b in zip(have, want, strict=True):
        torch.testing.assert_close(a, b, rtol=rtol, atol=rtol)


def between_other_operations(value, shapes, starts, locations, weights):
    """The operator with other operations before and after it, so that there is something to compile."""
    return ms_deform_attn(value * 2, shapes, starts, locations + 0.01, weights.softmax(-1)) * 3


def attention_module(seed=0, **sizes):
    """A small float64 MSDeformAttn whose offsets and weights depend on the query."""
    torch.manual_seed(seed)
    made = MSDeformAttn(**({"d_model": 16, "n_levels": 2, "n_heads": 2, "n_points": 3} | sizes)).double()
    for layer in (made.sampling_offsets, made.attention_weights):
        nn.init.normal_(layer.weight, std=0.3)
    return made


def module_inputs(coordinates=2, N=2, Q=5):
    """Query, reference points, memory, shapes and starts of :func:`attention_module`."""
    torch.manual_seed(1)
    query, memory = torch.randn(N, Q, 16).double(), torch.randn(N, PIXELS, 16).double()
    return query, torch.rand(N, Q, 2, coordinates).double(), memory, torch.tensor(LEVELS), torch.tensor([0, 42])


class Calls(nn.Module):
    """Calls `function` with the inputs of the module."""

    def __init__(self, function, **options):
        super().__init__()
        self.function, self.options = function, options

    def forward(self, *inputs):
        return self.function(*inputs, **self.options)


def to_float32(inputs):
    return tuple(t.float() if t.is_floating_point() else t for t in inputs)
