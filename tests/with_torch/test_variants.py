"""The variants of the operator in torch: gradients, compilation, export, second order, and torch's own functions."""

import io

import pytest
import torch
import torch.nn.functional as F

from cupy_msda.torch import decomposed, ms_deform_attn
from tests.helpers import cases
from tests.helpers.cases import VARIANTS, Case
from tests.helpers.tolerance import TOLERANCE, assert_close
from tests.helpers.torch_calls import DEVICES, assert_same, backward_operator, forward_operator, results, tensors_of

FORMS = VARIANTS[:7]
# opcheck takes up to ten seconds, so the other forms are long ones.
OPCHECKED = ("points", "one_sample_border", "nearest")


def positional(case):
    """The variant as the operators' last arguments."""
    names = {"num_points": None, "interpolation": "bilinear", "padding_mode": "zeros", "align_corners": False}
    return tuple((names | case.variant).values())


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("case", FORMS, ids=str)
def test_output_and_gradients_agree_with_the_reference(device, case):
    arguments = tensors_of(case, device)
    output, *grads = results(lambda *a: ms_deform_attn(*a, **case.variant), arguments)
    want_output, want = cases.expected(case.inputs(), **case.variant)
    assert_close(output.cpu().numpy(), want_output, "float32")
    if len(grads) == 2:
        want = (want[0], want[2])
    for grad, exact in zip(grads, want, strict=True):
        assert_close(grad.cpu().numpy(), exact, "float32")


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    "case", [case if case.name in OPCHECKED else pytest.param(case, marks=pytest.mark.long) for case in FORMS], ids=str
)
def test_opcheck(device, case):
    *inputs, grad_output = tensors_of(case, device)
    torch.library.opcheck(forward_operator, (*inputs, 64, None, *positional(case)), rtol=1e-5, atol=1e-5)
    torch.library.opcheck(
        backward_operator,
        (grad_output, *inputs, 64, None, [True, inputs[3].requires_grad, True], *positional(case)),
        rtol=1e-5,
        atol=1e-5,
    )


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("case", [FORMS[0], FORMS[3], FORMS[6]], ids=str)
def test_compiled_code_gives_the_same_numbers(device, case):
    torch._dynamo.reset()
    compiled = torch.compile(lambda *a: ms_deform_attn(*a, **case.variant) * 2, fullgraph=True)
    arguments = tensors_of(case, device)
    assert_same(results(compiled, arguments), results(lambda *a: ms_deform_attn(*a, **case.variant) * 2, arguments))


@pytest.mark.parametrize("case", [FORMS[0], FORMS[3], FORMS[6]], ids=str)
def test_an_exported_program_gives_the_same_numbers(case):
    class Net(torch.nn.Module):
        def forward(self, *inputs):
            return ms_deform_attn(*inputs, **case.variant)

    inputs = tuple(tensor.detach() for tensor in tensors_of(case)[:5])
    file = io.BytesIO()
    torch.export.save(torch.export.export(Net(), inputs), file)
    file.seek(0)
    torch.testing.assert_close(torch.export.load(file).module()(*inputs), Net()(*inputs))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("case", FORMS, ids=str)
def test_second_derivatives_agree_with_finite_differences(device, case):
    value, shapes, starts, locations, weights, _ = tensors_of(case, device, torch.float64)
    leaves = [tensor for tensor in (value, locations, weights) if tensor.requires_grad]

    def function(value, *others):
        where, attention = others if len(others) == 2 else (locations, *others)
        return ms_deform_attn(value, shapes, starts, where, attention, **case.variant)

    # torch's own gather adds its gradients in no fixed order on a GPU.
    nondet_tol = 1e-12 if device == "cuda" else 0.0
    torch.autograd.gradgradcheck(function, leaves, fast_mode=True, nondet_tol=nondet_tol)


@pytest.mark.parametrize("case", FORMS, ids=str)
def test_decomposed_calls_agree_with_the_operator(case):
    arguments = tensors_of(case, dtype=torch.float64)
    direct = results(lambda *a: ms_deform_attn(*a, **case.variant), arguments)
    with decomposed():
        assert_same(results(lambda *a: ms_deform_attn(*a, **case.variant), arguments), direct, 1e-9)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_autocast_takes_locations_and_weights_in_float32(device, dtype):
    case = FORMS[0]
    value, shapes, starts, locations, weights, _ = tensors_of(case, device, dtype, torch.float32)
    with torch.autocast(device, dtype):
        output = ms_deform_attn(value, shapes, starts, locations, weights.to(dtype), **case.variant)
    exact = ms_deform_attn(
        value.double(), shapes, starts, locations.double(), weights.to(dtype).double(), **case.variant
    )
    assert output.dtype is dtype
    error = (output.double() - exact).norm() / exact.norm()
    assert error <= TOLERANCE[str(dtype).removeprefix("torch.")]


@pytest.mark.parametrize("padding_mode", ["zeros", "border"])
@pytest.mark.parametrize("align_corners", [True, False])
def test_one_level_is_grid_sample(padding_mode, align_corners):
    case = Case("square", levels=((5, 6),), N=2, M=1, D=4, P=1, queries=40)
    value, shapes, starts, locations, weights, grad_output = tensors_of(case, dtype=torch.float64)
    weights = torch.ones_like(weights)
    options = {"padding_mode": padding_mode, "align_corners": align_corners}

    def ours(value, locations):
        return ms_deform_attn(value, shapes, starts, locations, weights, **options)

    def torchs(value, locations):
        image = value.transpose(1, 3).reshape(2, 4, 5, 6)
        return F.grid_sample(image, 2 * locations.reshape(2, 40, 1, 2) - 1, **options)[..., 0].transpose(1, 2)

    for have, want in zip(*(torch.autograd.grad(f(value, locations), (value, locations), grad_output)
                            for f in (ours, torchs)), strict=True):  # fmt: skip
        torch.testing.assert_close(have, want)
    torch.testing.assert_close(ours(value, locations), torchs(value, locations))


def test_equal_points_are_the_plain_operator():
    value, shapes, starts, locations, weights, _ = tensors_of(Case("plain"))
    flat = ms_deform_attn(value, shapes, starts, locations.flatten(3, 4), weights.flatten(3), num_points=[2, 2])
    assert torch.equal(flat, ms_deform_attn(value, shapes, starts, locations, weights))


def test_nearest_refuses_a_gradient_of_locations():
    value, shapes, starts, locations, weights, _ = tensors_of(Case("plain"))
    with pytest.raises(ValueError, match=r"sampling_locations: .*nearest.*detach"):
        ms_deform_attn(value, shapes, starts, locations, weights, interpolation="nearest")
    with torch.no_grad():
        ms_deform_attn(value, shapes, starts, locations, weights, interpolation="nearest")


@pytest.mark.parametrize("variant", [{"padding_mode": "border"}, {"interpolation": "nearest"}], ids=str)
def test_derivative_at_the_last_pixel_of_a_level_wider_than_float32_counts(variant):
    W = 2**24 + 4
    assert torch.tensor(W - 1).float() == W
    value = torch.zeros(1, W, 1, 1)
    value[0, -1] = 3
    locations, weights = torch.full((1, 1, 1, 1, 1, 2), 2.0), torch.ones(1, 1, 1, 1, 1)

    def output(weights):
        return ms_deform_attn(value, [(1, W)], None, locations, weights, **variant)

    assert torch.func.jvp(output, (weights,), (weights,))[1] == 3
