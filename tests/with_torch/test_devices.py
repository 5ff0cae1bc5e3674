"""Devices without kernels: the same numbers, gradients and errors by torch's own functions, with one note.

The CPU stands in for such a device where the rule does not count it among those with kernels. A device of its own
(tests/helpers/stand_in_device.py) shows that torch's dispatcher takes the same way.
"""

import json
import subprocess
import sys
import warnings

import pytest
import torch

import cupy_msda
from cupy_msda.torch import devices, fast_path, ms_deform_attn, ms_deform_attn_fused
from tests.helpers import cases, stand_in_device
from tests.helpers.backends import TorchBackend
from tests.helpers.cases import SMALL_CASES, VARIANTS, Case
from tests.helpers.checks import fused_inputs
from tests.helpers.tolerance import assert_close
from tests.helpers.torch_calls import (
    LEVELS,
    assert_same,
    attention_module,
    backward_operator,
    forward_operator,
    module_inputs,
    results,
    tensors,
    to_float32,
)

CPU = TorchBackend("cpu")


@pytest.fixture
def without_kernels(monkeypatch):
    """The CPU has no kernels; the NumPy path raises."""
    monkeypatch.setattr(devices, "_WITH_KERNELS", ())
    monkeypatch.setattr(devices, "_noted", {"cpu"})

    def unreachable(*_, **__):
        raise AssertionError("a kernel of this package was called")

    for name in ("forward", "backward"):
        monkeypatch.setattr(fast_path.api, name, unreachable)


def leaves_of(*arrays):
    return [None if array is None else CPU.put(array).requires_grad_() for array in arrays]


@pytest.mark.parametrize(
    ("case", "pair"),
    [
        *((case, ("float64", "float64")) for case in (*SMALL_CASES, *VARIANTS)),
        *((case, pair) for case in (SMALL_CASES[0], VARIANTS[0], VARIANTS[8]) for pair in cases.DTYPE_PAIRS[1:]),
    ],
    ids=str,
)
def test_output_and_gradients_are_those_of_the_reference(without_kernels, case, pair):
    inputs = case.inputs(*pair)
    value, locations, weights = leaves_of(inputs.value, inputs.locations, inputs.weights)
    nearest = case.variant.get("interpolation") == "nearest"
    locations.requires_grad_(not nearest)
    output = ms_deform_attn(value, CPU.put(inputs.shapes), inputs.starts, locations, weights, **case.variant)
    leaves = [value, weights] if nearest else [value, weights, locations]
    of_value, of_weights, *of_locations = torch.autograd.grad(output, leaves, CPU.put(inputs.grad_output))
    want_output, want = cases.expected(inputs, **case.variant)
    assert_close(CPU.get(output), want_output, pair[0])
    assert_close(CPU.get(of_value), want[0], pair[0], "grad_value")
    assert_close(CPU.get(of_weights), want[2], pair[1], "grad_attention_weights")
    points = case.variant.get("num_points")
    for grad in of_locations:
        got, exact = (cases.pixel_units(one, inputs.shapes, points) for one in (CPU.get(grad), want[1]))
        assert_close(got, exact, pair[1], "grad_sampling_locations")


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("levels", [None, 1])
@pytest.mark.parametrize("coordinates", [2, 4])
@pytest.mark.parametrize("case", [Case("fused"), VARIANTS[0], VARIANTS[4], VARIANTS[5]], ids=str)
def test_the_fused_operator_gives_what_the_reference_gives(without_kernels, case, coordinates, levels, packed):
    inputs = fused_inputs(case, ("float64", "float64"), coordinates=coordinates, levels=levels, packed=packed)
    leaves = leaves_of(inputs.value, inputs.references, inputs.locations, inputs.weights)
    output = ms_deform_attn_fused(leaves[0], CPU.put(inputs.shapes), None, *leaves[1:], **case.variant)
    given = [leaf for leaf in leaves if leaf is not None]
    grads = torch.autograd.grad(output, given, CPU.put(inputs.grad_output))
    want_output, (of_value, of_offsets, of_logits, of_references) = cases.expected_fused(inputs, **case.variant)
    assert_close(CPU.get(output), want_output, "float64")
    want = [of_value, of_references, of_offsets, *([] if packed else [of_logits])]
    for grad, exact in zip(grads, want, strict=True):
        assert_close(CPU.get(grad), exact, "float64")


@pytest.mark.parametrize("lengths", [[2, 5], (0, 3), torch.tensor([5, 1])], ids=str)
def test_padding_gives_zeros(without_kernels, lengths):
    inputs = Case("ragged").inputs("float64")
    value, locations, weights = leaves_of(inputs.value, inputs.locations, inputs.weights)
    output = ms_deform_attn(value, CPU.put(inputs.shapes), None, locations, weights, query_lengths=lengths)
    grads = torch.autograd.grad(output, (value, locations, weights), CPU.put(inputs.grad_output))
    want_output, want = cases.expected_ragged(inputs, [int(length) for length in lengths])
    for have, exact in zip((output, *grads), (want_output, *want), strict=True):
        assert_close(CPU.get(have), exact, "float64")


@pytest.mark.parametrize("sizes", [{"N": 0}, {"queries": 0}, {"levels": ()}], ids=str)
def test_empty_problems_give_zeros(without_kernels, sizes):
    value, shapes, _, locations, weights, grad_output = tensors("cpu", **sizes)
    shapes = shapes.long().reshape(-1, 2)
    have = results(ms_deform_attn, (value, shapes, None, locations, weights, grad_output))
    assert [tensor.shape for tensor in have] == [t.shape for t in (grad_output, value, locations, weights)]
    assert not any(tensor.any() for tensor in have)


@pytest.mark.parametrize("mask", [(True, True, True), (True, False, False), (False, True, False), (False, False, True),
                                  (False, False, False)], ids=str)  # fmt: skip
def test_the_registered_backward_computes_the_gradients_in_the_mask(without_kernels, mask):
    *inputs, grad_output = tensors("cpu", starts=True)
    grads = backward_operator(grad_output, *inputs, 64, None, mask)
    want = results(lambda *a: forward_operator(*a, 64, None), (*inputs, grad_output))[1:]
    for grad, exact, asked in zip(grads, want, mask, strict=True):
        torch.testing.assert_close(grad, exact if asked else grad.new_empty(0))


WRONG = {
    "dimensions": lambda value, shapes, locations, weights: (value.flatten(2), shapes, locations, weights),
    "levels": lambda value, shapes, locations, weights: (value, shapes[:1], locations, weights),
    "too large": lambda value, shapes, locations, weights: (value, shapes * 2, locations, weights),
    "negative": lambda value, shapes, locations, weights: (value, -shapes, locations, weights),
    "float sizes": lambda value, shapes, locations, weights: (value, shapes.double(), locations, weights),
    "dtype": lambda value, shapes, locations, weights: (value, shapes, locations.double(), weights.double()),
    "whole numbers": lambda value, shapes, locations, weights: (value.long(), shapes, locations, weights),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_what_is_refused_elsewhere_is_refused_with_the_same_sentence(wrong, monkeypatch):
    value, shapes, _, locations, weights, _ = tensors("cpu", requires_grad=False)
    value, shapes, locations, weights = WRONG[wrong](value, shapes, locations, weights)
    found = []
    for kernels in (("cpu",), ()):
        monkeypatch.setattr(devices, "_WITH_KERNELS", kernels)
        with pytest.raises((TypeError, ValueError)) as error:
            ms_deform_attn(value, shapes, None, locations, weights)
        found.append((type(error.value), str(error.value)))
    assert found[0] == found[1]


def test_validation_reads_locations(without_kernels):
    value, shapes, _, locations, weights, _ = tensors("cpu", requires_grad=False)
    in_pixels = 1 + 40 * torch.rand_like(locations)
    with pytest.warns(UserWarning, match="sampling_locations: .*pixels"):
        ms_deform_attn(value, shapes, None, in_pixels, weights, validate=True)


def test_one_warning_names_the_device(without_kernels, monkeypatch):
    monkeypatch.setattr(devices, "_noted", set())
    arguments = tensors("cpu")
    with pytest.warns(UserWarning, match="cupy_msda has no kernels for cpu: .* torch's own functions") as caught:
        results(ms_deform_attn, arguments)
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        results(ms_deform_attn, arguments)


def test_deterministic_gradients_are_not_promised(without_kernels):
    *inputs, _ = tensors("cpu")
    output = ms_deform_attn(*inputs, deterministic=True)
    with pytest.raises(
        RuntimeError, match=r"deterministic: expected None or False on cpu, .*do not promise equal bits"
    ):
        output.sum().backward()


def test_transformations_of_torch_work(without_kernels):
    levels = ((2, 3), (1, 2))
    value, shapes, _, locations, weights, _ = tensors("cpu", torch.float64, N=1, queries=2, levels=levels)

    def attend(*leaves):
        return ms_deform_attn(leaves[0], shapes, None, *leaves[1:])

    leaves = value, locations, weights
    assert torch.autograd.gradcheck(attend, leaves, fast_mode=True)
    assert torch.autograd.gradgradcheck(attend, leaves, fast_mode=True)
    plain = [leaf.detach() for leaf in leaves]
    found = torch.func.grad(lambda *a: attend(*a).square().sum(), argnums=(0, 1, 2))(*plain)
    want = torch.autograd.grad(attend(*leaves).square().sum(), leaves)
    assert_same(found, want, rtol=1e-10)
    mapped = torch.func.vmap(attend)(*(torch.stack((leaf, leaf * 0.5)) for leaf in plain))
    torch.testing.assert_close(mapped[1], attend(*(leaf * 0.5 for leaf in plain)))


def test_opcheck(without_kernels):
    *inputs, grad_output = tensors("cpu", starts=True)
    torch.library.opcheck(forward_operator, (*inputs, 64, None))
    torch.library.opcheck(backward_operator, (grad_output, *inputs, 64, None, (True, False, True)))


@pytest.mark.parametrize("as_numbers", [False, True], ids=["tensors", "numbers"])
def test_compiled_code_takes_the_same_way(without_kernels, as_numbers):
    torch._dynamo.reset()
    layer, inputs = attention_module().float(), to_float32(module_inputs())
    if as_numbers:
        inputs = (*inputs[:3], LEVELS, None)
    want = layer(*inputs)
    want.square().sum().backward()
    grads = [parameter.grad.clone() for parameter in layer.parameters()]
    layer.zero_grad()
    have = torch.compile(layer, fullgraph=True, backend="aot_eager")(*inputs)
    have.square().sum().backward()
    torch.testing.assert_close(have, want)
    assert_same([parameter.grad for parameter in layer.parameters()], grads)
    torch._dynamo.reset()


def test_the_layer_gives_the_same_numbers(monkeypatch):
    layer, inputs = attention_module(), module_inputs(4)
    monkeypatch.setattr(devices, "_noted", {"cpu"})
    found = []
    for kernels in (("cpu",), ()):
        monkeypatch.setattr(devices, "_WITH_KERNELS", kernels)
        output = layer(*inputs)
        found.append([output.detach(), *torch.autograd.grad(output.square().sum(), tuple(layer.parameters()))])
    assert_same(*found, rtol=1e-10)


def test_autocast_takes_samples_in_float32(without_kernels):
    value, shapes, starts, locations, weights, _ = tensors("cpu", torch.bfloat16, torch.float32, starts=True)
    with torch.autocast("cpu", torch.bfloat16):
        output = ms_deform_attn(value, shapes, starts, locations, weights.bfloat16())
    output.sum().backward()
    assert output.dtype is value.grad.dtype is torch.bfloat16
    assert locations.grad.dtype is weights.grad.dtype is torch.float32


def test_the_cpu_and_nvidia_gpus_have_kernels():
    assert [devices.has_kernels(torch.device(kind)) for kind in ("cpu", "cuda", "cuda:3")] == [True] * 3
    assert not any(
        devices.has_kernels(torch.device(kind)) for kind in ("mps", "xpu", "hpu", "meta", "privateuseone", "mtia")
    )


def test_a_gpu_of_rocm_has_no_kernels(monkeypatch):
    monkeypatch.setattr(torch.version, "hip", "7.1")
    assert not devices.has_kernels(torch.device("cuda"))
    assert devices.has_kernels(torch.device("cpu"))
    monkeypatch.setattr(devices, "_noted", set())
    with pytest.warns(UserWarning, match=r"no kernels for cuda:0 \(ROCm\)"):
        devices._note(torch.device("cuda:0"))


@pytest.mark.gpu
def test_on_rocm_no_launch_is_planned(monkeypatch):
    arguments = tensors("cuda", queries=11, starts=True)  # begins CUDA, which torch cannot do as ROCm
    monkeypatch.setattr(torch.version, "hip", "7.1")
    monkeypatch.setattr(devices, "_noted", {"cuda"})
    before = dict(fast_path.plans), dict(fast_path.recent)
    for _ in range(3):
        have = results(ms_deform_attn, arguments)
    assert (fast_path.plans, fast_path.recent) == before
    monkeypatch.undo()
    assert_same(have, results(ms_deform_attn, arguments))


@pytest.mark.gpu
def test_array_functions_refuse_a_gpu_of_rocm(monkeypatch):
    value, shapes, starts, locations, weights, _ = tensors("cuda", requires_grad=False)
    monkeypatch.setattr(torch.version, "hip", "7.1")
    with pytest.raises(TypeError, match=r"value: .*cuda:0 \(ROCm\).*cupy_msda.torch"):
        cupy_msda.ms_deform_attn(value, shapes, starts, locations, weights)


needs_stand_in = pytest.mark.skipif(not stand_in_device.AVAILABLE, reason="this torch makes no devices from Python")


@pytest.fixture(scope="module")
def on_stand_in():
    """What the program of the stand-in device found."""
    command = [sys.executable, "-m", "tests.helpers.stand_in_device"]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


@needs_stand_in
@pytest.mark.parametrize("call", stand_in_device.CALLS)
def test_a_device_of_its_own_gives_the_numbers_of_the_cpu(on_stand_in, call):
    assert on_stand_in[call] == "equal"


@needs_stand_in
@pytest.mark.parametrize("call", stand_in_device.REFUSED)
def test_a_device_of_its_own_is_refused_with_a_sentence(on_stand_in, call):
    assert on_stand_in[call] == stand_in_device.REFUSED[call][1]
