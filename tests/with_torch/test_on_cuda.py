"""The torch operator on a GPU: repeated calls, CUDA graphs, streams, threads, memory, a second GPU."""

import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

import cupy_msda
from cupy_msda import validate
from cupy_msda.torch import ms_deform_attn
from tests.helpers.torch_calls import LEVELS, assert_same, results, tensors

pytestmark = [pytest.mark.gpu, pytest.mark.sanitizer]


def overwrite(arguments, seed=7):
    """Other numbers in the same tensors."""
    other = tensors("cuda", arguments[0].dtype, arguments[3].dtype, seed=seed)
    with torch.no_grad():
        for index in (0, 3, 4, 5):
            arguments[index].copy_(other[index])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("metadata", ["tensors", "numbers"])
def test_a_repeated_call_is_neither_validated_nor_planned_overwrite(monkeypatch, dtype, metadata):
    arguments = list(tensors("cuda", dtype, starts=True))
    if metadata == "numbers":
        arguments[1:3] = [list(map(list, LEVELS)), None]
    results(ms_deform_attn, arguments)
    results(ms_deform_attn, arguments)
    overwrite(arguments)
    want = results(lambda v, s, f, x, w: ms_deform_attn(v, torch.tensor(LEVELS), None, x, w), arguments)
    monkeypatch.setattr(validate, "read", None)
    have = results(ms_deform_attn, arguments)
    with torch.no_grad():
        have.append(ms_deform_attn(*arguments[:5]))
    assert_same(have, [*want, want[0]], rtol=1e-5 if dtype.itemsize > 2 else 1e-2)


@pytest.mark.parametrize("offset", [0, 1, 4])
def test_an_unaligned_tensor_takes_the_general_path(offset):
    arguments = list(tensors("cuda", requires_grad=False))
    want = ms_deform_attn(*arguments[:5])
    ms_deform_attn(*arguments[:5])
    for index in (0, 3, 4):
        tensor = arguments[index]
        buffer = torch.empty(tensor.numel() + offset, device="cuda")
        buffer[offset:] = tensor.flatten()
        arguments[index] = buffer[offset:].view(tensor.shape).requires_grad_()
    assert_same(results(ms_deform_attn, arguments)[:1], [want], rtol=1e-6)


def test_strides_and_other_metadata_are_another_layout():
    arguments = list(tensors("cuda", requires_grad=False, starts=True))
    want = ms_deform_attn(*arguments[:5])
    value, shapes, starts, locations, weights, _ = arguments
    strided = value.transpose(1, 2).contiguous().transpose(1, 2)
    assert_same([ms_deform_attn(strided, *arguments[1:5])], [want], rtol=0)
    assert_same([ms_deform_attn(value, shapes.int(), starts.int(), locations, weights)], [want], rtol=0)
    assert_same([ms_deform_attn(value, shapes.cpu(), starts.cpu(), locations, weights)], [want], rtol=0)
    wide = shapes.repeat(1, 2)[:, ::2].flip(1)  # [H, H] and so on, by strides
    assert_same([ms_deform_attn(value, shapes.T.contiguous().T, starts, locations, weights)], [want], rtol=0)
    assert wide.shape == shapes.shape
    with pytest.raises(ValueError, match="spatial_shapes: expected"):
        ms_deform_attn(value, [[60, 70], [3, 4]], None, locations, weights)


def test_the_plan_cache_forgets_when_it_is_full(monkeypatch):
    from cupy_msda.torch import fast_path

    monkeypatch.setattr(fast_path, "_MOST_PLANS", 3)
    for queries in range(1, 9):
        ms_deform_attn(*tensors("cuda", requires_grad=False, starts=True, queries=queries)[:5])
        assert len(fast_path.plans) <= max(3, 1)


def static_step(arguments):
    """A training step on fixed tensors: forward, loss, gradients in place."""
    value, shapes, starts, locations, weights, grad_output = arguments
    leaves = (value, locations, weights)
    for leaf in leaves:
        leaf.grad = None
    output = ms_deform_attn(value, shapes, starts, locations, weights)
    output.backward(grad_output)
    return output, leaves


@pytest.mark.no_sanitizer
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_a_graph_replays_a_training_step(dtype):
    arguments = tensors("cuda", dtype, torch.float32, starts=True)
    arguments = [a if a is None else a.detach().requires_grad_(a.requires_grad) for a in arguments]
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        static_step(arguments)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output, leaves = static_step(arguments)
    for seed in (1, 2):
        overwrite(arguments, seed)
        graph.replay()
        want = results(ms_deform_attn, arguments)
        have = [output.detach(), *(leaf.grad for leaf in leaves)]
        assert_same(have, want, rtol=1e-5 if dtype == torch.float32 else 2e-3)


@pytest.mark.no_sanitizer
@pytest.mark.parametrize("metadata", ["tensors", "numbers"])
def test_a_graph_replays_a_forward(metadata):
    arguments = list(tensors("cuda", requires_grad=False, starts=True))
    if metadata == "numbers":
        arguments[1:3] = [list(map(list, LEVELS)), None]
    ms_deform_attn(*arguments[:5])
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = ms_deform_attn(*arguments[:5])
    overwrite(arguments, 3)
    graph.replay()
    assert_same([output], [ms_deform_attn(*arguments[:5])], rtol=0)


def of_points(P):
    """Arguments of a kernel that nothing else in the tests compiles."""
    value, shapes, starts, locations, weights, _ = tensors("cuda", requires_grad=False, starts=True)
    repeated = locations.repeat(1, 1, 1, 1, P, 1)[:, :, :, :, :P], weights.repeat(1, 1, 1, 1, P)[..., :P]
    return value, shapes, starts, *(t.contiguous() for t in repeated)


@pytest.mark.no_sanitizer
def test_first_call_inside_a_capture_says_to_warm_up():
    arguments = of_points(13)
    with pytest.raises(RuntimeError, match=r"cupy_msda\.warmup"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        ms_deform_attn(*arguments)
    torch.cuda.synchronize()
    assert ms_deform_attn(*arguments).isfinite().all()


@pytest.mark.no_sanitizer
@pytest.mark.parametrize("metadata", ["tensors", "numbers"])
def test_first_call_inside_a_capture_works_after_warmup(metadata):
    P = 11 if metadata == "tensors" else 9
    arguments = list(of_points(P))
    if metadata == "numbers":
        arguments[1:3] = [list(map(list, LEVELS)), None]
    sizes = cupy_msda.Sizes(levels=LEVELS, N=2, Q=5, M=2, D=8, P=P)
    assert cupy_msda.warmup(sizes, progress=True) > 0
    assert cupy_msda.warmup(sizes) == 0
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = ms_deform_attn(*arguments)
    graph.replay()
    assert_same([output], [ms_deform_attn(*arguments)], rtol=0)


def test_tensors_may_be_freed_right_after_a_call_on_a_side_stream():
    want = [r.clone() for r in results(ms_deform_attn, tensors("cuda", starts=True))]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(20):
            arguments = tensors("cuda", starts=True)
            torch.cuda._sleep(1_000_000)
            have = results(ms_deform_attn, arguments)
            sizes = [a.shape for a in arguments]
            del arguments  # the allocator may hand their memory to the next of this stream, and only to it
            for size in sizes:
                torch.full(size, torch.nan, device="cuda")
    stream.synchronize()
    assert_same(have, want)


@pytest.mark.no_sanitizer("racecheck")
def test_threads_compute_on_their_own_streams():
    """Each compiles, launches and repeats at the same time; a thread's first use of CUDA is our call."""
    inputs = {P: of_points(P) for P in (5, 6, 7, 8)}
    torch.cuda.synchronize()
    outputs, errors = {}, []

    def work(P):
        try:
            with torch.cuda.stream(torch.cuda.Stream()):
                for _ in range(50):
                    outputs[P] = ms_deform_attn(*inputs[P])
                torch.cuda.current_stream().synchronize()
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(P,)) for P in inputs for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    for P, arguments in inputs.items():
        assert_same([outputs[P]], [ms_deform_attn(*arguments)], rtol=0)


@pytest.mark.no_sanitizer  # which waits for the child for ever
def test_a_forked_child_may_be_the_first_to_use_cuda():
    code = """
import os, torch, cupy, cupy_msda
from cupy_msda.torch import ms_deform_attn
arguments = torch.rand(1, 6, 1, 4), [[2, 3]], None, torch.rand(1, 1, 1, 1, 2, 2), torch.rand(1, 1, 1, 1, 2)
want = ms_deform_attn(*arguments)
child = os.fork()
if child == 0:
    on_gpu = [a.cuda() if isinstance(a, torch.Tensor) else a for a in arguments]
    os._exit(0 if torch.allclose(ms_deform_attn(*on_gpu).cpu(), want) else 1)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parent.parent.parent)


def peak(call):
    """The most bytes that a call allocates at one time."""
    call()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    result = call()
    torch.cuda.synchronize()
    assert result is not None
    return torch.cuda.max_memory_allocated() - before


@pytest.mark.no_sanitizer
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_autocast_makes_no_float32_copies(dtype):
    levels, slack = ((128, 128), (64, 64)), 1 << 16
    value, shapes, starts, locations, weights, grad_output = tensors(
        "cuda", dtype, torch.float32, starts=True, queries=4000, levels=levels
    )
    with torch.autocast("cuda", dtype):
        with torch.no_grad():
            assert peak(lambda: ms_deform_attn(value, shapes, starts, locations, weights)) <= grad_output.nbytes + slack
        output = ms_deform_attn(value, shapes, starts, locations, weights)
    leaves = (value, locations, weights)
    # The gradients, and the float32 sums of grad_value: a sum needs them, value itself is not copied.
    allowed = sum(t.nbytes for t in leaves) + 2 * value.nbytes + slack
    assert peak(lambda: torch.autograd.grad(output, leaves, grad_output, retain_graph=True)) <= allowed


def test_tensors_on_another_device_than_the_current_one():
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    arguments = tensors("cuda:1", starts=True)
    want = [r.cpu() for r in results(ms_deform_attn, tensors("cuda:0", starts=True))]
    for _ in range(2):  # the general way, then the repeated one
        have = results(ms_deform_attn, arguments)
        assert {t.device.index for t in have} == {1}
        assert torch.cuda.current_device() == 0
        assert_same([t.cpu() for t in have], want)
    operator = torch.ops.cupy_msda.ms_deform_attn.default
    assert_same([operator(*arguments[:5], 64, None).detach().cpu()], want[:1])


@pytest.mark.exclusive
@pytest.mark.no_sanitizer("initcheck")
def test_nothing_synchronises():
    arguments = tensors("cuda", starts=True)
    results(ms_deform_attn, arguments)
    results(ms_deform_attn, arguments)
    torch.cuda.synchronize()
    done = torch.cuda.Event()
    torch.cuda._sleep(500_000_000)
    results(ms_deform_attn, arguments)
    done.record()
    assert not done.query()
