"""Forward mode with what has no elements to read: query lengths that vmap maps over, and fake tensors."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import grad, hessian, jvp, vmap
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._pytree import tree_leaves

from cupy_msda.call import FUSED_NAMES, Arguments
from cupy_msda.torch import ms_deform_attn, ms_deform_attn_fused
from cupy_msda.torch.reference import differentiable_attention
from tests.helpers.thinning import every_other

SIZES = [[2, 3], [1, 2]]
N, S, M, D, L, P, Q = 2, 8, 1, 2, 2, 1, 2
# Every sample of vmap, [samples, N].
LENGTHS = torch.tensor([[0, 1], [2, 2], [1, 2]])


def drawn(*shape, seed):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


VALUE, LOCATIONS = drawn(N, S, M, D, seed=1), drawn(N, Q, M, L, P, 2, seed=2)
WEIGHTS, BOXES = drawn(N, Q, M, L, P, seed=3), drawn(N, Q, 1, 4, seed=4)


def plain(value, lengths):
    return ms_deform_attn(value, SIZES, None, LOCATIONS, WEIGHTS, query_lengths=lengths)


def plain_composition(value, lengths):
    return differentiable_attention(Arguments(value, SIZES, None, None, LOCATIONS, WEIGHTS, query_lengths=lengths))


def fused(value, lengths):
    return ms_deform_attn_fused(value, SIZES, None, BOXES, LOCATIONS, WEIGHTS, query_lengths=lengths)


def fused_composition(value, lengths):
    return differentiable_attention(
        Arguments(value, SIZES, None, BOXES, LOCATIONS, WEIGHTS, query_lengths=lengths, names=FUSED_NAMES)
    )


FORMS = {"plain": (plain, plain_composition), "fused": (fused, fused_composition)}


def squared(function):
    return lambda *given: function(*given).square().sum()


def jvp_of_value(function):
    return lambda value, *others: jvp(lambda v: function(v, *others), (value,), (value.sin(),))


def mapped_twice(function, value, lengths):
    stack = torch.stack((lengths, lengths.flip(0)), 1)  # [inner samples, outer samples, N]
    return vmap(lambda rows: vmap(lambda q: jvp_of_value(function)(value, q))(rows), 1)(stack)


NESTS = {
    "vmap of jvp": lambda f, v, q: vmap(lambda q: jvp_of_value(f)(v, q))(q),
    "vmap of jvp, last dimension": lambda f, v, q: vmap(lambda q: jvp_of_value(f)(v, q), 1)(q.T),
    "vmap of vmap of jvp": mapped_twice,
    "jvp of vmap": lambda f, v, q: jvp_of_value(lambda v, q: vmap(lambda one: f(v, one))(q))(v, q),
    "vmap of hessian": lambda f, v, q: vmap(lambda q: hessian(lambda v: squared(f)(v, q))(v))(q),
    "jvp of vmap of grad": lambda f, v, q: jvp_of_value(vmap(grad(squared(f)), (None, 0)))(v, q),
}


def assert_equal_leaves(have, want):
    for one, other in zip(tree_leaves(have), tree_leaves(want), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", NESTS)
def test_mapped_query_lengths_do_what_they_do_to_the_composition(name, form):
    have, want = (NESTS[name](function, VALUE, LENGTHS) for function in FORMS[form])
    assert_equal_leaves(have, want)


@pytest.mark.parametrize("name", NESTS)
@pytest.mark.parametrize("wrong", [-1, Q + 1])
def test_a_wrong_length_of_any_sample_is_refused(name, wrong):
    lengths = LENGTHS.clone()
    lengths[1, 1] = wrong
    with pytest.raises(ValueError, match=f"query_lengths: expected 0 to Q = {Q}, got {wrong} for image 1"):
        NESTS[name](plain, VALUE, lengths)


def test_lengths_that_vmap_has_no_sample_of():
    assert vmap(lambda q: jvp_of_value(plain)(VALUE, q)[1])(LENGTHS[:0]).shape == (0, N, Q, M * D)


def test_metadata_may_be_arguments_of_grad():
    """They are wrapped, though grad does not differentiate them."""

    def loss(value, shapes, starts, lengths):
        return ms_deform_attn(value, shapes, starts, LOCATIONS, WEIGHTS, query_lengths=lengths).square().sum()

    have = jvp_of_value(grad(loss))(VALUE, torch.tensor(SIZES), torch.tensor([0, 6]), LENGTHS[0])
    assert_equal_leaves(have, jvp_of_value(grad(squared(plain_composition)))(VALUE, LENGTHS[0]))


MODES = {
    "jvp": jvp_of_value,
    "jvp of grad": lambda f: jvp_of_value(grad(squared(f))),
    "hessian": lambda f: hessian(squared(f)),
}


def of_inputs(value, locations, weights, *lengths):
    return ms_deform_attn(value, SIZES, [0, 6], locations, weights, query_lengths=lengths[0] if lengths else None)


@pytest.mark.parametrize("tracing_mode", ["fake", "symbolic"])
@pytest.mark.parametrize("name", MODES)
def test_a_trace_by_fake_tensors_gives_the_same_numbers(name, tracing_mode):
    function, inputs = MODES[name](of_inputs), (VALUE, LOCATIONS, WEIGHTS, LENGTHS[0])
    trace = make_fx(function, tracing_mode=tracing_mode)(*inputs)
    assert_equal_leaves(trace(*inputs), function(*inputs))


@pytest.mark.parametrize("name", MODES)
def test_fake_tensors_get_the_shapes_of_the_result(name):
    def function(value, locations, weights, shapes, lengths):
        return ms_deform_attn(value, shapes, None, locations, weights, query_lengths=lengths)

    inputs = VALUE, LOCATIONS, WEIGHTS, torch.tensor(SIZES), LENGTHS[0]
    mode = FakeTensorMode()
    fakes = [mode.from_tensor(tensor) for tensor in inputs]
    with mode:
        have = tree_leaves(MODES[name](function)(*fakes))
    want = tree_leaves(MODES[name](function)(*inputs))
    assert [(one.shape, one.dtype) for one in have] == [(one.shape, one.dtype) for one in want]


@pytest.mark.parametrize("transform", [
    lambda f: make_fx(f, tracing_mode="fake"), lambda f: torch.compile(f, backend="aot_eager"),
], ids=["make_fx", "compiled"])  # fmt: skip
def test_shapes_that_do_not_agree_are_refused_without_elements(transform):
    with pytest.raises(RuntimeError, match="attention_weights: expected shape"):
        transform(jvp_of_value(of_inputs))(VALUE, LOCATIONS, WEIGHTS.transpose(3, 4))


WRONG_METADATA = {
    "too many rows": ([[2, 3], [2, 2]], [0, 6], [2, 2]),
    "no rows": ([[0, 3], [1, 2]], [0, 6], [2, 2]),
    "the last start": (SIZES, [0, 2**63 - 1], [2, 2]),
    "a negative length": (SIZES, [0, 6], [2, -5]),
    "more queries than there are": (SIZES, [0, 6], [2, Q + 1]),
}
SECOND = {
    "jvp": lambda f: lambda v, *others: jvp(lambda v: f(v, *others), (v,), (v.sin(),))[1],
    "jvp of grad": lambda f: lambda v, *others: jvp(grad(lambda v: squared(f)(v, *others)), (v,), (v.sin(),))[1],
    "grad of jvp": lambda f: grad(lambda v, *o: jvp(lambda v: squared(f)(v, *o), (v,), (v.sin(),))[1]),
}


@pytest.mark.parametrize("name", every_other(SECOND))
def test_compiled_derivatives_of_wrong_metadata_are_nan(name):
    """Compiled code drops an output that nothing uses, and what checks with it."""

    def function(value, shapes, starts, lengths):
        return ms_deform_attn(value, shapes, starts, LOCATIONS, WEIGHTS, query_lengths=lengths)

    derivative = torch.compile(SECOND[name](function), backend="aot_eager", fullgraph=True)
    for kind, metadata in WRONG_METADATA.items():
        tensors = [torch.tensor(part) for part in metadata]
        with pytest.raises(ValueError, match="expected"):
            SECOND[name](function)(VALUE, *tensors)
        try:
            found = derivative(VALUE, *tensors)
        except ValueError:  # the output is used
            assert name != "jvp", kind
        else:
            assert found.isnan().all(), kind
    assert derivative(VALUE, torch.tensor(SIZES), torch.tensor([0, 6]), torch.tensor([1, 2])).isfinite().all()
