"""Whatever a transformation of torch does to a composition of torch's own functions, it does to the operator.

Every transformation times every form of the operator, against the same transformation of the composition.
"""

import pytest
import torch
from torch.autograd import forward_ad, functional, gradcheck, gradgradcheck
from torch.func import (
    functional_call,
    functionalize,
    grad,
    hessian,
    jacfwd,
    jacrev,
    jvp,
    linearize,
    vjp,
    vmap,
)
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from cupy_msda.call import FUSED_NAMES, Arguments, Variant
from cupy_msda.torch import ms_deform_attn, ms_deform_attn_fused
from cupy_msda.torch.reference import differentiable_attention
from tests.helpers.torch_calls import DEVICES

SIZES = [[2, 3], [1, 2]]
N, S, M, D, L, P, Q = 2, 8, 1, 2, 2, 1, 2
LENGTHS = torch.tensor([1, 2])


def drawn(*shape, seed):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


PLAIN = (drawn(N, S, M, D, seed=1), drawn(N, Q, M, L, P, 2, seed=2) * 0.8 + 0.1, drawn(N, Q, M, L, P, seed=3))
SAMPLES = (drawn(N, Q, L, 2, seed=4), drawn(N, Q, M, L, P, 2, seed=5) - 0.5, drawn(N, Q, M, L, P, seed=6))
BOXES = (drawn(N, Q, 1, 4, seed=7) * 0.5 + 0.2, torch.cat((SAMPLES[1].flatten(3), SAMPLES[2].flatten(3)), -1))


def plain_forms(**options):
    lengths = options.pop("query_lengths", None)

    def operator(value, locations, weights):
        return ms_deform_attn(value, SIZES, None, locations, weights, query_lengths=lengths, **options)

    def composition(value, locations, weights):
        variant = Variant(**options)
        arguments = Arguments(value, SIZES, None, None, locations, weights, 64, variant, lengths)
        return differentiable_attention(arguments)

    return operator, composition


def fused(value, references, offsets, logits):
    return ms_deform_attn_fused(value, SIZES, None, references, offsets, logits)


def fused_composition(value, references, offsets, logits):
    return differentiable_attention(Arguments(value, SIZES, None, references, offsets, logits, 64, names=FUSED_NAMES))


def packed(value, references, offsets):
    return fused(value, references, offsets, None)


def packed_composition(value, references, offsets):
    return fused_composition(value, references, offsets, None)


# The operator, the composition and the tensors.
FORMS = {
    "plain": (*plain_forms(), PLAIN),
    "ragged": (*plain_forms(query_lengths=LENGTHS), PLAIN),
    "border": (*plain_forms(padding_mode="border", align_corners=True), PLAIN),
    "fused": (fused, fused_composition, (PLAIN[0], *SAMPLES)),
    "packed boxes": (packed, packed_composition, (PLAIN[0], *BOXES)),
}


def leaves(tensors):
    return tuple(tensor.clone().requires_grad_() for tensor in tensors)


def squared(function):
    return lambda *tensors: function(*tensors).square().sum()


def every(tensors):
    return tuple(range(len(tensors)))


def tangents(tensors, factor=3):
    return tuple(torch.sin(factor * tensor) for tensor in tensors)


def stacked(tensors, factors=(1, 0.9, 0.7)):
    return tuple(torch.stack([tensor * factor for factor in factors]) for tensor in tensors)


def nested_grads(function, tensors, order):
    tensors = leaves(tensors)
    loss = squared(function)(*tensors)
    for _ in range(order - 1):
        loss = sum(part.square().sum() for part in torch.autograd.grad(loss, tensors, create_graph=True))
    return torch.autograd.grad(loss, tensors)


def batched_grads(function, tensors):
    tensors = leaves(tensors)
    output = function(*tensors)
    rows = torch.eye(output.numel(), dtype=output.dtype, device=output.device).view(-1, *output.shape)
    return torch.autograd.grad(output, tensors, rows, is_grads_batched=True)


def dual_numbers(function, tensors, chosen):
    with forward_ad.dual_level():
        pairs = zip(tensors, tangents(tensors), chosen, strict=False)
        duals = [forward_ad.make_dual(one, tangent) if yes else one for one, tangent, yes in pairs]
        return forward_ad.unpack_dual(function(*duals)).tangent


def dual_over_reverse(function, tensors):
    with forward_ad.dual_level():
        duals = [forward_ad.make_dual(*pair) for pair in zip(leaves(tensors), tangents(tensors), strict=True)]
        return [forward_ad.unpack_dual(one).tangent for one in torch.autograd.grad(squared(function)(*duals), duals)]


def dual_grad_output(function, tensors):
    tensors = leaves(tensors)
    output = function(*tensors)
    with forward_ad.dual_level():
        seed = forward_ad.make_dual(torch.ones_like(output), torch.sin(output.detach()))
        return [forward_ad.unpack_dual(one).tangent for one in torch.autograd.grad(output, tensors, seed)]


def saved_on_cpu(function, tensors):
    tensors = leaves(tensors)
    with torch.autograd.graph.save_on_cpu():
        loss = squared(function)(*tensors)
    return torch.autograd.grad(loss, tensors)


def checkpointed(function, tensors, use_reentrant):
    tensors = leaves(tensors)
    squared(lambda *given: checkpoint(function, *given, use_reentrant=use_reentrant))(*tensors).backward()
    return [tensor.grad for tensor in tensors]


class Layer(torch.nn.Module):
    def __init__(self, function, value):
        super().__init__()
        self.function, self.value = function, torch.nn.Parameter(value)

    def forward(self, *others):
        return self.function(self.value, *others)


def of_parameters(function, tensors):
    layer = Layer(function, tensors[0])
    return grad(lambda given: functional_call(layer, given, tensors[1:]).square().sum())({"value": tensors[0]})


def inference(function, tensors):
    with torch.inference_mode():
        return function(*(tensor.clone() for tensor in tensors)).clone()


TRANSFORMATIONS = {
    "first order": lambda f, t: nested_grads(f, t, 1),
    "second order": lambda f, t: nested_grads(f, t, 2),
    "third order": lambda f, t: nested_grads(f, t, 3),
    "batched grads": batched_grads,
    "jacobian": functional.jacobian,
    "jacobian, vectorised": lambda f, t: functional.jacobian(f, t, vectorize=True),
    "jacobian, forward mode": lambda f, t: functional.jacobian(f, t, vectorize=True, strategy="forward-mode"),
    "hessian, vectorised": lambda f, t: functional.hessian(squared(f), t, vectorize=True),
    "grad": lambda f, t: grad(squared(f), every(t))(*t),
    "grad of grad": lambda f, t: grad(
        lambda *g: sum(x.square().sum() for x in grad(squared(f), every(t))(*g)), every(t)
    )(*t),
    "vjp": lambda f, t: (lambda output, pull_back: pull_back(output))(*vjp(f, *t)),
    "jacrev": lambda f, t: jacrev(f, every(t))(*t),
    "jacrev of jacrev": lambda f, t: jacrev(jacrev(squared(f), every(t)), every(t))(*t),
    "jvp": lambda f, t: jvp(f, t, tangents(t)),
    "jvp of value": lambda f, t: jvp(lambda v: f(v, *t[1:]), t[:1], tangents(t[:1])),
    "jvp of samples": lambda f, t: jvp(lambda *s: f(t[0], *s), t[1:], tangents(t[1:])),
    "jvp of jvp": lambda f, t: jvp(lambda *x: jvp(f, x, tangents(t))[1], t, tangents(t, 2)),
    "jacfwd": lambda f, t: jacfwd(f, every(t))(*t),
    "jacfwd of jacfwd": lambda f, t: jacfwd(jacfwd(squared(f), every(t)), every(t))(*t),
    "hessian": lambda f, t: hessian(squared(f), every(t))(*t),
    "jacrev of jacfwd": lambda f, t: jacrev(jacfwd(squared(f), every(t)), every(t))(*t),
    "jvp of vjp": lambda f, t: (lambda pull_back: jvp(pull_back, (f(*t),), (f(*t).sin(),)))(vjp(f, *t)[1]),
    "linearize": lambda f, t: linearize(f, *t)[1](*tangents(t)),
    "dual numbers": lambda f, t: dual_numbers(f, t, [True] * 4),
    "dual value": lambda f, t: dual_numbers(f, t, [True, False, False, False]),
    "dual samples": lambda f, t: dual_numbers(f, t, [False, True, False, True]),
    "dual over reverse": dual_over_reverse,
    "dual grad_output": dual_grad_output,
    "vmap": lambda f, t: vmap(f)(*stacked(t)),
    "vmap of value": lambda f, t: vmap(f, (0, *(None,) * (len(t) - 1)))(*stacked(t[:1]), *t[1:]),
    "vmap over other dimensions": lambda f, t: vmap(f, (1, 2, *(None,) * (len(t) - 2)), 1)(
        stacked(t)[0].movedim(0, 1), stacked(t)[1].movedim(0, 2), *t[2:]
    ),
    "vmap in chunks": lambda f, t: vmap(f, chunk_size=2)(*stacked(t)),
    "vmap of vmap": lambda f, t: vmap(vmap(f))(*(x.view(2, 2, *x.shape[1:]) for x in stacked(t, (1, 0.9, 0.8, 0.7)))),
    "vmap of grad": lambda f, t: vmap(grad(squared(f), every(t)))(*stacked(t)),
    "vmap of jvp": lambda f, t: vmap(lambda *x: jvp(f, x, tangents(x)))(*stacked(t)),
    "vmap of hessian": lambda f, t: vmap(hessian(squared(f), every(t)))(*stacked(t, (1, 0.9))),
    "grad of vmap": lambda f, t: grad(squared(vmap(f)), every(t))(*stacked(t)),
    "autograd of vmap": lambda f, t: nested_grads(vmap(f), stacked(t), 2),
    "functionalize": lambda f, t: functionalize(f)(*t),
    "make_fx": lambda f, t: make_fx(f)(*t)(*t),
    "make_fx of grad": lambda f, t: make_fx(grad(squared(f), every(t)))(*t)(*t),
    "functional_call": of_parameters,
    "checkpoint": lambda f, t: checkpointed(f, t, False),
    "checkpoint, reentrant": lambda f, t: checkpointed(f, t, True),
    "saved tensors elsewhere": saved_on_cpu,
    "inference mode": inference,
}
COMPILED = {
    "grad": lambda f, t: torch.compile(grad(squared(f), every(t)), backend="aot_eager", fullgraph=True)(*t),
    "jvp": lambda f, t: torch.compile(
        lambda *x: jvp(f, x, tangents(x)), backend="aot_eager", fullgraph=True
    )(*t),
    "vmap of grad": lambda f, t: torch.compile(
        vmap(grad(squared(f), every(t))), backend="aot_eager", fullgraph=True
    )(*stacked(t)),
}  # fmt: skip


def assert_equal_leaves(have, want):
    have, want = tree_leaves(have), tree_leaves(want)
    assert len(have) == len(want)
    for one, other in zip(have, want, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", TRANSFORMATIONS)
def test_a_transformation_does_what_it_does_to_the_composition(name, form, device):
    operator, composition, tensors = FORMS[form]
    tensors, transformation = tuple(tensor.to(device) for tensor in tensors), TRANSFORMATIONS[name]
    assert_equal_leaves(transformation(operator, tensors), transformation(composition, tensors))


@pytest.mark.parametrize(
    ("blamed", "changes"),
    [
        ("attention_weights", {"attention_weights": PLAIN[2].transpose(3, 4)}),
        ("value", {"value": PLAIN[0][:, :7]}),
        ("query_lengths", {"query_lengths": [9, -3]}),
        ("spatial_shapes", {"spatial_shapes": [[2, 3], [-1, 2]]}),
    ],
    ids=lambda part: part if isinstance(part, str) else "",
)
def test_forward_mode_refuses_what_other_calls_refuse(blamed, changes):
    arguments = {"value": PLAIN[0], "spatial_shapes": SIZES, "level_start_index": None} | changes
    arguments = arguments | {"sampling_locations": PLAIN[1], "attention_weights": PLAIN[2]} | changes

    def call(value):
        return ms_deform_attn(**(arguments | {"value": value}))

    value = arguments["value"]
    with pytest.raises(ValueError, match=blamed) as eager:
        call(value)
    with pytest.raises(ValueError, match=blamed) as forward_mode:
        jvp(call, (value,), (value,))
    assert str(forward_mode.value) == str(eager.value)


def test_an_empty_dimension_to_map_over():
    stack = torch.empty(0, *PLAIN[0].shape, dtype=torch.float64)
    assert vmap(lambda value: FORMS["plain"][0](value, *PLAIN[1:]))(stack).shape == (0, N, Q, M * D)


@pytest.mark.parametrize("form", ["plain", "packed boxes"])
@pytest.mark.parametrize("name", COMPILED)
def test_a_compiled_transformation_does_what_it_does_to_the_composition(name, form):
    operator, composition, tensors = FORMS[form]
    assert_equal_leaves(COMPILED[name](operator, tensors), TRANSFORMATIONS[name](composition, tensors))


@pytest.mark.parametrize("form", FORMS)
def test_derivatives_agree_with_finite_differences(form):
    operator, _, tensors = FORMS[form]
    modes = {"check_batched_grad": True, "check_forward_ad": True, "check_batched_forward_grad": True}
    assert gradcheck(operator, leaves(tensors), **modes)


@pytest.mark.parametrize("form", FORMS)
def test_second_derivatives_agree_with_finite_differences(form):
    operator, _, tensors = FORMS[form]
    assert gradgradcheck(operator, leaves(tensors), check_fwd_over_rev=True, fast_mode=True)


@pytest.mark.parametrize("form", ["plain", "ragged", "fused"])
def test_compiled_autograd_traces_the_backward(form):
    operator, composition, tensors = FORMS[form]
    given = leaves(tensors)
    loss = squared(operator)(*given)
    with torch._dynamo.compiled_autograd._enable(torch.compile(backend="aot_eager", fullgraph=True)):
        loss.backward()
    assert_equal_leaves([one.grad for one in given], nested_grads(composition, tensors, 1))


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_tangents_and_second_derivatives_have_the_dtypes_of_their_inputs(form, dtype, order):
    operator, composition, tensors = FORMS[form]
    tensors = [tensor.to(dtype) for tensor in tensors]
    if order == 1:
        have, want = jvp(operator, tuple(tensors), tangents(tensors)), None
        exact = [tensor.double() for tensor in tensors]
        want = jvp(composition, tuple(exact), tangents(exact))
    else:
        have = nested_grads(operator, tensors, 2)
        want = nested_grads(composition, [tensor.double() for tensor in tensors], 2)
    for one, other in zip(tree_leaves(have), tree_leaves(want), strict=True):
        assert one.dtype is dtype
        assert (one.double() - other).norm() <= 40 * torch.finfo(dtype).eps * other.norm()
