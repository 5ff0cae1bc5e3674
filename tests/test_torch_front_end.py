"""The fused front end as a torch operator: gradients, compilation, autocast."""

import itertools

import cases
import pytest
from backends import TorchBackend
from cases import Case

torch = pytest.importorskip("torch")

from cupy_msda.torch import ms_deform_attn, ms_deform_attn_fused
from cupy_msda.torch.compositions import front_end

CASE = Case("front", levels=((6, 7), (3, 4)), N=2, M=2, D=8, P=3)
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"))]
FORMS = list(itertools.product((2, 4), (None, 1), (False, True)))


def tensors(device, dtype="float64", **form):
    """Shapes, then value, references, offsets and logits as leaves, and the gradient of the output."""
    inputs = cases.with_front(CASE.inputs(dtype), **form)
    put = TorchBackend(device).put
    leaves = [put(array) for array in (inputs.value, inputs.references, inputs.locations, inputs.weights)]
    leaves = [leaf.requires_grad_() for leaf in leaves if leaf is not None]
    return put(inputs.shapes), leaves, put(inputs.grad_output)


def attend(shapes, value, *samples, **options):
    return ms_deform_attn_fused(value, shapes, None, *samples, **options)


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("device", DEVICES)
def test_equals_the_composition_with_all_gradients(device, form):
    shapes, leaves, grad = tensors(device, coordinates=form[0], levels=form[1], packed=form[2])
    output = attend(shapes, *leaves)
    want = ms_deform_attn(leaves[0], shapes, None, *front_end(shapes, *leaves[1:]))
    torch.testing.assert_close(output, want)
    for got, other in zip(
        torch.autograd.grad(output, leaves, grad), torch.autograd.grad(want, leaves, grad), strict=True
    ):
        torch.testing.assert_close(got, other)


@pytest.mark.parametrize("device", DEVICES)
def test_only_the_gradients_that_are_asked_for(device):
    shapes, leaves, grad = tensors(device, coordinates=4)
    every = torch.autograd.grad(attend(shapes, *leaves), leaves, grad)
    for index, leaf in enumerate(leaves):
        alone = [other.detach() for other in leaves]
        alone[index] = leaf
        (got,) = torch.autograd.grad(attend(shapes, *alone), [leaf], grad)
        torch.testing.assert_close(got, every[index])


@pytest.mark.parametrize("packed", [False, True])
def test_gradients_of_first_and_second_order(packed):
    shapes, leaves, _ = tensors("cpu", packed=packed, coordinates=4)
    leaves = [
        leaf[:1, :2].detach().requires_grad_() if i else leaf[:1].detach().requires_grad_()
        for i, leaf in enumerate(leaves)
    ]
    torch.autograd.gradcheck(lambda *a: attend(shapes, *a), leaves, fast_mode=True)
    torch.autograd.gradgradcheck(lambda *a: attend(shapes, *a), leaves, fast_mode=True)


@pytest.mark.parametrize("packed", [False, True])
def test_compiles_in_one_graph(packed):
    shapes, leaves, grad = tensors("cpu", packed=packed)
    compiled = torch.compile(lambda *a: attend(shapes, *a) * 2, backend="aot_eager", fullgraph=True)
    want = attend(shapes, *leaves) * 2
    got = compiled(*leaves)
    torch.testing.assert_close(got, want)
    for one, other in zip(torch.autograd.grad(got, leaves, grad), torch.autograd.grad(want, leaves, grad), strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("packed", [False, True])
def test_schema_fake_and_autograd_hold_together(packed):
    shapes, leaves, _ = tensors("cpu", packed=packed)
    samples = (*leaves, None)[1:4]
    arguments = (leaves[0], shapes, None, *samples, 64, None, None, "bilinear", "zeros", False, None)
    torch.library.opcheck(torch.ops.cupy_msda.ms_deform_attn_fused.default, arguments)


def test_autocast_takes_references_in_float32():
    shapes, (value, references, offsets, logits), _ = tensors("cpu", "float32")
    half = value.to(torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        output = attend(shapes, half, references.double(), offsets.to(torch.bfloat16), logits)
    assert output.dtype is torch.bfloat16
    torch.testing.assert_close(output.float(), attend(shapes, value, references, offsets, logits), rtol=0.05, atol=0.05)


def test_nearest_refuses_gradients_of_places():
    shapes, (value, references, offsets, logits), _ = tensors("cpu")
    with pytest.raises(ValueError, match="sampling_offsets: expected a tensor that requires no gradient"):
        attend(shapes, value, references.detach(), offsets, logits, interpolation="nearest")
    attend(shapes, value, references.detach(), offsets.detach(), logits, interpolation="nearest").sum().backward()
    assert logits.grad.abs().sum() > 0


def test_what_is_no_tensor_is_named():
    shapes, (value, _, offsets, logits), _ = tensors("cpu")
    with pytest.raises(TypeError, match=r"reference_points: expected a torch\.Tensor, got list"):
        attend(shapes, value, [0.5], offsets, logits)
