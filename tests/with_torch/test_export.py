"""Other runtimes: ONNX by the reference implementation of torch functions, and torch.export without our operator."""

import numpy as np
import onnxruntime
import pytest
import torch

from cupy_msda.torch import decomposed, ms_deform_attn
from tests.helpers.torch_calls import LEVELS, attention_module, module_inputs, to_float32


class Net(torch.nn.Module):
    """The layer with its metadata as constants."""

    def __init__(self):
        super().__init__()
        self.layer = attention_module().float()

    def forward(self, query, references, memory):
        return self.layer(query, references, memory, LEVELS, None)


class TensorNet(Net):
    """The layer with its metadata as inputs."""

    def forward(self, query, references, memory, shapes, starts):
        return self.layer(query, references, memory, shapes, starts)


def run(path, inputs):
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    names = [entry.name for entry in session.get_inputs()]
    return session.run(None, {name: tensor.numpy() for name, tensor in zip(names, inputs, strict=False)})[0]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("dynamo", [True, False], ids=["torch.export", "TorchScript"])
@pytest.mark.parametrize("metadata", ["numbers", "tensors"])
def test_onnx_runtime_gives_the_same_numbers(tmp_path, dynamo, metadata):
    net = (Net if metadata == "numbers" else TensorNet)().eval()
    inputs = to_float32(module_inputs())[: 3 if metadata == "numbers" else 5]
    path = tmp_path / "layer.onnx"
    torch.onnx.export(net, inputs, path, dynamo=dynamo, opset_version=18, verbose=False)
    with torch.no_grad():
        want = net(*inputs).numpy()
    np.testing.assert_allclose(run(path, inputs), want, rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore")
def test_onnx_runtime_serves_other_numbers_of_queries(tmp_path):
    net, inputs = Net().eval(), to_float32(module_inputs())[:3]
    path = tmp_path / "layer.onnx"
    Q = torch.export.Dim("Q", max=1000)
    torch.onnx.export(net, inputs, path, dynamo=True, verbose=False, dynamic_shapes=({1: Q}, {1: Q}, {}))
    more = to_float32(module_inputs(Q=9))[:3]
    with torch.no_grad():
        want = net(*more).numpy()
    np.testing.assert_allclose(run(path, more), want, rtol=1e-4, atol=1e-5)


def test_export_inside_decomposed_holds_no_operator_of_this_package():
    net, inputs = Net().eval(), to_float32(module_inputs())[:3]
    with decomposed():
        program = torch.export.export(net, inputs)
    assert not any("cupy_msda" in str(node.target) for node in program.graph.nodes)
    with torch.no_grad():
        torch.testing.assert_close(program.module()(*inputs), net(*inputs))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_decomposed_calls_agree_with_the_operator(dtype):
    torch.manual_seed(3)
    value, starts = torch.randn(2, 60, 2, 4).to(dtype), [2, 46]
    locations, weights = torch.rand(2, 5, 2, 2, 3, 2) * 3 - 1, torch.rand(2, 5, 2, 2, 3)
    locations[0, 0, 0, 0, 0] = torch.tensor([torch.nan, 0.5])
    locations[0, 1, 1, 0, 1] = torch.tensor([0.5, torch.inf])
    locations[1, 2, 1, 1, 2] = torch.tensor([-torch.inf, 0.5])
    if dtype == torch.float64:
        locations, weights = locations.double(), weights.double()
    want = ms_deform_attn(value, LEVELS, starts, locations, weights)
    with decomposed():
        have = ms_deform_attn(value, LEVELS, starts, locations, weights)
    assert have.dtype == dtype
    torch.testing.assert_close(
        have, want, rtol=1e-2 if dtype.itemsize == 2 else 1e-5, atol=1e-2 if dtype.itemsize == 2 else 1e-5
    )


def test_nested_decomposed_contexts_end_with_the_outermost():
    from cupy_msda.torch import functional

    with decomposed(), decomposed():
        assert functional._decomposed
    assert not functional._decomposed
