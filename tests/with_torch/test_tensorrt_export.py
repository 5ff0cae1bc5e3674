"""ONNX with the nodes of TensorRT's plugin: what they look like, and that they compute what the operator computes."""

import numpy as np
import onnx
import pytest
import torch
from torch import nn

import cupy_msda.torch
from cupy_msda.torch import ms_deform_attn, ms_deform_attn_fused
from cupy_msda.torch.onnx import tensorrt
from tests.helpers.plugin_node import evaluate, nodes
from tests.helpers.torch_calls import LEVELS, PIXELS, attention_module, module_inputs, to_float32

pytestmark = pytest.mark.filterwarnings("ignore")
EXPORTERS = {"torch.export": True, "TorchScript": False}
POINTS = (1, 3)


class Net(nn.Module):
    """A call whose locations and weights, or offsets and logits, are inputs; `form` says which."""

    def __init__(self, form="plain", starts=None, lengths=None, **options):
        super().__init__()
        self.form, self.starts, self.lengths, self.options = form, starts, lengths, options

    def forward(self, value, locations, weights):
        options = self.options | {"query_lengths": self.lengths}
        if self.form == "plain":
            return ms_deform_attn(value, LEVELS, self.starts, locations, weights, **options)
        coordinates = 4 if self.form == "boxes" else 2
        references = torch.linspace(0.2, 0.8, coordinates).expand(*locations.shape[:2], len(LEVELS), coordinates)
        return ms_deform_attn_fused(value, LEVELS, self.starts, references, 5 * locations, weights, **options)


def inputs_of(N=2, Q=5, points=None):
    """value, locations beyond all edges, weights."""
    generator = torch.Generator().manual_seed(N + Q)
    samples = (2, 3) if points is None else (sum(points),)
    drawn = [(N, PIXELS, 2, 4), (N, Q, 2, *samples, 2), (N, Q, 2, *samples)]
    value, locations, weights = (torch.rand(shape, generator=generator) for shape in drawn)
    return value - 0.5, 1.6 * locations - 0.3, weights


def export(net, inputs, path, dynamo, **options):
    with tensorrt():
        torch.onnx.export(net.eval(), inputs, path, dynamo=dynamo, opset_version=18, verbose=False, **options)
    return path


CALLS = {
    "plain": {},
    "starts": {"starts": [0, 42]},
    "lengths": {"lengths": [2, 5]},
    "points": {"num_points": POINTS},
    "nearest": {"interpolation": "nearest"},
    "border": {"padding_mode": "border"},
    "align_corners": {"align_corners": True},
    "border, align_corners": {"padding_mode": "border", "align_corners": True},
    "fused": {"form": "points"},
    "fused, boxes, points": {"form": "boxes", "num_points": POINTS},
}


# The default exporter takes seconds, so most of its cases are long ones.
SHORT = ("plain", "points")
CASES = [
    pytest.param(name, dynamo, id=f"{name}-{exporter}", marks=() if name in SHORT or not dynamo else pytest.mark.long)
    for name in CALLS
    for exporter, dynamo in EXPORTERS.items()
]


@pytest.mark.parametrize(("name", "dynamo"), CASES)
def test_the_nodes_compute_the_operator(tmp_path, name, dynamo):
    net, inputs = Net(**CALLS[name]), inputs_of(points=CALLS[name].get("num_points"))
    path = export(net, inputs, tmp_path / "net.onnx", dynamo)
    (plugin,), others = nodes(path)
    assert plugin.op_type == "MultiscaleDeformableAttnPlugin_TRT"
    assert {a.name: onnx.helper.get_attribute_value(a) for a in plugin.attribute} == {
        "plugin_version": b"2", "plugin_namespace": b"",
    }  # fmt: skip
    assert not others & {"GridSample", "CumSum"}
    np.testing.assert_allclose(evaluate(path, inputs), net(*inputs), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("options", [{"padding_mode": "border"}, {"align_corners": True}, {}], ids=str)
def test_locations_that_are_not_finite_count_as_in_the_operator(tmp_path, options):
    value, locations, weights = inputs_of()
    locations[0, :3, 0, 0, 0] = torch.tensor([[torch.nan, 0.5], [torch.inf, 0.5], [0.5, -torch.inf]])
    net = Net(**options)
    path = export(net, (value, locations, weights), tmp_path / "net.onnx", False)
    want = net(value, locations, weights)
    np.testing.assert_allclose(evaluate(path, (value, locations, weights)), want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.long)], ids=str)
def test_16_bit_calls_are_computed_in_float32(tmp_path, dtype):
    class Cast(Net):
        def forward(self, value, locations, weights):
            return super().forward(value.to(dtype), locations, weights).float()

    inputs = inputs_of()
    path = export(Cast(), inputs, tmp_path / "net.onnx", True)
    np.testing.assert_allclose(evaluate(path, inputs), Cast()(*inputs), rtol=1e-2, atol=1e-3)


class Detector(nn.Module):
    """Two feature maps of an image and a layer over them: level sizes follow the image's."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.maps = nn.ModuleList(nn.Conv2d(3, 16, size, size) for size in (2, 4))
        self.layer = attention_module().float()
        self.query = nn.Parameter(torch.randn(1, 5, 16))

    def forward(self, images):
        maps = [made(images) for made in self.maps]
        shapes = [(one.shape[2], one.shape[3]) for one in maps]
        memory = torch.cat([one.flatten(2).transpose(1, 2) for one in maps], 1)
        query = self.query.expand(images.shape[0], -1, -1)
        points = query[..., :2].sigmoid()[:, :, None].expand(-1, -1, 2, -1)
        return self.layer(query, points, memory, shapes, None)


@pytest.mark.parametrize("dynamo", EXPORTERS.values(), ids=EXPORTERS)
def test_level_sizes_follow_the_image(tmp_path, dynamo):
    net, Dim = Detector().eval().requires_grad_(False), torch.export.Dim
    dynamic = {"dynamic_shapes": ({0: Dim("N"), 2: 8 * Dim("H", max=100), 3: 8 * Dim("W", max=100)},)}
    if not dynamo:
        dynamic = {"input_names": ["images"], "dynamic_axes": {"images": {0: "N", 2: "H", 3: "W"}}}
    path = export(net, (torch.randn(2, 3, 32, 48),), tmp_path / "net.onnx", dynamo, **dynamic)
    for size in ((2, 3, 32, 48), (3, 3, 48, 16), (1, 3, 64, 64)):
        images = torch.randn(size)
        np.testing.assert_allclose(evaluate(path, (images,)), net(images), rtol=1e-4, atol=1e-4)


class TensorNet(nn.Module):
    """The layer with its metadata as inputs."""

    def __init__(self):
        super().__init__()
        self.layer = attention_module().float()

    def forward(self, query, references, memory, shapes, starts):
        return self.layer(query, references, memory, shapes, starts)


@pytest.mark.parametrize("dynamo", EXPORTERS.values(), ids=EXPORTERS)
def test_metadata_may_be_inputs(tmp_path, dynamo):
    net, inputs = TensorNet().requires_grad_(False), to_float32(module_inputs())
    path = export(net, inputs, tmp_path / "net.onnx", dynamo)
    np.testing.assert_allclose(evaluate(path, inputs), net(*inputs), rtol=1e-4, atol=1e-4)


def test_the_plugin_version_is_the_caller_s(tmp_path):
    with tensorrt(plugin_version=1):
        torch.onnx.export(Net(), inputs_of(), tmp_path / "net.onnx", dynamo=True, verbose=False)
    ((plugin,), _) = nodes(tmp_path / "net.onnx")
    assert onnx.helper.get_attribute_value(plugin.attribute[0]) == b"1"


@pytest.mark.parametrize("version", [0, 3, "2", None])
def test_other_plugin_versions_are_refused(version):
    with pytest.raises(ValueError, match="plugin_version: expected 1 or 2, got"), tensorrt(version):
        pass


def test_float64_is_refused_with_the_remedy(tmp_path):
    inputs = [tensor.double() for tensor in inputs_of()]
    with pytest.raises(TypeError, match=r"value: expected float32 or a 16-bit dtype, .* got float64"), tensorrt():
        torch.onnx.export(Net(), tuple(inputs), tmp_path / "net.onnx", dynamo=False, verbose=False)


@pytest.mark.parametrize("dynamo", EXPORTERS.values(), ids=EXPORTERS)
def test_weights_in_another_order_are_refused(tmp_path, dynamo):
    value, locations, weights = inputs_of()
    with pytest.raises(Exception, match="attention_weights: expected the shape of sampling_locations"), tensorrt():
        torch.onnx.export(
            Net(), (value, locations, weights.transpose(-1, -2)), tmp_path / "net.onnx", dynamo=dynamo, verbose=False
        )


def test_empty_calls_are_refused(tmp_path):
    inputs = inputs_of(Q=0)
    with pytest.raises(ValueError, match="expected N, Q, M and L of at least 1"), tensorrt():
        torch.onnx.export(Net(), inputs, tmp_path / "net.onnx", dynamo=False, verbose=False)


def test_outside_of_the_context_and_of_an_export_nothing_changes(tmp_path):
    inputs = inputs_of()
    want = Net()(*inputs)
    with cupy_msda.torch.onnx.tensorrt():
        assert torch.equal(Net()(*inputs), want)
        program = torch.export.export(Net(), inputs)
    assert any("cupy_msda" in str(node.target) for node in program.graph.nodes)
    torch.onnx.export(Net(), inputs, tmp_path / "net.onnx", dynamo=True, verbose=False)
    plugins, others = nodes(tmp_path / "net.onnx")
    assert not plugins
    assert "GridSample" in others


@pytest.mark.long
def test_a_whole_model_of_another_package(tmp_path):
    from tests.helpers import transformers_models

    torch.manual_seed(0)
    model, inputs = transformers_models.MODELS["deformable_detr"]()
    images = inputs["pixel_values"].float()

    class Encoder(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model.eval().float()

        def forward(self, images):
            return self.model(pixel_values=images).encoder_last_hidden_state

    net = Encoder().requires_grad_(False)
    with cupy_msda.torch.patch(model):
        want = net(images)
        path = export(net, (images,), tmp_path / "net.onnx", True)
    plugins, others = nodes(path)
    assert len(plugins) == 2  # the decoder's nodes are not part of the output
    assert "GridSample" not in others
    np.testing.assert_allclose(evaluate(path, (images,)), want, rtol=1e-3, atol=1e-4)
