"""What only a GPU can show: addresses, streams, hostile metadata on the device, sizes beyond 2**31."""

import numpy as np
import pytest

import cupy_msda
from cupy_msda import arrays
from tests.helpers import cases, reference
from tests.helpers.cases import Case
from tests.helpers.tolerance import assert_close

pytestmark = [pytest.mark.gpu, pytest.mark.sanitizer]

CASE = Case("plain")
INT64_MAX = 2**63 - 1


def test_inputs_are_handed_over_without_a_copy(cuda_backend):
    array = cuda_backend.put(CASE.inputs().value)
    address = {
        "torch-cuda": lambda: array.data_ptr(),
        "cupy": lambda: array.data.ptr,
        "jax-cuda": lambda: array.unsafe_buffer_pointer(),
    }[cuda_backend.name]()
    assert arrays.view("value", array).data == address


def test_result_is_of_the_callers_framework_and_device(cuda_backend):
    put = [cuda_backend.put(array) for array in CASE.inputs()]
    output = cupy_msda.ms_deform_attn(*put[:5])
    assert type(output) is type(put[0])
    assert arrays.view("output", output).device == arrays.view("value", put[0]).device


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf], ids=str)
@pytest.mark.parametrize("queries", [None, 900], ids=["pixels", "others"])
def test_what_is_not_finite_reaches_its_samples_only(cuda_backend, queries, bad):
    case = Case("large", levels=((40, 50), (20, 25), (10, 13)), N=2, M=8, D=32, queries=queries)
    inputs = case.inputs(seed=5)
    inputs.value[0, [0, 49, 777, 1999, 2000, -1]] = bad
    output = cuda_backend.get(cupy_msda.ms_deform_attn(*(cuda_backend.put(array) for array in inputs[:5])))
    want = cupy_msda.ms_deform_attn(*inputs[:5])  # on the CPU
    finite = np.isfinite(want)
    assert 0.9 < finite.mean() < 1
    np.testing.assert_array_equal(np.isfinite(output), finite)
    assert_close(output[finite], want[finite], "float32")


def behind_the_beginning(array, offset):
    """`array` on the GPU, so many elements behind the beginning of an allocation."""
    import cupy

    buffer = cupy.empty(array.size + offset, array.dtype)
    buffer[offset:] = cupy.asarray(array).ravel()
    return buffer[offset:].reshape(array.shape)


THREE = ((40, 50), (20, 25), (10, 13))
LARGE_BATCH = Case("large_batch", levels=THREE, N=8, M=8, D=32, P=4, queries=None)
# Taken in rounds, the heads at the end in blocks of one: samples in pairs, an odd number of samples in two passes,
# lanes beyond the last query, two heads a warp, many levels in registers and more than they hold, one query a warp.
FULL = [
    Case("pairs", levels=THREE, N=4, M=8, D=32, P=4, queries=None),
    Case("odd", levels=THREE, N=4, M=8, D=32, P=3, queries=None),
    Case("lanes_left", levels=THREE[:2], N=4, M=8, D=36, P=3, queries=None),
    Case("two_heads", levels=THREE, N=8, M=8, D=16, P=4, queries=None),
    Case("five_levels", levels=(*THREE, (5, 7), (3, 4)), N=4, M=8, D=32, P=4, queries=None),
    Case("six_levels", levels=(*THREE, (5, 7), (3, 4), (2, 2)), N=4, M=8, D=32, P=2, queries=None),
    Case("one_query", levels=THREE, N=1, M=8, D=128, P=4, queries=None),
]


@pytest.mark.parametrize(
    ("case", "dtype", "offset"),
    [*((case, "float32", 0) for case in FULL), (FULL[0], "float32", 2), (LARGE_BATCH, "float16", 0)],
    ids=str,
)
def test_pixels_that_fill_the_gpu(case, dtype, offset):
    import cupy

    inputs = case.inputs(dtype, seed=6)
    samples = (behind_the_beginning(array, offset) for array in (inputs.locations, inputs.weights))
    output = cupy_msda.ms_deform_attn(cupy.asarray(inputs.value), inputs.shapes, None, *samples)
    assert_close(output.get(), cupy_msda.ms_deform_attn(*inputs[:5]), dtype)  # on the CPU


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_padded_pixels_that_fill_the_gpu(dtype):
    import torch

    inputs = LARGE_BATCH.inputs(seed=7)
    lengths = np.array([2630, 0, 1, 64, 65, 128, 129, 2000])
    value, *samples = (torch.from_numpy(array) for array in (inputs.value, inputs.locations, inputs.weights))
    value = value.to(getattr(torch, dtype))
    want = cupy_msda.ms_deform_attn(value, inputs.shapes, None, *samples, query_lengths=lengths)  # on the CPU
    on_the_gpu = (tensor.cuda() for tensor in samples)
    output = cupy_msda.ms_deform_attn(value.cuda(), inputs.shapes, None, *on_the_gpu, query_lengths=lengths)
    assert_close(output.float().cpu().numpy(), want.float().numpy(), dtype)


@pytest.mark.parametrize("deterministic", [True])
def test_forward_is_bitwise_reproducible(cuda_backend, deterministic):
    put = [cuda_backend.put(array) for array in CASE.inputs()]
    runs = [cuda_backend.get(cupy_msda.ms_deform_attn(*put[:5], deterministic=deterministic)) for _ in range(5)]
    for run in runs[1:]:
        np.testing.assert_array_equal(run, runs[0])


BAD_LEVELS = {
    "negative height": ([[-6, 7], [3, 4]], [0, 42]),
    "zero width": ([[6, 0], [3, 4]], [0, 42]),
    "too large": ([[6, 8], [30, 40]], [0, 42]),
    "product wraps around": ([[2**32, 2**32], [3, 4]], [0, 42]),
    "huge": ([[INT64_MAX, INT64_MAX], [3, 4]], [0, 42]),
    "negative start": ([[6, 7], [3, 4]], [0, -1]),
    "start beyond S": ([[6, 7], [3, 4]], [0, 54]),
    "huge start": ([[6, 7], [3, 4]], [0, INT64_MAX]),
    "smallest start": ([[6, 7], [3, 4]], [-(2**63), 42]),
    "overlapping beyond S": ([[6, 7], [6, 7]], [0, 30]),
    "packed, too large": ([[6, 7], [6, 7]], None),
    "packed, wraps around": ([[2**62, 2], [3, 4]], None),
}


@pytest.mark.parametrize("name", BAD_LEVELS)
def test_bad_level_on_the_device(cuda_backend, name):
    shapes, starts = BAD_LEVELS[name]
    inputs = CASE.inputs()
    put = [cuda_backend.put(array) for array in inputs]
    put[1] = cuda_backend.put(np.array(shapes, np.int64))
    put[2] = None if starts is None else cuda_backend.put(np.array(starts, np.int64))
    output = cuda_backend.get(cupy_msda.ms_deform_attn(*put[:5]))
    assert np.isnan(output).all()
    grads = [cuda_backend.get(grad) for grad in cupy_msda.ms_deform_attn_backward(*put, 64)]
    for grad in grads[1:]:
        bad = np.isnan(grad).reshape(*grad.shape[:3], 2, -1).all(-1)
        assert bad.any(axis=(0, 1, 2)).any()
        np.testing.assert_array_equal(bad.all(axis=(0, 1, 2)), bad.any(axis=(0, 1, 2)))
    with pytest.raises(ValueError, match=r"spatial_shapes|level_start_index"):
        cupy_msda.ms_deform_attn(*put[:5], validate=True)


def test_good_metadata_on_the_device_passes_validation(cuda_backend):
    inputs = CASE.inputs()
    put = [cuda_backend.put(array) for array in inputs]
    output = cupy_msda.ms_deform_attn(*put[:5], validate=True)
    assert_close(cuda_backend.get(output), reference.forward(*inputs[:5]), "float32")


def test_metadata_on_the_device_beside_a_value_on_the_cpu():
    import cupy

    inputs = CASE.inputs()
    output = cupy_msda.ms_deform_attn(inputs.value, cupy.asarray(inputs.shapes), None, *inputs[3:5])
    assert_close(output, reference.forward(*inputs[:5]), "float32")


def test_seventy_levels_on_the_device(cuda_backend):
    inputs = Case("seventy", levels=((2, 3),) * 70, N=1, M=1, D=4, P=1, queries=3).inputs()
    put = [cuda_backend.put(array) for array in inputs]
    assert_close(cuda_backend.get(cupy_msda.ms_deform_attn(*put[:5])), reference.forward(*inputs[:5]), "float32")


@pytest.mark.parametrize("offset", [1, 2, 3])
def test_unaligned_arrays(offset):
    inputs = Case("wide", D=32).inputs()
    on_the_host = [array is None or array.dtype.kind == "i" for array in inputs]
    put = [a if host else behind_the_beginning(a, offset) for a, host in zip(inputs, on_the_host, strict=True)]
    want_output, want_grads = cases.expected(inputs)
    assert_close(cupy_msda.ms_deform_attn(*put[:5]).get(), want_output, "float32")
    for grad, want in zip(cupy_msda.ms_deform_attn_backward(*put, 64), want_grads, strict=True):
        assert_close(grad.get(), want, "float32")


def test_torch_side_stream():
    import torch

    inputs = Case("side", levels=((64, 64),), N=4, M=8, D=32, queries=2000).inputs()
    put = [None if a is None else torch.from_numpy(a).cuda() for a in inputs]
    want = cupy_msda.ms_deform_attn(*put[:5])
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        # The value is only there once the sleep is over: a launch on another stream would read zeros.
        late = torch.zeros_like(put[0])
        torch.cuda._sleep(50_000_000)
        late.copy_(put[0])
        output = cupy_msda.ms_deform_attn(late, *put[1:5])
    stream.synchronize()
    torch.testing.assert_close(output, want, rtol=0, atol=0)


def test_cupy_side_stream():
    import cupy

    inputs = Case("side", levels=((64, 64),), N=4, M=8, D=32, queries=2000).inputs()
    put = [None if a is None else cupy.asarray(a) for a in inputs]
    want = cupy_msda.ms_deform_attn(*put[:5])
    cupy.cuda.Device().synchronize()
    with cupy.cuda.Stream(non_blocking=True) as stream:
        output = cupy_msda.ms_deform_attn(*put[:5])
        stream.synchronize()
    cupy.testing.assert_array_equal(output, want)


@pytest.mark.exclusive
@pytest.mark.no_sanitizer("initcheck")
def test_nothing_synchronises():
    import torch

    put = [None if a is None else torch.from_numpy(a).cuda() for a in CASE.inputs()]
    cupy_msda.ms_deform_attn(*put[:5])
    cupy_msda.ms_deform_attn_backward(*put, 64)
    torch.cuda.synchronize()
    done = torch.cuda.Event()
    torch.cuda._sleep(500_000_000)
    cupy_msda.ms_deform_attn(*put[:5])
    cupy_msda.ms_deform_attn_backward(*put, 64)
    done.record()
    assert not done.query()


def test_second_device_while_the_first_is_current():
    import cupy

    if cupy.cuda.runtime.getDeviceCount() < 2:
        pytest.skip("needs two CUDA devices")
    import torch

    inputs = CASE.inputs()
    want_output, want_grads = cases.expected(inputs)
    put = [None if a is None else torch.from_numpy(a).to("cuda:1") for a in inputs]
    output = cupy_msda.ms_deform_attn(*put[:5])
    grads = cupy_msda.ms_deform_attn_backward(*put, 64)
    assert {t.device.index for t in (output, *grads)} == {1}
    assert torch.cuda.current_device() == 0
    assert_close(output.cpu().numpy(), want_output, "float32")
    assert_close(grads[0].cpu().numpy(), want_grads[0], "float32")


@pytest.mark.exclusive
@pytest.mark.no_sanitizer("initcheck")
@pytest.mark.parametrize(
    ("N", "H", "W", "M", "D"), [(1, 16384, 16400, 1, 8), (9, 1024, 1024, 8, 32)], ids=["one image", "all images"]
)
def test_more_than_2_31_elements(N, H, W, M, D):
    import torch

    S = H * W
    assert N * S * M * D > 2**31
    torch.manual_seed(0)
    value = torch.randn(N, S, M, D, dtype=torch.float16, device="cuda")
    # Samples around the four corners of each image, the last one beyond every 32-bit offset.
    pixels = torch.tensor([[0.3, 0.4], [W - 1.4, 0.7], [0.6, H - 1.2], [W - 1.7, H - 1.3]], dtype=torch.float64)
    locations = ((pixels + 0.5) / torch.tensor([W, H])).float().cuda().expand(N, 1, M, 1, 4, 2).contiguous()
    weights = torch.rand(N, 1, M, 1, 4, device="cuda") + 0.5
    output = cupy_msda.ms_deform_attn(value, [(H, W)], None, locations, weights)
    grad_output = torch.randn(N, 1, M * D, dtype=torch.float16, device="cuda")
    grad_value, _, grad_weights = cupy_msda.ms_deform_attn_backward(
        value, [(H, W)], None, locations, weights, grad_output, 64
    )

    exact = locations[0, 0, 0, 0].double().cpu() * torch.tensor([W, H]) - 0.5
    want = torch.zeros(N, M, D, dtype=torch.float64)
    want_weights = torch.zeros(N, M, 4, dtype=torch.float64)
    touched = {}
    for p, (px, py) in enumerate(exact.tolist()):
        x0, y0 = int(px), int(py)
        for dy, dx in ((0, 0), (0, 1), (1, 0), (1, 1)):
            w = (px - x0 if dx else 1 - px + x0) * (py - y0 if dy else 1 - py + y0)
            row = (y0 + dy) * W + x0 + dx
            pixel = value[:, row].double().cpu()
            attention = weights[:, 0, :, 0, p].double().cpu()
            incoming = grad_output.view(N, M, D).double().cpu()
            want += attention[..., None] * w * pixel
            want_weights[..., p] += w * (incoming * pixel).sum(-1)
            touched[row] = attention[..., None] * w * incoming
    assert_close(output.cpu().numpy().reshape(N, M, D), want.numpy(), "float16")
    assert_close(grad_weights.cpu().numpy()[:, 0, :, 0], want_weights.numpy(), "float32")
    for row, part in touched.items():
        assert_close(grad_value[:, row].cpu().numpy(), part.numpy(), "float16")
    assert int((grad_value != 0).sum()) <= len(touched) * N * M * D
