"""The registered operators: what opcheck, torch.compile, torch.export, autocast and torch.func ask of them."""

import io

import pytest
import torch

from cupy_msda.torch import ms_deform_attn
from tests.helpers import cases
from tests.helpers.cases import CASES
from tests.helpers.tolerance import TOLERANCE, assert_close
from tests.helpers.torch_calls import (
    DEVICES,
    LEVELS,
    assert_same,
    backward_operator,
    between_other_operations,
    forward_operator,
    results,
    tensors,
)

# Exported programs that users have saved hold these names and schemas.
INPUTS = (
    "Tensor value, Tensor? spatial_shapes, Tensor? level_start_index, Tensor sampling_locations, "
    "Tensor attention_weights, int im2col_step"
)
FUSED_INPUTS = (
    "Tensor value, Tensor? spatial_shapes, Tensor? level_start_index, Tensor reference_points, "
    "Tensor sampling_offsets, Tensor? attention_logits, int im2col_step, bool? deterministic, int[]? num_points, "
    "str interpolation, str padding_mode, bool align_corners, Tensor? query_lengths, SymInt[]? level_sizes"
)
VARIANT = (
    'int[]? num_points=None, str interpolation="bilinear", str padding_mode="zeros", bool align_corners=False, '
    "Tensor? query_lengths=None, SymInt[]? level_sizes=None"
)
SCHEMAS = {
    "ms_deform_attn": f"({INPUTS}=64, bool? deterministic=None, {VARIANT}) -> Tensor",
    "ms_deform_attn_backward": (
        f"(Tensor grad_output, {INPUTS}, bool? deterministic, bool[3] output_mask, {VARIANT}) "
        "-> (Tensor, Tensor, Tensor)"
    ),
    "ms_deform_attn_fused": f"({FUSED_INPUTS}) -> Tensor",
    "ms_deform_attn_fused_backward": (
        f"(Tensor grad_output, {FUSED_INPUTS}, bool[4] output_mask) -> (Tensor, Tensor, Tensor, Tensor)"
    ),
}


@pytest.mark.parametrize("name", SCHEMAS)
def test_schemas_are_those_of_saved_programs(name):
    assert str(getattr(torch.ops.cupy_msda, name).default._schema) == f"cupy_msda::{name}{SCHEMAS[name]}"


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("starts", [True, False], ids=["starts", "contiguous"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_opcheck_forward(device, starts, dtype):
    *inputs, _ = tensors(device, dtype, torch.float32, starts=starts)
    torch.library.opcheck(forward_operator, (*inputs, 64, None))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("mask", [(True, True, True), (True, False, False), (False, False, True)], ids=str)
def test_opcheck_backward(device, mask):
    *inputs, grad_output = tensors(device, starts=True)
    # CUDA sums in no fixed order: the second run may differ in the last bit.
    torch.library.opcheck(
        backward_operator, (grad_output.requires_grad_(), *inputs, 64, None, mask), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("device", DEVICES)
def test_operator_agrees_with_the_function(device):
    arguments = tensors(device)
    assert_same(
        results(lambda *a: forward_operator(*a, 64, None), arguments), results(ms_deform_attn, arguments), rtol=1e-6
    )


@pytest.mark.parametrize("mask", [(True, False, False), (False, True, False), (False, False, False)], ids=str)
def test_backward_operator_leaves_out_what_the_mask_leaves_out(mask):
    *inputs, grad_output = tensors("cpu", requires_grad=False)
    grads = backward_operator(grad_output, *inputs, 64, None, mask)
    sizes = [tensor.numel() * wanted for tensor, wanted in zip((inputs[0], *inputs[3:]), mask, strict=True)]
    assert [grad.numel() for grad in grads] == sizes


def test_fake_operator_names_the_wrong_shape():
    value, shapes, starts, locations, weights, _ = tensors("cpu", requires_grad=False)
    meta = [None if t is None else t.to("meta") for t in (value, shapes, starts, locations[:, :, :1], weights)]
    with pytest.raises(RuntimeError, match=r"sampling_locations: expected shape \[N, Q, M, L, P, 2\]"):
        forward_operator(*meta, 64, None)
    with pytest.raises(RuntimeError, match=r"value: expected shape \[N, S, M, D\]"):
        forward_operator(meta[0][0], *meta[1:], 64, None)


@pytest.fixture
def fresh_compiler():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
@pytest.mark.usefixtures("fresh_compiler")
def test_compiled_code_gives_the_same_numbers(device, dynamic, mode):
    arguments = tensors(device, starts=True)
    compiled = torch.compile(between_other_operations, fullgraph=True, dynamic=dynamic, mode=mode)
    want = results(between_other_operations, arguments)
    for _ in range(3):  # reduce-overhead warms up, records, replays
        assert_same([r.clone() for r in results(compiled, arguments)], want)
    with torch.no_grad():
        for _ in range(3):
            assert_same([compiled(*arguments[:5]).clone()], want[:1])
    if device == "cuda":  # CUDA graphs hold all of it: nothing made the compiler give them up
        assert not torch._dynamo.utils.counters["inductor"]["cudagraph_skips"]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.usefixtures("fresh_compiler")
def test_dynamic_compilation_serves_other_sizes(device):
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(between_other_operations, fullgraph=True, dynamic=True, backend=counter)
    for queries, levels in ((5, LEVELS), (9, LEVELS), (7, ((8, 5), (4, 3))), (30, ((10, 12), (2, 9)))):
        arguments = tensors(device, queries=queries, levels=levels, starts=True)
        assert_same(results(compiled, arguments), results(between_other_operations, arguments))
    assert counter.frame_count == 1


def with_numbers(device, **sizes):
    """Arguments with level sizes as numbers."""
    value, shapes, _, locations, weights, grad_output = tensors(device, **sizes)
    return value, shapes.tolist(), None, locations, weights, grad_output


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
@pytest.mark.usefixtures("fresh_compiler")
def test_compiled_code_takes_level_sizes_as_numbers(device, mode):
    arguments = with_numbers(device)
    compiled = torch.compile(between_other_operations, fullgraph=True, mode=mode)
    want = results(between_other_operations, arguments)
    for _ in range(3):
        assert_same([r.clone() for r in results(compiled, arguments)], want)
    if device == "cuda":
        assert not torch._dynamo.utils.counters["inductor"]["cudagraph_skips"]


@pytest.mark.usefixtures("fresh_compiler")
def test_numbers_become_no_tensor_of_compiled_code():
    graphs = []

    def keep(graph, _):
        graphs.append(graph)
        return graph

    arguments = with_numbers("cpu")
    torch.compile(between_other_operations, fullgraph=True, backend=keep)(*arguments[:5])
    (graph,) = graphs
    called = [node.target for node in graph.graph.nodes if node.op == "call_function"]
    assert forward_operator in called
    assert not {torch.as_tensor, torch.tensor} & set(called)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.usefixtures("fresh_compiler")
def test_dynamic_compilation_serves_other_numbers(device):
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(between_other_operations, fullgraph=True, dynamic=True, backend=counter)
    for queries, levels in ((5, LEVELS), (9, ((8, 5), (4, 3))), (30, ((10, 12), (2, 9)))):
        arguments = with_numbers(device, queries=queries, levels=levels)
        assert_same(results(compiled, arguments), results(between_other_operations, arguments))
    assert counter.frame_count == 1


@pytest.mark.parametrize("device", DEVICES)
def test_the_operator_takes_level_sizes_as_numbers(device):
    value, shapes, _, locations, weights, _ = tensors(device, torch.float64, starts=False)
    sizes = [size for level in shapes.tolist() for size in level]
    arguments = (value, None, None, locations, weights, 64, None, None, "bilinear", "zeros", False, None, sizes)
    torch.testing.assert_close(forward_operator(*arguments), ms_deform_attn(value, shapes, None, locations, weights))
    torch.library.opcheck(forward_operator, arguments)
    few = [t.detach().requires_grad_() for t in (value[:1], locations[:1, :2], weights[:1, :2])]

    def call(value, locations, weights):
        return forward_operator(value, None, None, locations, weights, *arguments[5:])

    assert torch.autograd.gradgradcheck(call, few, fast_mode=True)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.usefixtures("fresh_compiler")
def test_compiled_code_follows_autocast(device):
    value, shapes, starts, locations, weights, _ = tensors(device, torch.bfloat16, torch.float32, requires_grad=False)

    def step(weights):
        with torch.autocast(device, torch.bfloat16):
            return ms_deform_attn(value, shapes, starts, locations, weights)

    mixed = weights.bfloat16()
    output = torch.compile(step, fullgraph=True, backend="aot_eager")(mixed)
    torch.testing.assert_close(output, step(mixed), rtol=0, atol=0)


class Module(torch.nn.Module):
    def forward(self, value, shapes, starts, locations, weights):
        return between_other_operations(value, shapes, starts, locations, weights)


@pytest.mark.parametrize("device", DEVICES)
def test_an_exported_program_serves_other_sizes(device):
    *inputs, _ = tensors(device, requires_grad=False, starts=True)
    N, Q = torch.export.Dim("N", max=64), torch.export.Dim("Q", max=100000)
    dynamic = ({0: N}, {}, {}, {0: N, 1: Q}, {0: N, 1: Q})
    program = torch.export.export(Module(), tuple(inputs), dynamic_shapes=dynamic)
    assert any(node.target is forward_operator for node in program.graph.nodes)
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    loaded = torch.export.load(file).module()
    *other, _ = tensors(device, requires_grad=False, starts=True, N=3, queries=11, seed=1)
    assert_same([loaded(*other)], [between_other_operations(*other)])


@pytest.mark.parametrize("device", DEVICES)
def test_torch_func_grad_differentiates_a_functional_call(device):
    class Scaled(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = torch.nn.Parameter(torch.tensor(2.0))

        def forward(self, value, *others):
            return ms_deform_attn(value * self.scale, *others)

    *inputs, _ = tensors(device, requires_grad=False)
    module = Scaled().to(device)

    def loss(parameters):
        return torch.func.functional_call(module, parameters, tuple(inputs)).square().sum()

    have = torch.func.grad(loss)({"scale": torch.tensor(3.0, device=device)})["scale"]
    want = 2 * 3.0 * ms_deform_attn(*inputs).square().sum()
    torch.testing.assert_close(have, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("in_dims", [(0, 0, 0), (0, None, None), (None, 1, 0)], ids=str)
def test_vmap_agrees_with_a_loop(device, in_dims):
    value, shapes, starts, locations, weights, _ = tensors(device, requires_grad=False)
    stack = [
        tensor if dim is None else torch.stack((tensor, tensor.flip(0), tensor * 0.5), dim)
        for tensor, dim in zip((value, locations, weights), in_dims, strict=True)
    ]

    def call(value, locations, weights):
        return ms_deform_attn(value, shapes, starts, locations, weights)

    def pick(index):
        return [t if dim is None else t.select(dim, index) for t, dim in zip(stack, in_dims, strict=True)]

    have = torch.vmap(call, in_dims)(*stack)
    assert_same([have], [torch.stack([call(*pick(index)) for index in range(3)])])

    def value_grad(*mapped):
        return torch.func.grad(lambda v: call(v, *mapped[1:]).square().sum())(mapped[0])

    have = torch.vmap(value_grad, in_dims)(*stack)
    assert_same([have], [torch.stack([value_grad(*pick(index)) for index in range(3)])])


def test_vmap_over_metadata_is_refused():
    value, shapes, _, locations, weights, _ = tensors("cpu", requires_grad=False)
    with pytest.raises(ValueError, match=r"spatial_shapes, level_start_index: expected the same"):
        torch.vmap(lambda s: ms_deform_attn(value, s, None, locations, weights))(torch.stack((shapes, shapes)))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("location_dtype", [None, torch.float32], ids=["same", "float32"])
@pytest.mark.parametrize("weight_dtype", [None, torch.float32], ids=["same", "float32"])
def test_autocast_harmonises_dtypes(device, dtype, location_dtype, weight_dtype):
    value, shapes, starts, locations, weights, grad_output = tensors(device, dtype, torch.float32)
    mixed = [
        t.detach().to(d or dtype).requires_grad_() for t, d in ((locations, location_dtype), (weights, weight_dtype))
    ]
    with torch.autocast(device, dtype):
        output = ms_deform_attn(value, shapes, starts, *mixed)
    grads = torch.autograd.grad(output, (value, *mixed), grad_output)
    assert output.dtype == dtype
    assert [g.dtype for g in grads] == [dtype, location_dtype or dtype, weight_dtype or dtype]
    exact = [t.detach().double() for t in (value, *mixed)]
    want = ms_deform_attn(exact[0], shapes, starts, *exact[1:])
    assert_close(output.detach().cpu().double().numpy(), want.cpu().numpy(), str(dtype).removeprefix("torch."))


@pytest.mark.parametrize("device", DEVICES)
def test_mixed_dtypes_without_autocast_are_refused(device):
    value, shapes, starts, locations, weights, _ = tensors(device, torch.float16, torch.float32)
    with pytest.raises(TypeError, match="attention_weights: expected the dtype of sampling_locations"):
        ms_deform_attn(value, shapes, starts, locations, weights.half())


@pytest.mark.parametrize("device", DEVICES)
def test_training_with_a_gradient_scaler_lowers_the_loss(device):
    torch.manual_seed(0)
    value, shapes, starts, locations, weights, _ = tensors(device, requires_grad=False)
    projection = torch.nn.Linear(8, 8).to(device)
    optimizer = torch.optim.SGD(projection.parameters(), lr=1.0)
    scaler = torch.amp.GradScaler(device, init_scale=2.0**10)
    losses = []
    for _ in range(8):
        with torch.autocast(device, torch.float16):
            projected = projection(value)
            assert projected.dtype == torch.float16
            output = ms_deform_attn(projected, shapes, starts, locations, weights)
            loss = (output.float() - 1).square().mean()
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]
    assert scaler.get_scale() == 2.0**10


def test_profiler_sees_the_operator():
    *inputs, _ = tensors("cpu", requires_grad=False)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        ms_deform_attn(*inputs)
    assert "cupy_msda::ms_deform_attn" in {event.key for event in profile.key_averages()}


def test_subclasses_and_modes_see_the_operator():
    class Recorder(torch.utils._python_dispatch.TorchDispatchMode):
        seen = ()

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.seen += (str(func),)
            return func(*args, **(kwargs or {}))

    *inputs, _ = tensors("cpu", requires_grad=False)
    with Recorder() as recorder:
        ms_deform_attn(*inputs)
    assert "cupy_msda.ms_deform_attn.default" in recorder.seen


@pytest.mark.parametrize("case", CASES[:3], ids=str)
def test_the_operator_agrees_with_the_reference(case):
    inputs = case.inputs("float64")
    put = [None if a is None else torch.from_numpy(a) for a in inputs]
    output = forward_operator(*put[:5], 64, None)
    assert TOLERANCE["float64"] < 1e-10
    assert_close(output.numpy(), cases.expected(inputs)[0], "float64")
