"""The torch operator: gradients, the drop-in function, and grid_sample as a second implementation of both."""

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

import cupy_msda
from cupy_msda.cpu import run as cpu
from cupy_msda.torch import MSDeformAttnFunction, cpu_path, ms_deform_attn
from cupy_msda.torch.exportable import grid_sample_attention
from tests.helpers import cases
from tests.helpers.cases import CASES, Case
from tests.helpers.tolerance import assert_close, relative_error
from tests.helpers.torch_calls import DEVICES

pytestmark = pytest.mark.sanitizer


def tensors(inputs, device, requires_grad=True):
    value, locations, weights = (torch.from_numpy(inputs[i].copy()).to(device) for i in (0, 3, 4))
    leaves = [t.requires_grad_(requires_grad) for t in (value, locations, weights)]
    return leaves, torch.from_numpy(inputs.shapes).to(device), torch.from_numpy(inputs.grad_output).to(device)


@pytest.mark.parametrize("case", CASES[:4], ids=str)
def test_agrees_with_grid_sample_in_float64(case):
    """An implementation that this project did not write, against the NumPy path and the reference."""
    inputs = case.inputs("float64", seed=11)
    if inputs.starts is not None:
        pytest.skip("grid_sample_attention is called without starts here")
    leaves, _, grad_output = tensors(inputs, "cpu")
    output = grid_sample_attention(leaves[0], [tuple(s) for s in inputs.shapes.tolist()], *leaves[1:])
    grads = [g.numpy() for g in torch.autograd.grad(output, leaves, grad_output)]
    want_output, want_grads = cases.expected(inputs)
    assert_close(want_output, output.detach().numpy(), "float64")
    for want, grad in zip(want_grads, grads, strict=True):
        assert_close(want, grad, "float64")
    assert_close(cupy_msda.ms_deform_attn(*inputs[:5]), output.detach().numpy(), "float64")


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("D", [4, 5])
def test_gradients_agree_with_finite_differences(device, D):
    inputs = Case("gradcheck", levels=((3, 4), (2, 2)), N=1, D=D, queries=3).inputs("float64", seed=12)
    leaves, shapes, _ = tensors(inputs, device)
    # Sums by atomics differ in the last bit from call to call.
    nondet_tol = 1e-12 if device == "cuda" else 0.0
    assert torch.autograd.gradcheck(
        lambda v, loc, w: ms_deform_attn(v, shapes, None, loc, w), leaves, nondet_tol=nondet_tol
    )


@pytest.mark.parametrize("device", DEVICES)
def test_the_autograd_function_has_the_convention_of_deformable_detr(device):
    inputs = Case("starts", starts=(4, 50), S=64).inputs(seed=13)
    leaves, shapes, grad_output = tensors(inputs, device)
    starts = torch.from_numpy(inputs.starts).to(device)
    output = MSDeformAttnFunction.apply(leaves[0], shapes, starts, leaves[1], leaves[2], 2)
    output.backward(grad_output)
    want_output, want_grads = cases.expected(inputs)
    assert_close(output.detach().cpu().numpy(), want_output, "float32")
    for leaf, want in zip(leaves, want_grads, strict=True):
        assert leaf.grad.dtype == leaf.dtype
        assert_close(leaf.grad.cpu().numpy(), want, "float32")


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (0, 1), (1, 2), (0, 2)], ids=str)
def test_only_the_gradients_that_are_asked_for_are_computed(device, wanted):
    inputs = CASES[0].inputs(seed=14)
    leaves, shapes, grad_output = tensors(inputs, device, requires_grad=False)
    for index in wanted:
        leaves[index].requires_grad_()
    ms_deform_attn(leaves[0], shapes, None, *leaves[1:]).backward(grad_output)
    _, want = cases.expected(inputs)
    for index, leaf in enumerate(leaves):
        if index in wanted:
            assert_close(leaf.grad.cpu().numpy(), want[index], "float32")
        else:
            assert leaf.grad is None


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_each_gradient_has_the_dtype_of_its_input(device, dtype):
    inputs = CASES[0].inputs(seed=15)
    leaves, shapes, grad_output = tensors(inputs, device, requires_grad=False)
    value = leaves[0].to(dtype).requires_grad_()
    locations = leaves[1].requires_grad_()
    output = ms_deform_attn(value, shapes, None, locations, leaves[2])
    output.backward(grad_output.to(dtype))
    assert (output.dtype, value.grad.dtype, locations.grad.dtype) == (dtype, dtype, torch.float32)


def test_cpu_tensors_are_not_copied(monkeypatch):
    monkeypatch.setattr(cpu_path, "chosen_way", lambda *_: None)
    seen = []
    forward = cpu.run_forward

    def recording_forward(inputs):
        seen.extend((inputs.value, inputs.locations, inputs.weights))
        return forward(inputs)

    monkeypatch.setattr(cpu, "run_forward", recording_forward)
    leaves, shapes, _ = tensors(CASES[0].inputs(), "cpu")
    ms_deform_attn(leaves[0], shapes, None, *leaves[1:])
    assert [array.ctypes.data for array in seen] == [leaf.data_ptr() for leaf in leaves]


@pytest.mark.parametrize("device", DEVICES)
def test_a_grad_output_without_strides_is_read_right(device):
    """`output.sum().backward()` hands in a gradient without strides."""
    leaves, shapes, _ = tensors(CASES[0].inputs(seed=16), device)
    ms_deform_attn(leaves[0], shapes, None, *leaves[1:]).sum().backward()
    ones = np.ones((2, 5, 16), np.float32)
    _, want = cases.expected(CASES[0].inputs(seed=16)._replace(grad_output=ones))
    assert_close(leaves[0].grad.cpu().numpy(), want[0], "float32")


def test_array_function_refuses_to_drop_a_gradient():
    leaves, shapes, _ = tensors(CASES[0].inputs(), "cpu")
    with pytest.raises(TypeError, match=r"value: .*cupy_msda\.torch\.ms_deform_attn"):
        cupy_msda.ms_deform_attn(leaves[0], shapes, None, *leaves[1:])
    with torch.no_grad():
        assert cupy_msda.ms_deform_attn(leaves[0], shapes, None, *leaves[1:]).shape == (2, 5, 16)


def test_an_array_that_is_no_tensor_is_refused_by_name():
    inputs = CASES[0].inputs()
    with pytest.raises(TypeError, match=r"value: expected a torch\.Tensor, got ndarray"):
        ms_deform_attn(*inputs[:5])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("starts", [None, (1, 15)], ids=["contiguous", "starts"])
def test_second_derivatives_agree_with_finite_differences(device, starts):
    inputs = Case("gradgrad", levels=((3, 4), (2, 2)), N=1, D=3, queries=2, starts=starts, S=20).inputs(
        "float64", seed=18
    )
    leaves, shapes, _ = tensors(inputs, device)
    starts = None if starts is None else torch.tensor(starts, device=device)
    nondet_tol = 1e-12 if device == "cuda" else 0.0
    assert torch.autograd.gradgradcheck(
        lambda v, loc, w: ms_deform_attn(v, shapes, starts, loc, w), leaves, nondet_tol=nondet_tol
    )


@pytest.mark.gpu
def test_gradients_on_the_device_agree_with_the_cpu():
    inputs = Case("wide", levels=((20, 30), (10, 15)), M=4, D=32, P=4, queries=None).inputs(seed=17)
    results = []
    for device in ("cpu", "cuda"):
        leaves, shapes, grad_output = tensors(inputs, device)
        ms_deform_attn(leaves[0], shapes, None, *leaves[1:]).backward(grad_output)
        results.append([leaf.grad.cpu().numpy() for leaf in leaves])
    for cpu_grad, cuda_grad in zip(*results, strict=True):
        assert relative_error(cuda_grad, cpu_grad.astype(np.float64)) < 5e-6


def test_a_forked_child_computes_after_use_in_the_parent():
    """As in a DataLoader: the parent has used the CPU path, threads and all."""
    code = """
import os, torch
from cupy_msda.torch import ms_deform_attn
arguments = torch.rand(1, 6, 4, 4), [[2, 3]], None, torch.rand(1, 1, 4, 1, 2, 2), torch.rand(1, 1, 4, 1, 2)
want = ms_deform_attn(*arguments)
child = os.fork()
if child == 0:
    os._exit(0 if torch.equal(ms_deform_attn(*arguments), want) else 1)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120, cwd=Path(__file__).parent.parent.parent)


def test_threads_compute_at_the_same_time():
    inputs = [Case("threads", queries=5 + i).inputs(seed=i) for i in range(4)]
    arguments = [[torch.from_numpy(a) if a is not None else None for a in case[:5]] for case in inputs]
    with ThreadPoolExecutor(4) as pool:
        outputs = list(pool.map(lambda a: ms_deform_attn(*a), arguments * 5))
    for index, output in enumerate(outputs):
        assert torch.equal(output, ms_deform_attn(*arguments[index % 4]))
