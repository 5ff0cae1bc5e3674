"""Export: torch.jit.trace, torch.export and ONNX, where sizes that follow an input's keep doing so."""

import contextlib
import functools

import numpy as np
import onnxruntime
import pytest
import torch

from cupy_msda.torch import decomposed, ms_deform_attn, ms_deform_attn_fused
from cupy_msda.torch.onnx import tensorrt
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


class Detector(torch.nn.Module):
    """Two feature maps of an image and an attention layer over them, whose level sizes follow the image's.

    `sizes` is how the level sizes are given: as the maps' dimensions, or written into a tensor as in transformers.
    """

    def __init__(self, form, sizes, starts=False, **options):
        super().__init__()
        torch.manual_seed(0)
        self.form, self.sizes, self.starts, self.options = form, sizes, starts, options
        self.maps = torch.nn.ModuleList(torch.nn.Conv2d(3, 16, size, size) for size in (2, 4))
        self.layer = attention_module().float()
        self.query = torch.nn.Parameter(torch.randn(1, 5, 16))

    def forward(self, images):
        maps = [made(images) for made in self.maps]
        shapes = [(one.shape[2], one.shape[3]) for one in maps]
        starts = [0, shapes[0][0] * shapes[0][1]] if self.starts else None
        if self.sizes == "tensor":
            table = torch.empty((2, 2), dtype=torch.int64)
            for level, (height, width) in enumerate(shapes):
                table[level, 0], table[level, 1] = height, width
            shapes = table
        memory = torch.cat([one.flatten(2).transpose(1, 2) for one in maps], 1)
        N, Q = images.shape[0], self.query.shape[1]
        query = self.query.expand(N, -1, -1)
        points = query[..., :2].sigmoid()[:, :, None]
        layer = self.layer
        if self.form == "layer":
            return layer(query, points.expand(-1, -1, 2, -1), memory, shapes, starts)
        value = layer.value_proj(memory).view(N, memory.shape[1], 2, 8)
        offsets = layer.sampling_offsets(query).view(N, Q, 2, 6, 2)
        logits = layer.attention_weights(query).view(N, Q, 2, 6)
        if self.form == "boxes":
            boxes = query[..., :4].sigmoid()[:, :, None]
            options = {"num_points": [4, 2], **self.options}
            return ms_deform_attn_fused(value, shapes, starts, boxes, offsets, logits, **options)
        locations = (points[:, :, None] + offsets / 10).view(N, Q, 2, 2, 3, 2)
        return ms_deform_attn(value, shapes, starts, locations, logits.softmax(-1).view(N, Q, 2, 2, 3), **self.options)


def dimensions():
    Dim = torch.export.Dim
    return {0: Dim("N"), 2: 8 * Dim("H", max=100), 3: 8 * Dim("W", max=100)}


def traced(net, images, path):
    return torch.jit.trace(net, images, check_trace=False)


def traced_composition(net, images, path):
    with decomposed():
        return torch.jit.trace(net, images, check_trace=False)


def exported(net, images, path):
    return torch.export.export(net, (images,), dynamic_shapes=(dimensions(),)).module()


def exported_composition(net, images, path):
    with decomposed():
        program = torch.export.export(net, (images,), dynamic_shapes=(dimensions(),))
    assert not any("cupy_msda" in str(node.target) for node in program.graph.nodes)
    return program.module()


def onnx(net, images, path):
    torch.onnx.export(net, (images,), path, dynamo=True, verbose=False, dynamic_shapes=(dimensions(),))
    return lambda other: torch.from_numpy(run(path, (other,)))


def onnx_of_trace(net, images, path):
    axes = {"images": {0: "N", 2: "H", 3: "W"}}
    torch.onnx.export(
        net, (images,), path, dynamo=False, opset_version=18, verbose=False, input_names=["images"], dynamic_axes=axes
    )
    return lambda other: torch.from_numpy(run(path, (other,)))


EXPORTS = (traced, traced_composition, exported, exported_composition, onnx, onnx_of_trace)
BORDER, NEAREST = {"padding_mode": "border"}, {"interpolation": "nearest"}
NETS = {
    "plain": ("plain", "numbers", False, {}),
    "plain, starts": ("plain", "tensor", True, {}),
    "layer": ("layer", "numbers", True, {}),
    "layer, tensor": ("layer", "tensor", False, {}),
    "boxes": ("boxes", "tensor", False, {}),
    "plain, border": ("plain", "tensor", False, BORDER),
    "boxes, border": ("boxes", "numbers", False, BORDER),
    "plain, nearest": ("plain", "numbers", False, NEAREST),
    "boxes, nearest": ("boxes", "tensor", False, NEAREST),
}
# The default ONNX exporter takes seconds, so most of its cases are long ones.
SHORT = {onnx: ("layer, tensor",)} | dict.fromkeys(
    EXPORTS[:4] + EXPORTS[5:], ("plain", "layer, tensor", "boxes, nearest")
)
CALLS = [
    pytest.param(export, name, marks=() if name in SHORT[export] else pytest.mark.long, id=f"{export.__name__}-{name}")
    for export in EXPORTS
    for name in NETS
]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("export", "name"), CALLS)
def test_other_image_sizes_give_the_numbers_of_the_eager_call(tmp_path, export, name):
    form, sizes, starts, options = NETS[name]
    net = Detector(form, sizes, starts, **options).eval().requires_grad_(False)
    other = export(net, torch.randn(2, 3, 32, 48), tmp_path / "net.onnx")
    for size in ((2, 3, 32, 48), (3, 3, 48, 16), (1, 3, 64, 64)):
        images = torch.randn(size)
        torch.testing.assert_close(other(images), net(images), rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("dtype", "size"), [(torch.uint8, 20), (torch.int8, 12), (torch.int16, 200)], ids=str)
@pytest.mark.parametrize("onnx", [False, True], ids=["traced", "onnx of trace"])
def test_the_pixels_of_a_level_may_not_fit_the_dtype_of_its_size(tmp_path, onnx, dtype, size):
    class Net(torch.nn.Module):
        def forward(self, value, shapes, starts, locations, weights):
            return ms_deform_attn(value, shapes, starts, locations, weights)

    shapes, starts = torch.tensor([[1, 2], [size, size]], dtype=dtype), torch.tensor([0, 2], dtype=dtype)
    value, locations = torch.rand(1, 2 + size * size, 1, 2), torch.rand(1, 4, 1, 2, 1, 2)
    inputs = value, shapes, starts, locations, torch.rand(1, 4, 1, 2, 1)
    if onnx:
        torch.onnx.export(Net(), inputs, tmp_path / "net.onnx", dynamo=False, opset_version=18, verbose=False)
        have = torch.from_numpy(run(tmp_path / "net.onnx", inputs))
    else:
        with decomposed():
            have = torch.jit.trace(Net(), inputs, check_trace=False)(*inputs)
    torch.testing.assert_close(have, Net()(*inputs), rtol=1e-4, atol=1e-5)


# ---- levels that do not fit ------------------------------------------------------------------------------------------


class WrongLevels(torch.nn.Module):
    """A call with S = 20 and the levels of `fault`; `form` says what they are."""

    def __init__(self, form, fault):
        super().__init__()
        self.form, (self.shapes, self.starts, _) = form, FAULTS[fault]
        self.register_buffer("table", torch.tensor(self.shapes))
        self.register_buffer("first", None if self.starts is None else torch.tensor(self.starts))

    def forward(self, value, locations, weights):
        shapes, starts = self.shapes, self.starts
        if self.form == "tensors":
            shapes, starts = self.table, self.first
        elif self.form == "arrays":
            shapes, starts = np.array(shapes), None if starts is None else np.array(starts)
        return ms_deform_attn(value, shapes, starts, locations, weights)


FAULTS = {
    "sum": ([[4, 4], [3, 3]], None, r"spatial_shapes: expected level 1 of 3 x 3 pixels from pixel 16 to fit into S"),
    "end": ([[4, 4], [2, 2]], [0, 17], r"spatial_shapes: expected level 1 of 2 x 2 pixels from pixel 17 to fit"),
    "size": ([[4, 4], [0, 2]], None, r"spatial_shapes: expected positive \(H, W\), got \(0, 2\) for level 1"),
    "start": ([[4, 4], [2, 2]], [-1, 16], "level_start_index: expected starts of at least 0, got -1 for level 0"),
    "starts": ([[4, 4], [2, 2]], [0], r"level_start_index: expected shape \[L\] with L = 2, got \[1\]"),
}  # fmt: skip
WRONG_INPUTS = torch.rand(1, 20, 2, 4), torch.rand(1, 5, 2, 2, 3, 2), torch.rand(1, 5, 2, 2, 3)


def of_trace(net, path, plugin=False):
    with tensorrt() if plugin else contextlib.nullcontext():
        torch.onnx.export(net, WRONG_INPUTS, path, dynamo=False, opset_version=18, verbose=False)


def of_program(net, path, plugin=False):
    with tensorrt() if plugin else contextlib.nullcontext():
        torch.onnx.export(net, WRONG_INPUTS, path, dynamo=True, verbose=False)


READS_TENSORS = {
    "trace": lambda net, path: torch.jit.trace(net, WRONG_INPUTS, check_trace=False),
    "trace of composition": lambda net, path: traced_composition(net, WRONG_INPUTS, path),
    "onnx": of_trace,
    "plugin": functools.partial(of_trace, plugin=True),
}
READS_NUMBERS = READS_TENSORS | {
    "export": lambda net, path: torch.export.export(net, WRONG_INPUTS),
    "strict export": lambda net, path: torch.export.export(net, WRONG_INPUTS, strict=True),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize(
    ("form", "export"),
    [("numbers", name) for name in READS_NUMBERS if name != "strict export"]
    + [("arrays", name) for name in READS_NUMBERS if name != "strict export"]
    + [("tensors", name) for name in READS_TENSORS],
)
def test_levels_that_do_not_fit_are_refused_at_export(tmp_path, form, export, fault):
    with pytest.raises(ValueError, match=FAULTS[fault][-1]):
        READS_NUMBERS[export](WrongLevels(form, fault), tmp_path / "net.onnx")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "export",
    [
        lambda net, path: READS_NUMBERS["strict export"](net, path),
        pytest.param(of_program, marks=pytest.mark.long),
        pytest.param(functools.partial(of_program, plugin=True), marks=pytest.mark.long),
    ],
)
@pytest.mark.parametrize("fault", ["sum", "size"])
def test_a_compiler_says_which_numbers_do_not_fit(tmp_path, export, fault):
    with pytest.raises(Exception, match=FAULTS[fault][-1]):
        export(WrongLevels("numbers", fault), tmp_path / "net.onnx")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("fault", ["sum", "end", "size", "start"])
def test_tensors_that_an_export_cannot_read_give_nan(fault):
    """torch.export knows the shapes of tensors alone. The composition finds out when it runs."""
    with decomposed():
        program = torch.export.export(WrongLevels("tensors", fault), WRONG_INPUTS).module()
    assert program(*WRONG_INPUTS).isnan().all()


def test_an_export_with_unknown_sizes_reads_no_symbol():
    """The least S is not written into the program, whose S may be smaller or larger."""

    class Follows(torch.nn.Module):
        def forward(self, value, locations, weights):
            return ms_deform_attn(
                value, [(value.shape[1] // 4, 4)] * 1, None, locations[:, :, :, :1], weights[..., :1, :]
            )

    S = 4 * torch.export.Dim("S4", min=2, max=100)
    program = torch.export.export(Follows(), WRONG_INPUTS, dynamic_shapes=({1: S}, None, None)).module()
    value, *samples = WRONG_INPUTS
    for other in (value[:, :8], value.repeat(1, 2, 1, 1)):
        torch.testing.assert_close(program(other, *samples), Follows()(other, *samples))


@pytest.mark.long
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


def test_the_decomposed_layer_is_one_graph():
    layer, inputs = attention_module(), module_inputs()[:3]
    with decomposed():
        have = torch.compile(layer, backend="eager", fullgraph=True)(*inputs, LEVELS, None)
    torch.testing.assert_close(have, layer(*inputs, LEVELS, None))


@pytest.mark.parametrize("transform", [torch.vmap, lambda f: lambda *a: torch.compile(f, backend="eager")(*a)])
@pytest.mark.parametrize("empty", ["N", "Q", "L"])
def test_decomposed_calls_may_be_empty(empty, transform):
    N, Q, L = (size * (name != empty) for name, size in (("N", 2), ("Q", 5), ("L", 2)))
    inputs = torch.rand(1, N, 54 * (L > 0), 2, 4), torch.rand(1, N, Q, 2, L, 3, 2), torch.rand(1, N, Q, 2, L, 3)
    if transform is not torch.vmap:
        inputs = [one[0] for one in inputs]
    with decomposed():
        output = transform(lambda *given: ms_deform_attn(given[0], LEVELS[:L], None, *given[1:]))(*inputs)
    assert output.shape[-3:] == (N, Q, 8)
    assert not output.any()


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
