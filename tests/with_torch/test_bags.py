"""Sampling by `embedding_bag` on the CPU: what its tables, bags and sparse matrices must keep to.

`test_composition.py` has the rules that it shares with `grid_sample`, and `bags` of tests/fuzz draws calls.
"""

import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch

import cupy_msda
from cupy_msda.torch import bags, composition, cpu_path, ms_deform_attn
from tests.helpers.calls import call_of
from tests.helpers.cases import Case

LEVELS = ((8, 8), (4, 4))
SMALL = Case("small", levels=LEVELS, N=3, M=4, D=16, P=4, queries=40)


@pytest.fixture(autouse=True)
def _bags_wherever_they_can_run(monkeypatch):
    monkeypatch.setenv("CUPY_MSDA_CPU", "numpy")
    monkeypatch.setattr(cpu_path, "problems", {})
    monkeypatch.setattr(cpu_path, "cheapest", lambda problem, wanted, ways: "bags" if "bags" in ways else None)


@pytest.fixture
def recorded(monkeypatch):
    """The outputs that were computed."""
    found, attention = [], bags.attention

    def remember(*arguments):
        found.append(attention(*arguments))
        return found[-1]

    monkeypatch.setattr(bags, "attention", remember)
    return found


def leaves_of(case):
    inputs = case.inputs()
    return [torch.from_numpy(array).requires_grad_() for array in (inputs.value, inputs.locations, inputs.weights)]


@pytest.mark.parametrize(("queries", "training"), [(1 << 18, True), ((1 << 18) + 1, False)])
def test_what_is_kept_is_bounded(queries, training):
    problem = replace(call_of(*Case("many", levels=((2, 2),), N=1, M=8, P=2).inputs()[:6]).problem, Q=queries)
    assert bags.can_run(problem, kept=False)
    assert bags.can_run(problem, kept=True) is training


def test_rows_of_the_table_are_int32():
    problem = call_of(*SMALL.inputs()[:6]).problem
    images = (1 << 31) // (problem.S * problem.M)
    assert "bags" in composition.ways(replace(problem, N=images), None)
    assert "bags" not in composition.ways(replace(problem, N=images + 1), None)


@pytest.mark.parametrize("samples", [1, 100, 2000])
def test_parts_of_a_call_give_the_same_numbers(samples, monkeypatch):
    leaves = leaves_of(SMALL)
    whole = ms_deform_attn(leaves[0], LEVELS, None, *leaves[1:])
    grads = torch.autograd.grad(whole.sum(), leaves)
    monkeypatch.setattr(bags, "_CACHED_SAMPLES", samples)
    parts = ms_deform_attn(leaves[0], LEVELS, None, *leaves[1:])
    for have, want in zip((parts, *torch.autograd.grad(parts.sum(), leaves)), (whole, *grads), strict=True):
        torch.testing.assert_close(have, want, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("S", [1, 4, 15, 16, 17])
def test_a_sparse_matrix_never_has_more_entries_than_places(S, monkeypatch):
    """torch would write past the end of its values. A query reads 16 pixels."""
    seen, construct = [], torch.sparse_csr_tensor

    def remember(ends, indices, values, size, **settings):
        seen.append(len(values) <= size[0] * size[1])
        return construct(ends, indices, values, size, **settings)

    monkeypatch.setattr(torch, "sparse_csr_tensor", remember)
    leaves = leaves_of(Case("tiny", levels=((1, S),), N=1, M=1, D=4, P=4, queries=3))
    output = ms_deform_attn(leaves[0], [(1, S)], None, *leaves[1:])
    found = torch.autograd.grad(output.sum(), leaves)
    assert seen == ([True] if S >= 16 else [])
    arrays = [leaf.detach().numpy() for leaf in leaves]
    want = cupy_msda.ms_deform_attn_backward(arrays[0], [(1, S)], None, *arrays[1:], np.ones((1, 3, 4), "f4"), 64)
    for have, right in zip(found, want, strict=True):
        np.testing.assert_allclose(have.numpy(), right, rtol=1e-5, atol=1e-5 * np.abs(right).max())


# Thin levels, a gap before the second and pixels of the third that the fourth reads too; S = 60.
ODD_LEVELS, ODD_STARTS = ((1, 8), (5, 1), (4, 5), (3, 7), (1, 1)), (0, 10, 16, 30, 59)


@pytest.mark.parametrize("gradient", ["value", "locations", "weights"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("D", [1, 3, 16])
def test_thin_levels_and_levels_with_gaps(D, dtype, gradient, recorded):
    generator = torch.Generator().manual_seed(D)
    value = torch.randn(3, 60, 2, D, generator=generator)
    locations = torch.rand(3, 11, 2, len(ODD_LEVELS), 3, 2, generator=generator) * 2 - 0.5
    weights = torch.rand(locations.shape[:-1], generator=generator)
    grad = torch.randn(3, 11, 2 * D, generator=generator)
    tensors = dict(zip(("value", "locations", "weights"), (value, locations, weights), strict=True))
    tensors = {name: tensor.to(dtype) for name, tensor in tensors.items()}
    tensors[gradient].requires_grad_()
    output = ms_deform_attn(tensors["value"], ODD_LEVELS, ODD_STARTS, tensors["locations"], tensors["weights"])
    (found,) = torch.autograd.grad(output, tensors[gradient], grad.to(dtype))
    assert len(recorded) == 1
    assert recorded[0] is not None
    wide = [tensor.detach().double().numpy() for tensor in (*tensors.values(), grad.to(dtype))]
    want = dict(
        zip(tensors, cupy_msda.ms_deform_attn_backward(wide[0], ODD_LEVELS, ODD_STARTS, *wide[1:], 64), strict=True)
    )[gradient]
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}[dtype]
    np.testing.assert_allclose(found.double().numpy(), want, rtol=tolerance, atol=tolerance * np.abs(want).max())
    forward = cupy_msda.ms_deform_attn_forward(wide[0], ODD_LEVELS, ODD_STARTS, *wide[1:3], 64)
    np.testing.assert_allclose(
        output.detach().double().numpy(), forward, rtol=tolerance, atol=tolerance * np.abs(forward).max()
    )


def test_coordinates_are_exact_in_wide_levels():
    """In float32, x * W - 0.5 would lose twelve bits of the fraction."""
    W, generator = 5000, torch.Generator().manual_seed(0)
    value, locations = torch.randn(1, W, 1, 4, generator=generator), torch.rand(1, 200, 1, 1, 1, 2, generator=generator)
    weights = torch.ones(1, 200, 1, 1, 1)
    found = ms_deform_attn(value, [(1, W)], None, locations, weights)
    want = cupy_msda.ms_deform_attn_forward(
        value.double().numpy(), [(1, W)], None, locations.double().numpy(), weights.double().numpy(), 64
    )
    np.testing.assert_allclose(found.numpy(), want, rtol=2e-6, atol=2e-6)


def test_sparse_tensors_warn_of_nothing():
    script = (
        "import torch, cupy_msda.torch as c; c.cpu_path.cheapest = lambda *call: 'bags';"
        "v = torch.ones(1, 4, 1, 2, requires_grad=True);"
        "x = torch.full((1, 1, 1, 1, 1, 2), 0.5); w = torch.ones(1, 1, 1, 1, 1, requires_grad=True);"
        "c.ms_deform_attn(v, [(2, 2)], None, x, w).sum().backward(); print(w.grad)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert "parse" not in done.stderr
    assert "2." in done.stdout
