"""torch's own functions in place of NumPy on the CPU: when they are taken, and the contract's rules there.

`composition` of tests/fuzz draws calls on this path.
"""

import weakref

import numpy as np
import pytest
import torch

import cupy_msda
from cupy_msda.call import Wanted
from cupy_msda.torch import composition, cpu_path, ms_deform_attn
from tests.helpers.calls import call_of
from tests.helpers.cases import Case

LEVELS = ((8, 8), (4, 4))
SMALL = Case("small", levels=LEVELS, N=3, M=4, D=16, P=4, queries=40)


@pytest.fixture(autouse=True)
def _numpy_tier(monkeypatch):
    monkeypatch.setenv("CUPY_MSDA_CPU", "numpy")
    monkeypatch.setattr(cpu_path, "problems", {})


@pytest.fixture
def recorded(monkeypatch):
    """The compositions that were computed."""
    found, record = [], composition.record

    def remember(*arguments):
        found.append(record(*arguments))
        return found[-1]

    monkeypatch.setattr(composition, "record", remember)
    return found


def leaves_of(case=SMALL, seed=0):
    inputs = case.inputs(seed=seed)
    return [torch.from_numpy(array).requires_grad_() for array in (inputs.value, inputs.locations, inputs.weights)]


def bits(*tensors):
    return [tensor.detach().numpy().tobytes() for tensor in tensors]


def test_a_small_call_takes_it_and_few_samples_of_much_value_do_not(recorded):
    value, locations, weights = leaves_of()
    with torch.no_grad():
        ms_deform_attn(value, LEVELS, None, locations, weights)
    assert len(recorded) == 1
    few = Case("few", levels=((60, 80),), N=4, M=8, D=32, queries=1)
    assert not composition.forward_costs(call_of(*few.inputs()[:6]).problem).composition_is_faster


@pytest.mark.parametrize("size", [(5, 5), (10, 10), (25, 42)], ids=str)
@pytest.mark.parametrize("shift", [0, -0.5], ids=["centres", "edges"])
def test_gradients_at_kinks_are_the_contract_s(size, shift):
    """grid_sample rounds a coordinate on a pixel to another cell than floor() of the exact one."""
    (H, W), generator = size, torch.Generator().manual_seed(0)
    value = torch.randn(1, H * W, 2, 8, generator=generator)
    columns, rows = (torch.arange(W) + 0.5 + shift) / W, (torch.arange(H) + 0.5 + shift) / H
    points = torch.cartesian_prod(columns, rows)[:, None, None, None].expand(-1, 2, 1, 1, 2).contiguous()
    locations = points[None].requires_grad_()
    weights, grad = torch.ones(1, H * W, 2, 1, 1), torch.randn(1, H * W, 16, generator=generator)
    found = torch.autograd.grad(ms_deform_attn(value, [size], None, locations, weights), locations, grad)[0]
    arrays = (value.numpy(), [size], None, locations.detach().numpy(), weights.numpy())
    want = cupy_msda.ms_deform_attn_backward(*arrays, grad.numpy(), 64)[1]
    np.testing.assert_allclose(found.numpy(), want, rtol=1e-4, atol=1e-4 * np.abs(want).max())


def test_the_compiled_tier_is_never_replaced(recorded, monkeypatch):
    pytest.importorskip("numba")
    monkeypatch.setenv("CUPY_MSDA_CPU", "numba")
    value, locations, weights = leaves_of()
    ms_deform_attn(value, LEVELS, None, locations, weights)
    assert not recorded


@pytest.mark.parametrize(("size", "runs"), [(167, True), (168, True), (169, False)])
def test_levels_whose_float32_coordinates_are_exact_enough(size, runs):
    problem = call_of(*Case("wide", levels=((2, size),), N=1, queries=1).inputs()[:6]).problem
    assert composition.can_run(problem) is runs


@pytest.mark.parametrize(("queries", "runs"), [((1 << 24) // 128, True), ((1 << 24) // 128 + 1, False)])
def test_what_is_sampled_is_bounded(queries, runs):
    problem = call_of(*Case("many", levels=((2, 2),), N=1, M=8, D=8, P=2, queries=queries).inputs()[:6]).problem
    assert composition.can_run(problem) is runs


def test_images_at_a_time_give_the_same_numbers(monkeypatch):
    leaves = leaves_of()
    whole = ms_deform_attn(leaves[0], LEVELS, None, *leaves[1:])
    grads = torch.autograd.grad(whole.sum(), leaves)
    monkeypatch.setattr(composition, "_CACHED_ELEMENTS", 1)
    parts = ms_deform_attn(leaves[0], LEVELS, None, *leaves[1:])
    for have, want in zip((parts, *torch.autograd.grad(parts.sum(), leaves)), (whole, *grads), strict=True):
        torch.testing.assert_close(have, want, rtol=1e-6, atol=1e-6)


def test_bits_do_not_depend_on_the_number_of_threads():
    before, found = torch.get_num_threads(), []
    leaves = leaves_of(Case("threads", levels=((16, 16), (8, 8)), N=5, M=4, D=16, P=4, queries=90))
    levels = ((16, 16), (8, 8))
    try:
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            output = ms_deform_attn(leaves[0], levels, None, *leaves[1:])
            found.append(bits(output, *torch.autograd.grad(output, leaves, torch.ones_like(output))))
    finally:
        torch.set_num_threads(before)
    assert all(one == found[0] for one in found)


def test_another_backward_has_the_same_bits_and_the_last_one_frees(recorded):
    leaves = leaves_of()
    output = ms_deform_attn(leaves[0], LEVELS, None, *leaves[1:])
    first = bits(*torch.autograd.grad(output.sum(), leaves, retain_graph=True))
    assert bits(*torch.autograd.grad(output.sum(), leaves)) == first
    assert len(recorded) == 1
    kept = weakref.ref(recorded.pop().output)
    assert kept() is None
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(output.sum(), leaves)


def test_metadata_and_inputs_that_change_before_the_backward_raise():
    value, locations, weights = leaves_of()
    shapes = torch.tensor(LEVELS)
    for changed in (shapes, weights):
        output = ms_deform_attn(value, shapes, None, locations, weights)
        with torch.no_grad():
            changed += 1
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            output.sum().backward()
        with torch.no_grad():
            changed -= 1


@pytest.mark.parametrize("name", ["value", "locations", "weights", "grad_output"])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_numbers_that_are_not_finite_give_the_bits_of_numpy(name, bad):
    inputs = SMALL.inputs(seed=4)
    getattr(inputs, name).reshape(-1)[7] = bad
    leaves = [torch.from_numpy(array).requires_grad_() for array in (inputs.value, inputs.locations, inputs.weights)]
    output = ms_deform_attn(leaves[0], LEVELS, None, *leaves[1:])
    grads = torch.autograd.grad(output, leaves, torch.from_numpy(inputs.grad_output))
    want = cupy_msda.ms_deform_attn_backward(*inputs, 64)
    for have, right in zip(grads, want, strict=True):
        np.testing.assert_array_equal(have.numpy(), right)


def test_a_sample_one_pixel_outside_has_no_gradient():
    value, weights = torch.ones(1, 8, 1, 1), torch.ones(1, 1, 1, 1, 1, 1)[..., 0]
    locations = torch.tensor([-0.0625, 0.5]).view(1, 1, 1, 1, 1, 2).requires_grad_()
    (grad,) = torch.autograd.grad(ms_deform_attn(value, [(1, 8)], None, locations, weights), locations)
    assert grad.eq(0).all()


@pytest.mark.parametrize("wanted", [Wanted(), Wanted(True, False, False), Wanted(False, True, False)], ids=str)
def test_costs_grow_with_the_samples(wanted):
    problems = [call_of(*Case("", N=2, queries=queries).inputs()[:6]).problem for queries in (1, 10, 100)]
    for costs in (
        [composition.training_costs(p, wanted) for p in problems],
        [*map(composition.forward_costs, problems)],
    ):
        assert [cost.composition for cost in costs] == sorted(cost.composition for cost in costs)
        assert [cost.numpy for cost in costs] == sorted(cost.numpy for cost in costs)
