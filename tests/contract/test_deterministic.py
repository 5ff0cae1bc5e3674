"""With deterministic=True, grad_value has the same bits in every run on a GPU, for every dtype and kernel."""

import numpy as np
import pytest

import cupy_msda
from cupy_msda.call import ALL
from cupy_msda.cuda import plan_backward
from tests.helpers import cases
from tests.helpers.backends import TorchBackend
from tests.helpers.cases import DTYPE_PAIRS, SMALL_CASES, VARIANTS, Case
from tests.helpers.tolerance import assert_close

pytestmark = [pytest.mark.gpu, pytest.mark.sanitizer]
BACKEND = TorchBackend("cuda")

# Few and many samples per pixel: a warp and a block per bucket.
LARGE = (
    Case("few samples", levels=((64, 90), (32, 45)), N=2, M=8, D=32, P=4, queries=100),
    Case("many samples", levels=((40, 50), (20, 25)), N=2, M=8, D=32, P=4, queries=None),
)


def gradients(put, case, deterministic=True):
    grads = cupy_msda.ms_deform_attn_backward(*put, 64, deterministic=deterministic, **case.variant)
    return [BACKEND.get(grad) for grad in grads]


def bits(array):
    return np.ascontiguousarray(array).view(np.uint8)


@pytest.mark.parametrize("pair", DTYPE_PAIRS, ids="-".join)
@pytest.mark.parametrize("case", SMALL_CASES + VARIANTS, ids=str)
def test_same_bits_again_and_close_to_the_reference(case, pair):
    inputs = case.inputs(*pair)
    put = [BACKEND.put(array) for array in inputs]
    want = cases.expected(inputs, **case.variant)[1]
    first = gradients(put, case)
    assert_close(first[0], want[0], pair[0], "grad_value")
    again = gradients(put, case)
    for one, other in zip(first, again, strict=True):
        np.testing.assert_array_equal(bits(one), bits(other))


@pytest.mark.parametrize("D", [1, 3, 30, 33, 64, 71, 128, 256, 1025])
@pytest.mark.parametrize("queries", [4, 90], ids=["few", "many"])
def test_every_channel_count_agrees_with_the_reference(D, queries):
    case = Case(f"D{D}", levels=((14, 15), (2, 3)), N=1, M=2, D=D, queries=queries)
    inputs = case.inputs()
    got = gradients([BACKEND.put(array) for array in inputs], case)
    assert_close(got[0], cases.expected(inputs)[1][0], "float32", "grad_value")


@pytest.mark.no_sanitizer
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("where", ["local", "one pixel", "outside"])
@pytest.mark.parametrize("case", LARGE, ids=str)
def test_same_bits_in_fifty_runs_on_a_busy_gpu(case, where, dtype):
    torch = pytest.importorskip("torch")

    inputs = case.inputs(dtype, seed=3)
    if where != "local":
        inputs.locations[:] = 0.4 if where == "one pixel" else 3
    put = [BACKEND.put(array) for array in inputs]
    first = cupy_msda.ms_deform_attn_backward(*put, 64, deterministic=True)
    busy, stream = torch.cuda.Stream(), torch.cuda.Stream()
    work = torch.randn(2048, 2048, device="cuda")
    torch.cuda.synchronize()
    for repeat in range(50):
        with torch.cuda.stream(busy):
            work @ work
        with torch.cuda.stream(stream if repeat % 2 else torch.cuda.current_stream()):
            again = cupy_msda.ms_deform_attn_backward(*put, 64, deterministic=True)
        torch.cuda.synchronize()
        assert all(torch.equal(one, other) for one, other in zip(first, again, strict=True))


def test_workspace_limits_do_not_change_the_bits(monkeypatch):
    from cupy_msda.cuda import run as cuda

    case = LARGE[1]
    put = [BACKEND.put(array) for array in case.inputs(seed=4)]
    one = gradients(put, case)
    monkeypatch.setattr(plan_backward, "WORKSPACE", 1 << 22)
    monkeypatch.setattr(cuda, "_prepared", {})
    np.testing.assert_array_equal(bits(gradients(put, case)[0]), bits(one[0]))


@pytest.mark.no_sanitizer
@pytest.mark.parametrize("case", LARGE, ids=str)
def test_captured_backward_gives_the_same_bits(case):
    torch = pytest.importorskip("torch")

    put = [BACKEND.put(array) for array in case.inputs(seed=8)]
    want = cupy_msda.ms_deform_attn_backward(*put, 64, deterministic=True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = cupy_msda.ms_deform_attn_backward(*put, 64, deterministic=True)
    for _ in range(2):
        graph.replay()
        torch.cuda.synchronize()
        assert all(torch.equal(one, other) for one, other in zip(got, want, strict=True))


@pytest.mark.parametrize("wanted", [ALL, *cases.PARTIAL_GRADIENTS], ids=cases.gradient_names)
@pytest.mark.parametrize("deterministic", [True, False])
@pytest.mark.parametrize("case", LARGE, ids=str)
def test_only_wanted_gradients_are_computed(case, deterministic, wanted):
    torch = pytest.importorskip("torch")

    from cupy_msda.torch import ms_deform_attn

    put = [BACKEND.put(array) for array in case.inputs(seed=5)]
    all_three = cupy_msda.ms_deform_attn_backward(*put, 64, deterministic=True)
    leaves = [leaf.requires_grad_(asked) for leaf, asked in zip((put[0], *put[3:5]), wanted[:3], strict=True)]
    output = ms_deform_attn(leaves[0], *put[1:3], *leaves[1:], deterministic=deterministic)
    output.backward(put[5])
    for leaf, want in zip(leaves, all_three, strict=True):
        if leaf.requires_grad:
            torch.testing.assert_close(leaf.grad, want, rtol=1e-4, atol=1e-4)
        else:
            assert leaf.grad is None


def test_torchs_switch_is_followed(monkeypatch):
    torch = pytest.importorskip("torch")

    from cupy_msda.cuda import run as cuda
    from cupy_msda.torch import ms_deform_attn

    asked = []
    prepare = cuda.prepare_backward
    monkeypatch.setattr(
        cuda, "prepare_backward", lambda found, *a: asked.append(found.deterministic) or prepare(found, *a)
    )
    put = [BACKEND.put(array) for array in LARGE[1].inputs(seed=6)]
    value = put[0].requires_grad_()

    def gradient(**options):
        return torch.autograd.grad(ms_deform_attn(value, *put[1:5], **options), value, put[5])[0]

    for _ in range(2):  # the first call of a layout, and a repeated one
        gradient()
    try:
        torch.use_deterministic_algorithms(True)
        first = gradient()
        assert (asked[0], asked[-1]) == (False, True)
        for _ in range(5):
            assert torch.equal(gradient(), first)
        gradient(deterministic=False)
        assert asked[-1] is False
    finally:
        torch.use_deterministic_algorithms(False)
    assert torch.equal(gradient(deterministic=True), first)


# Sums of the chunks that there may be: 3 / 2 times, twice, 512 of 64 value vectors of 32 channels in float32.
SUMS_OF_CHUNKS = 13 << 20


@pytest.mark.no_sanitizer
def test_temporary_memory_is_bounded():
    torch = pytest.importorskip("torch")

    case = LARGE[1]
    put = [BACKEND.put(array) for array in case.inputs(seed=7)]
    for deterministic in (False, True):
        cupy_msda.ms_deform_attn_backward(*put, 64, deterministic=deterministic)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        grads = cupy_msda.ms_deform_attn_backward(*put, 64, deterministic=deterministic)
        extra = torch.cuda.max_memory_allocated() - before - sum(g.numel() * g.element_size() for g in grads)
        samples = put[4].numel()
        assert extra <= (32 * samples * 1.2 + SUMS_OF_CHUNKS if deterministic else 1 << 20)
        assert extra <= plan_backward.WORKSPACE + (1 << 20)
