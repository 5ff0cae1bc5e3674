"""Tensors whose memory does not hold their elements are computed right or refused, never read as something else."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functionalize, grad, vmap
from torch.masked import masked_tensor
from torch.testing._internal.two_tensor import TwoTensor

import cupy_msda
from cupy_msda.torch import decomposed, ms_deform_attn
from tests.helpers.torch_calls import DEVICES

SIZES = [[2, 2]]


def tensors(device="cpu"):
    generator = torch.Generator().manual_seed(0)
    return [
        torch.rand(shape, generator=generator).to(device)
        for shape in ((1, 4, 1, 2), (1, 3, 1, 1, 2, 2), (1, 3, 1, 1, 2))
    ]


def negated(tensor):
    """A lazy view of memory that holds the negative of `tensor`."""
    view = torch.complex(torch.zeros_like(tensor), -tensor).conj().imag
    assert view.is_neg()
    return view


def zeros(tensor):
    """Zeros without memory."""
    return torch._efficientzerotensor(tensor.shape, device=tensor.device)


def array_function(value, sizes, starts, *samples):
    return cupy_msda.ms_deform_attn(value, sizes, starts, *samples)


def ragged(value, sizes, starts, *samples):
    return ms_deform_attn(value, sizes, starts, *samples, query_lengths=[3])


def operator(value, sizes, starts, *samples):
    return torch.ops.cupy_msda.ms_deform_attn(value, torch.tensor(sizes), starts, *samples)


def composition(*arguments):
    with decomposed():
        return ms_deform_attn(*arguments)


FUNCTIONS = {
    "array function": array_function,
    "eager": ms_deform_attn,
    "ragged": ragged,
    "operator": operator,
    "decomposed": composition,
}


@pytest.mark.parametrize("place", [0, 1, 2], ids=["value", "locations", "weights"])
@pytest.mark.parametrize("lazy", [negated, zeros])
@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("device", DEVICES)
def test_pending_operations_are_carried_out(device, name, lazy, place):
    given, plain = tensors(device), tensors(device)
    given[place] = lazy(given[place])
    plain[place] = given[place].clone() if lazy is zeros else plain[place]
    want = ms_deform_attn(plain[0], SIZES, None, *plain[1:])
    torch.testing.assert_close(FUNCTIONS[name](given[0], SIZES, None, *given[1:]), want)


@pytest.mark.parametrize("lazy", [negated, zeros])
@pytest.mark.parametrize("calls", [1, 3], ids=["first call", "repeated call"])
@pytest.mark.parametrize("device", DEVICES)
def test_pending_operations_on_grad_output_are_carried_out(device, calls, lazy):
    value, *samples = (tensor.requires_grad_() for tensor in tensors(device))
    seed = torch.rand(1, 3, 2, device=device)
    plain = torch.zeros_like(seed) if lazy is zeros else seed
    for _ in range(calls):
        output = ms_deform_attn(value, SIZES, None, *samples)
        want = torch.autograd.grad(output, (value, *samples), plain, retain_graph=True)
        have = torch.autograd.grad(output, (value, *samples), lazy(seed))
        for one, other in zip(have, want, strict=True):
            torch.testing.assert_close(one, other)
    arrays = [tensor.detach() for tensor in (value, *samples)]
    have = cupy_msda.ms_deform_attn_backward(arrays[0], SIZES, None, *arrays[1:], lazy(seed), 64)
    for one, other in zip(have, want, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("name", ["eager", "ragged", "operator", "decomposed"])
def test_wrappers_are_computed(name):
    function, (value, *samples) = FUNCTIONS[name], tensors()
    want = ms_deform_attn(value, SIZES, None, *samples)
    both = function(TwoTensor(value, value), SIZES, None, *samples)
    torch.testing.assert_close(both.a, want)
    torch.testing.assert_close(functionalize(lambda v: function(v, SIZES, None, *samples))(value), want)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = function(mode.from_tensor(value), SIZES, None, *(mode.from_tensor(sample) for sample in samples))
    assert fake.shape == want.shape
    with torch.inference_mode():
        value = value.clone()
    torch.testing.assert_close(function(value, SIZES, None, *samples), want)


# The array functions read memory.
WITHOUT_MEMORY = {
    "FakeTensor": lambda value: FakeTensorMode().from_tensor(value),
    "TwoTensor": lambda value: TwoTensor(value, value),
    "MaskedTensor": lambda value: masked_tensor(value, value > 0.5),
}


@pytest.mark.parametrize("name", WITHOUT_MEMORY)
def test_an_array_function_refuses_a_wrapper(name):
    value, *samples = tensors()
    with pytest.raises(TypeError, match=rf"value: expected a tensor with memory of its own, got {name}"):
        cupy_msda.ms_deform_attn(WITHOUT_MEMORY[name](value), SIZES, None, *samples)


@pytest.mark.parametrize("transform", [vmap, functionalize])
def test_an_array_function_refuses_what_a_transformation_passes(transform):
    value, *samples = tensors()
    with pytest.raises(TypeError, match="value: expected a tensor with memory, got one inside a transformation"):
        transform(lambda v: cupy_msda.ms_deform_attn(v, SIZES, None, *samples))(
            value[None] if transform is vmap else value
        )


def test_an_array_function_refuses_a_tensor_of_grad():
    value, *samples = tensors()
    with pytest.raises(TypeError, match="value: expected a tensor that requires no gradient"):
        grad(lambda v: cupy_msda.ms_deform_attn(v, SIZES, None, *samples).sum())(value)


NOT_DENSE = {
    "nested": lambda value: torch.nested.nested_tensor([value[0]]),
    "jagged": lambda value: torch.nested.nested_tensor([value[0]], layout=torch.jagged),
    "sparse": lambda value: value.to_sparse(),
    "quantised": lambda value: torch.quantize_per_tensor(value, 0.1, 0, torch.qint8),
    "complex": lambda value: torch.complex(value, value),
}


@pytest.mark.parametrize("name", ["array function", "eager", "ragged", "decomposed"])
@pytest.mark.parametrize("kind", NOT_DENSE)
def test_other_layouts_and_numbers_are_refused(kind, name):
    value, *samples = tensors()
    with pytest.raises(TypeError, match="value: expected"):
        FUNCTIONS[name](NOT_DENSE[kind](value), SIZES, None, *samples)
