"""torch's own functions in place of NumPy on the CPU: when they are taken, and the contract's rules there.

`bags` and `grid_sample` of tests/fuzz draw calls on these paths.
"""

import weakref

import numpy as np
import pytest
import torch

import cupy_msda
from cupy_msda.call import Wanted
from cupy_msda.torch import composition, cpu_path, kinks, ms_deform_attn
from cupy_msda.torch.composition_costs import cheapest
from tests.helpers.calls import call_of
from tests.helpers.cases import Case

LEVELS = ((8, 8), (4, 4))
SMALL = Case("small", levels=LEVELS, N=3, M=4, D=16, P=4, queries=40)


@pytest.fixture(autouse=True)
def _numpy_tier(monkeypatch):
    monkeypatch.setenv("CUPY_MSDA_CPU", "numpy")
    monkeypatch.setattr(cpu_path, "problems", {})


WAYS = ("bags", "grid_sample")


def take(way, monkeypatch):
    """Every call goes this way, or by NumPy where it cannot."""
    monkeypatch.setattr(cpu_path, "cheapest", lambda problem, wanted, ways: way if way in ways else None)


@pytest.fixture(params=WAYS)
def way(request, monkeypatch):
    take(request.param, monkeypatch)
    return request.param


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


PYRAMID = ((80, 80), (40, 40), (20, 20))
# Calls of which one way was clearly the fastest, forward and in training.
RECORDED = {
    "few queries": (Case("", levels=((8, 8),), N=1, M=8, D=32, P=4, queries=5), "weights"),
    "few samples of much value": (Case("", levels=PYRAMID, N=5, M=8, D=16, P=1, queries=2), "value"),
    "one head": (Case("", levels=((36, 36),), N=11, M=1, D=8, P=4, queries=6000), "weights"),
    "a decoder": (Case("", levels=PYRAMID, N=1, M=8, D=32, P=4, queries=300), "locations"),
}
FASTEST = {
    "few queries": ("grid_sample", "grid_sample"),
    "few samples of much value": ("bags", "bags"),
    "one head": ("grid_sample", "grid_sample"),
    "a decoder": ("bags", "bags"),
}


@pytest.mark.parametrize("name", RECORDED)
def test_what_was_faster_is_taken(name):
    case, gradient = RECORDED[name]
    problem = call_of(*case.inputs()[:6]).problem
    wanted = Wanted(*(one == gradient for one in Wanted._fields))
    found = tuple(cheapest(problem, asked, composition.ways(problem, asked)) for asked in (None, wanted))
    assert found == FASTEST[name]


ON_PIXELS = ((5, 5), (25, 42))


def on_pixels(share, form="plain", dtype=torch.float32):
    """A call of which this share of samples lies on pixels and on the edges of the levels, and its gradient."""
    generator = torch.Generator().manual_seed(0)
    N, Q, M, D, P = 2, 60, 2, 8, 3
    S = sum(h * w for h, w in ON_PIXELS)
    sizes = torch.tensor([[[w, h]] for h, w in ON_PIXELS])  # [L, 1, 2]
    shape = (N, Q, M, len(ON_PIXELS), P, 2)
    free = torch.rand(shape, generator=generator, dtype=dtype)
    pixels = (torch.rand(shape, generator=generator) * (sizes + 2)).floor() - 1
    exact = (pixels.to(dtype) + 0.5) / sizes.to(dtype)
    chosen = torch.rand(shape[:-1], generator=generator)[..., None] < share
    locations = torch.where(chosen, exact, free)
    value = torch.randn(N, S, M, D, generator=generator, dtype=dtype)
    weights, grad = (
        torch.rand(shape[:-1], generator=generator, dtype=dtype),
        torch.randn(N, Q, M * D, generator=generator),
    )
    if form == "plain":
        return [value, locations, weights], grad.to(dtype)
    references = torch.full((N, Q, len(ON_PIXELS), 2), 0.5, dtype=dtype)
    offsets = (locations - 0.5) * sizes
    return [value, references, offsets, weights], grad


@pytest.mark.parametrize("share", [0.0, 0.1, 0.9])
@pytest.mark.parametrize("form", ["plain", "fused"])
@pytest.mark.parametrize("wanted", ["all", "value and locations", "locations"])
def test_gradients_on_pixels_are_the_contract_s(share, form, wanted, way, recorded):
    """grid_sample rounds a coordinate on a pixel to another cell than floor() of the exact one."""
    tensors, grad = on_pixels(share, form)
    places = {
        "all": range(len(tensors)),
        "value and locations": (0, len(tensors) - 2),
        "locations": (len(tensors) - 2,),
    }[wanted]
    leaves = [tensors[place].requires_grad_() for place in places]
    call = ms_deform_attn if form == "plain" else cupy_msda.torch.ms_deform_attn_fused
    output = call(tensors[0], ON_PIXELS, None, *tensors[1:])
    found = torch.autograd.grad(output, leaves, grad, retain_graph=True)
    again = torch.autograd.grad(output, leaves, grad)
    assert (recorded[0] is None) == (way == "grid_sample" and share > 0.5)
    arrays = [tensor.detach().numpy() for tensor in tensors]
    backward = cupy_msda.ms_deform_attn_backward if form == "plain" else cupy_msda.ms_deform_attn_fused_backward
    want = backward(arrays[0], ON_PIXELS, None, *arrays[1:], grad.numpy(), 64)
    for place, one, other in zip(places, found, again, strict=True):
        assert torch.equal(one, other)
        np.testing.assert_allclose(one.numpy(), want[place], rtol=2e-4, atol=1e-4 * np.abs(want[place]).max())


def test_samples_that_grid_sample_moves_to_another_cell_are_near_a_pixel():
    sizes = torch.tensor([[[w, h]] for h, w in ON_PIXELS])
    exact = on_pixels(0.5)[0][1]
    locations = torch.cat([exact + shift * 2.0**-24 for shift in range(-3, 4)], dim=1)
    moved = (((2 * locations - 1) + 1) * sizes - 1) / 2
    differs = (moved.floor() != (locations.double() * sizes - 0.5).floor()).any(-1)
    near = composition.kinks.samples_near_a_pixel(locations, [(h, w, 0) for h, w in ON_PIXELS])
    found = torch.zeros_like(differs)
    found[tuple(near.unbind(1))] = True
    assert differs.any()
    assert not (differs & ~found).any()
    assert found.float().mean() < 0.7


def test_an_overflow_of_gradients_stays_with_its_sample(way, recorded):
    """In grid_sample's gradient a sample outside the level takes zero times infinity."""
    value = torch.rand(1, 16, 1, 2, dtype=torch.float64)
    locations = torch.tensor([[0.3, 0.3], [3.0, 0.3]], dtype=torch.float64).reshape(1, 2, 1, 1, 1, 2).requires_grad_()
    weights = torch.full((1, 2, 1, 1, 1), 1e200, dtype=torch.float64)
    output = ms_deform_attn(value, [(4, 4)], None, locations, weights)
    (found,) = torch.autograd.grad(output, locations, torch.full_like(output, 1e200))
    assert recorded[0] is not None
    assert found[0, 1].abs().max() == 0


def test_the_compiled_tier_is_never_replaced(recorded, monkeypatch):
    pytest.importorskip("numba")
    monkeypatch.setenv("CUPY_MSDA_CPU", "numba")
    value, locations, weights = leaves_of()
    ms_deform_attn(value, LEVELS, None, locations, weights)
    assert not recorded


@pytest.mark.parametrize(("size", "runs"), [(167, True), (168, True), (169, False)])
def test_levels_whose_float32_coordinates_are_exact_enough(size, runs):
    problem = call_of(*Case("wide", levels=((2, size),), N=1, queries=1).inputs()[:6]).problem
    assert ("grid_sample" in composition.ways(problem, None)) is runs


@pytest.mark.parametrize(("queries", "runs"), [((1 << 24) // 128, True), ((1 << 24) // 128 + 1, False)])
def test_what_grid_sample_samples_is_bounded(queries, runs):
    problem = call_of(*Case("many", levels=((2, 2),), N=1, M=8, D=8, P=2, queries=queries).inputs()[:6]).problem
    assert ("grid_sample" in composition.ways(problem, None)) is runs


def test_images_at_a_time_give_the_same_numbers(monkeypatch):
    take("grid_sample", monkeypatch)
    leaves = leaves_of()
    whole = ms_deform_attn(leaves[0], LEVELS, None, *leaves[1:])
    grads = torch.autograd.grad(whole.sum(), leaves)
    monkeypatch.setattr(composition, "_CACHED_ELEMENTS", 1)
    parts = ms_deform_attn(leaves[0], LEVELS, None, *leaves[1:])
    for have, want in zip((parts, *torch.autograd.grad(parts.sum(), leaves)), (whole, *grads), strict=True):
        torch.testing.assert_close(have, want, rtol=1e-6, atol=1e-6)


def test_bits_do_not_depend_on_the_number_of_threads(way):
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


def test_another_backward_has_the_same_bits_and_the_last_one_frees(way, recorded):
    leaves = leaves_of()
    output = ms_deform_attn(leaves[0], LEVELS, None, *leaves[1:])
    first = bits(*torch.autograd.grad(output.sum(), leaves, retain_graph=True))
    assert bits(*torch.autograd.grad(output.sum(), leaves)) == first
    assert len(recorded) == 1
    kept = weakref.ref(recorded.pop().output)
    assert kept() is None
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(output.sum(), leaves)


def test_metadata_and_inputs_that_change_before_the_backward_raise(way):
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
def test_numbers_that_are_not_finite_give_the_bits_of_numpy(name, bad, way):
    inputs = SMALL.inputs(seed=4)
    getattr(inputs, name).reshape(-1)[7] = bad
    leaves = [torch.from_numpy(array).requires_grad_() for array in (inputs.value, inputs.locations, inputs.weights)]
    output = ms_deform_attn(leaves[0], LEVELS, None, *leaves[1:])
    grads = torch.autograd.grad(output, leaves, torch.from_numpy(inputs.grad_output))
    want = cupy_msda.ms_deform_attn_backward(*inputs, 64)
    for have, right in zip(grads, want, strict=True):
        np.testing.assert_array_equal(have.numpy(), right)


def test_a_sample_one_pixel_outside_has_no_gradient(way):
    value, weights = torch.ones(1, 8, 1, 1), torch.ones(1, 1, 1, 1, 1, 1)[..., 0]
    locations = torch.tensor([-0.0625, 0.5]).view(1, 1, 1, 1, 1, 2).requires_grad_()
    (grad,) = torch.autograd.grad(ms_deform_attn(value, [(1, 8)], None, locations, weights), locations)
    assert grad.eq(0).all()


def test_samples_near_a_pixel_are_found_in_any_layout():
    locations = torch.rand(2, 3, 4, 2, 5, 2, generator=torch.Generator().manual_seed(0))
    locations[0, 1, 2, 0, 3] = 0.125  # a pixel of the first level
    levels = [(4, 4, 0), (7, 9, 16)]
    want = kinks.samples_near_a_pixel(locations, levels)
    strided = locations.transpose(-1, 0).contiguous().transpose(-1, 0)
    assert [0, 1, 2, 0, 3] in want.tolist()
    assert torch.equal(kinks.samples_near_a_pixel(strided, levels), want)
