"""The fused operator in torch: gradients, transforms, compilation, export, autocast, repeated calls."""

import itertools

import onnxruntime
import pytest

from tests.helpers import cases
from tests.helpers.backends import TorchBackend
from tests.helpers.cases import Case

torch = pytest.importorskip("torch")

import cupy_msda
from cupy_msda import validate
from cupy_msda.torch import decomposed, ms_deform_attn, ms_deform_attn_fused
from tests.helpers.torch_calls import DEVICES

pytestmark = pytest.mark.sanitizer

CASE = Case("fused", levels=((6, 7), (3, 4)), N=2, M=2, D=8, P=3)
FORMS = list(itertools.product((2, 4), (None, 1), (False, True)))


def tensors(device, dtype="float64", seed=0, **form):
    """Shapes, then value, references, offsets and logits as leaves, and the gradient of the output."""
    inputs = cases.to_fused(CASE.inputs(dtype, seed=seed), **form, seed=seed)
    put = TorchBackend(device).put
    leaves = [put(array) for array in (inputs.value, inputs.references, inputs.locations, inputs.weights)]
    leaves = [leaf.requires_grad_() for leaf in leaves if leaf is not None]
    return put(inputs.shapes), leaves, put(inputs.grad_output)


def locations_and_weights(shapes, references, offsets, logits=None):
    """As Deformable DETR's module computes them."""
    if logits is None:
        K = offsets.shape[-1] // 3
        L = shapes.shape[0]
        offsets, logits = offsets[..., : 2 * K], offsets[..., 2 * K :]
        offsets, logits = offsets.unflatten(-1, (L, K // L, 2)), logits.unflatten(-1, (L, K // L))
    points = references[:, :, None, :, None]
    if references.shape[-1] == 2:
        locations = points + offsets / shapes.flip(-1)[:, None]
    else:
        locations = points[..., :2] + offsets / offsets.shape[-2] * points[..., 2:] * 0.5
    return locations, logits.flatten(-2).softmax(-1).view(logits.shape)


def attend(shapes, value, *samples, **options):
    return ms_deform_attn_fused(value, shapes, None, *samples, **options)


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("device", DEVICES)
def test_output_and_gradients_are_those_of_the_plain_operator(device, form):
    shapes, leaves, grad = tensors(device, coordinates=form[0], levels=form[1], packed=form[2])
    output = attend(shapes, *leaves)
    want = ms_deform_attn(leaves[0], shapes, None, *locations_and_weights(shapes, *leaves[1:]))
    torch.testing.assert_close(output, want)
    for got, other in zip(
        torch.autograd.grad(output, leaves, grad), torch.autograd.grad(want, leaves, grad), strict=True
    ):
        torch.testing.assert_close(got, other)


@pytest.mark.parametrize("device", DEVICES)
def test_only_the_gradients_that_are_asked_for_are_computed(device):
    shapes, leaves, grad = tensors(device, coordinates=4)
    every = torch.autograd.grad(attend(shapes, *leaves), leaves, grad)
    for index, leaf in enumerate(leaves):
        inputs = [other.detach() for other in leaves]
        inputs[index] = leaf
        (got,) = torch.autograd.grad(attend(shapes, *inputs), [leaf], grad)
        torch.testing.assert_close(got, every[index])


@pytest.mark.parametrize("packed", [False, True])
def test_gradients_agree_with_finite_differences(packed):
    shapes, leaves, _ = tensors("cpu", packed=packed, coordinates=4)
    leaves = [
        leaf[:1, :2].detach().requires_grad_() if i else leaf[:1].detach().requires_grad_()
        for i, leaf in enumerate(leaves)
    ]
    torch.autograd.gradcheck(lambda *a: attend(shapes, *a), leaves, fast_mode=True)
    torch.autograd.gradgradcheck(lambda *a: attend(shapes, *a), leaves, fast_mode=True)


@pytest.mark.parametrize("packed", [False, True])
def test_compiles_in_one_graph(packed):
    shapes, leaves, grad = tensors("cpu", packed=packed)
    compiled = torch.compile(lambda *a: attend(shapes, *a) * 2, backend="aot_eager", fullgraph=True)
    want = attend(shapes, *leaves) * 2
    got = compiled(*leaves)
    torch.testing.assert_close(got, want)
    for one, other in zip(torch.autograd.grad(got, leaves, grad), torch.autograd.grad(want, leaves, grad), strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("packed", [False, True])
def test_opcheck(packed):
    shapes, leaves, _ = tensors("cpu", packed=packed)
    samples = (*leaves, None)[1:4]
    arguments = (leaves[0], shapes, None, *samples, 64, None, None, "bilinear", "zeros", False, None, None)
    torch.library.opcheck(torch.ops.cupy_msda.ms_deform_attn_fused.default, arguments)


@pytest.mark.parametrize("packed", [False, True])
def test_the_operator_takes_level_sizes_as_numbers(packed):
    shapes, leaves, _ = tensors("cpu", packed=packed)
    operator, sizes = torch.ops.cupy_msda.ms_deform_attn_fused.default, shapes.flatten().tolist()
    settings = (64, None, None, "bilinear", "zeros", False, None, sizes)
    samples = (*leaves, None)[1:4]
    torch.testing.assert_close(operator(leaves[0], None, None, *samples, *settings), attend(shapes, *leaves))
    torch.library.opcheck(operator, (leaves[0], None, None, *samples, *settings))
    few = [(leaf[:1] if i == 0 else leaf[:1, :2]).detach().requires_grad_() for i, leaf in enumerate(leaves)]

    def call(value, *samples):
        return operator(value, None, None, *(*samples, None)[:3], *settings)

    assert torch.autograd.gradgradcheck(call, few, fast_mode=True)


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_with_level_sizes_as_numbers(dynamic):
    torch._dynamo.reset()
    _, leaves, grad = tensors("cpu")
    compiled = torch.compile(Net(), backend="aot_eager", fullgraph=True, dynamic=dynamic)
    got, want = compiled(*leaves), Net()(*leaves)
    torch.testing.assert_close(got, want)
    for one, other in zip(torch.autograd.grad(got, leaves, grad), torch.autograd.grad(want, leaves, grad), strict=True):
        torch.testing.assert_close(one, other)
    torch._dynamo.reset()


def test_autocast_takes_references_in_float32():
    shapes, (value, references, offsets, logits), _ = tensors("cpu", "float32")
    half = value.to(torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        output = attend(shapes, half, references.double(), offsets.to(torch.bfloat16), logits)
    assert output.dtype is torch.bfloat16
    torch.testing.assert_close(output.float(), attend(shapes, value, references, offsets, logits), rtol=0.05, atol=0.05)


def test_nearest_refuses_gradients_of_references_and_offsets():
    shapes, (value, references, offsets, logits), _ = tensors("cpu")
    with pytest.raises(ValueError, match="sampling_offsets: expected a tensor that requires no gradient"):
        attend(shapes, value, references.detach(), offsets, logits, interpolation="nearest")
    attend(shapes, value, references.detach(), offsets.detach(), logits, interpolation="nearest").sum().backward()
    assert logits.grad.abs().sum() > 0


def test_an_argument_that_is_no_tensor_is_refused_by_name():
    shapes, (value, _, offsets, logits), _ = tensors("cpu")
    with pytest.raises(TypeError, match=r"reference_points: expected a torch\.Tensor, got list"):
        attend(shapes, value, [0.5], offsets, logits)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("form", FORMS, ids=str)
def test_transforms_of_torch_func_agree_with_autograd(device, form):
    shapes, leaves, _ = tensors(device, coordinates=form[0], levels=form[1], packed=form[2])
    leaves = [leaf.detach() for leaf in leaves]

    def loss(*inputs):
        return attend(shapes, *inputs).square().sum()

    every = tuple(range(len(leaves)))
    got = torch.func.grad(loss, every)(*leaves)
    inputs = [leaf.clone().requires_grad_() for leaf in leaves]
    want = torch.autograd.grad(loss(*inputs), inputs)
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(one, other)

    stacks = [torch.stack((leaf, leaf * 0.7)) for leaf in leaves]
    dims = (0, *(None,) * (len(leaves) - 2), 0)
    mapped = [stack if dim == 0 else leaf for stack, leaf, dim in zip(stacks, leaves, dims, strict=True)]
    got = torch.vmap(torch.func.grad(loss, every), dims)(*mapped)
    for index in range(2):
        chosen = [tensor[index] if dim == 0 else tensor for tensor, dim in zip(mapped, dims, strict=True)]
        for one, other in zip(got, torch.func.grad(loss, every)(*chosen), strict=True):
            torch.testing.assert_close(one[index], other)


def test_mapped_metadata_is_refused():
    shapes, (value, *samples), _ = tensors("cpu")
    with pytest.raises(ValueError, match="spatial_shapes, level_start_index: expected the same for every sample"):
        torch.vmap(lambda s: attend(s, value, *samples))(torch.stack((shapes, shapes)))


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_decomposed_calls_agree_with_the_operator(form):
    shapes, leaves, grad = tensors("cpu", coordinates=form[0], levels=form[1], packed=form[2])
    output = attend(shapes, *leaves)
    with decomposed():
        other = attend(shapes, *leaves)
    torch.testing.assert_close(other, output)
    for one, two in zip(
        torch.autograd.grad(other, leaves, grad), torch.autograd.grad(output, leaves, grad), strict=True
    ):
        torch.testing.assert_close(one, two)


class Net(torch.nn.Module):
    """The operator with level sizes as constants."""

    def forward(self, value, references, *samples):
        return ms_deform_attn_fused(value, CASE.levels, None, references, *samples)


@pytest.mark.parametrize("packed", [False, True])
def test_export_keeps_the_operator_and_serves_other_sizes(packed):
    _, leaves, _ = tensors("cpu", packed=packed)
    inputs = tuple(leaf.detach() for leaf in leaves)
    Q = torch.export.Dim("Q", max=1000)
    program = torch.export.export(Net(), inputs, dynamic_shapes=({}, {1: Q}, ({1: Q},) * (len(inputs) - 2)))
    assert any(node.target is torch.ops.cupy_msda.ms_deform_attn_fused.default for node in program.graph.nodes)
    more = (inputs[0], *(torch.cat((tensor, tensor.flip(1)), 1) for tensor in inputs[1:]))
    torch.testing.assert_close(program.module()(*more), Net()(*more))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("dynamo", [True, False], ids=["torch.export", "TorchScript"])
@pytest.mark.parametrize("packed", [False, True])
def test_onnx_runtime_gives_the_same_numbers(tmp_path, dynamo, packed):
    _, leaves, _ = tensors("cpu", "float32", packed=packed, coordinates=4)
    inputs, path = tuple(leaf.detach() for leaf in leaves), tmp_path / "net.onnx"
    torch.onnx.export(Net().eval(), inputs, path, dynamo=dynamo, opset_version=18, verbose=False)
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    named = {entry.name: tensor.numpy() for entry, tensor in zip(session.get_inputs(), inputs, strict=True)}
    torch.testing.assert_close(torch.from_numpy(session.run(None, named)[0]), Net()(*inputs), rtol=1e-4, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "bfloat16"])
@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("numbers", [False, True])
def test_a_repeated_call_is_neither_validated_nor_planned_again(monkeypatch, dtype, form, numbers):
    form = dict(zip(("coordinates", "levels", "packed"), form, strict=True))
    shapes, leaves, grad = tensors("cuda", dtype, **form)
    starts = torch.tensor([0, 42], device="cuda")
    metadata = ([list(level) for level in CASE.levels], None) if numbers else (shapes, starts)

    def results(inputs, metadata, grad):
        output = ms_deform_attn_fused(inputs[0], *metadata, *inputs[1:])
        return output, *torch.autograd.grad(output, inputs, grad)

    results(leaves, metadata, grad)
    results(leaves, metadata, grad)
    _, others, grad = tensors("cuda", dtype, seed=1, **form)
    want = results(others, (shapes.cpu(), None), grad)
    monkeypatch.setattr(validate, "read", None)
    got = results(others, metadata, grad)
    with torch.no_grad():
        got = (*got, ms_deform_attn_fused(others[0], *metadata, *others[1:]))
    tolerance = 1e-2 if dtype.endswith("16") else 1e-5
    for one, other in zip(got, (*want, want[0]), strict=True):
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)


@pytest.mark.gpu
def test_validate_reads_metadata_on_the_gpu_and_raises():
    shapes, (value, *samples), _ = tensors("cuda", "float32")
    attend(shapes, value, *samples, validate=True)
    shapes[1, 0] = 400
    assert attend(shapes, value, *samples).isnan().any()
    with pytest.raises(ValueError, match=r"spatial_shapes|level_start_index"):
        attend(shapes, value, *samples, validate=True)


@pytest.mark.gpu
@pytest.mark.parametrize("packed", [False, True])
def test_an_unaligned_or_strided_tensor_takes_the_general_path(packed):
    shapes, leaves, _ = tensors("cuda", "float32", packed=packed)
    leaves = [leaf.detach() for leaf in leaves]
    want = attend(shapes, *leaves)
    attend(shapes, *leaves)
    for index, leaf in enumerate(leaves):
        buffer = torch.empty(leaf.numel() + 1, device="cuda")
        buffer[1:] = leaf.flatten()
        unaligned = [*leaves[:index], buffer[1:].view(leaf.shape), *leaves[index + 1 :]]
        torch.testing.assert_close(attend(shapes, *unaligned), want)
        strided = torch.stack((leaf, leaf), -1)[..., 0]
        torch.testing.assert_close(attend(shapes, *leaves[:index], strided, *leaves[index + 1 :]), want)


@pytest.mark.no_sanitizer
@pytest.mark.gpu
def test_first_call_inside_a_capture_works_after_warmup():
    sizes = cupy_msda.Sizes(CASE.levels, N=2, Q=7, M=2, D=8, P=5, reference_coordinates=4)
    inputs = [torch.rand(shape, device="cuda") for shape in ((2, 54, 2, 8), (2, 7, 2, 4), (2, 7, 2, 2, 5, 2))]
    inputs.append(torch.rand(2, 7, 2, 2, 5, device="cuda"))
    shapes = torch.tensor(CASE.levels, device="cuda")
    with pytest.raises(RuntimeError, match=r"cupy_msda\.warmup"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        attend(shapes, *inputs)
    torch.cuda.synchronize()
    assert cupy_msda.warmup(sizes) > 0
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = attend(shapes, *inputs)
    graph.replay()
    torch.testing.assert_close(output, attend(shapes, *inputs), rtol=0, atol=0)
