"""Ragged queries: padding beyond the query lengths is not read, and its output and gradients are zeros."""

import numpy as np
import pytest

import cupy_msda
from cupy_msda.call import Wanted
from tests.helpers import cases
from tests.helpers.backends import TorchBackend
from tests.helpers.calls import call_of
from tests.helpers.cases import Case
from tests.helpers.tolerance import assert_close

pytestmark = pytest.mark.sanitizer

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
RAGGED = (
    (Case("cameras", levels=((6, 7), (3, 4)), N=4, M=2, D=16, queries=37), (37, 0, 5, 20)),
    (Case("encoder_order", levels=((9, 11), (4, 5)), N=3, M=2, D=32, queries=None), (119, 60, 1)),
    (Case("few_samples", levels=((40, 52), (13, 13)), N=2, M=2, D=32, queries=60), (7, 31)),
    (Case("chunks", levels=((4, 5), (3, 3), (2, 2)), N=2, M=2, D=4, P=15, queries=5), (2, 4)),
    (Case("points", N=2, queries=9, variant={"num_points": (3, 1), "padding_mode": "border"}), (3, 8)),
)


def poisoned(inputs, lengths):
    """NaN in the padding, which must not be read."""
    padding = np.arange(inputs.locations.shape[1]) >= np.array(lengths)[:, None]
    for array in (inputs.locations, inputs.weights, inputs.grad_output):
        array[padding] = np.nan
    return inputs


def check_ragged(backend, case, lengths, pair=("float32", "float32"), put_lengths=np.array, deterministic=False):
    inputs = case.inputs(*pair, seed=1)
    want_output, want_grads = cases.expected_ragged(inputs, lengths, **case.variant)
    put = [backend.put(array) for array in poisoned(inputs, lengths)]
    options = {"query_lengths": put_lengths(lengths), **case.variant}
    output = cupy_msda.ms_deform_attn(*put[:5], **options)
    assert_close(backend.get(output), want_output, pair[0])
    grads = cupy_msda.ms_deform_attn_backward(*put, 64, deterministic=deterministic, **options)
    assert_close(backend.get(grads[0]), want_grads[0], pair[0], "grad_value")
    points = case.variant.get("num_points")
    got, want = (cases.pixel_units(grad, inputs.shapes, points) for grad in (backend.get(grads[1]), want_grads[1]))
    assert_close(got, want, pair[1], "grad_sampling_loc")
    assert_close(backend.get(grads[2]), want_grads[2], pair[1], "grad_attn_weight")


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize(("case", "lengths"), RAGGED, ids=lambda part: getattr(part, "name", ""))
def test_padding_is_not_read_and_gets_zeros(main_backend, case, lengths, deterministic):
    check_ragged(main_backend, case, lengths, deterministic=deterministic)


@pytest.mark.parametrize("pair", cases.DTYPE_PAIRS, ids="-".join)
def test_every_dtype_agrees_with_the_reference(main_backend, pair):
    check_ragged(main_backend, *RAGGED[0], pair)


@pytest.mark.parametrize("kind", ["list", "int32", "framework"])
def test_lengths_may_be_any_integers_of_any_framework(backend, kind):
    put = {"list": list, "int32": lambda n: np.array(n, np.int32), "framework": lambda n: backend.put(np.array(n))}
    check_ragged(backend, *RAGGED[0], put_lengths=put[kind])


def test_full_lengths_give_the_same_bits_as_none(main_backend):
    case = RAGGED[0][0]
    put = [main_backend.put(array) for array in case.inputs(seed=2)]
    every = cupy_msda.ms_deform_attn(*put[:5], query_lengths=[37] * 4)
    np.testing.assert_array_equal(main_backend.get(every), main_backend.get(cupy_msda.ms_deform_attn(*put[:5])))


@pytest.mark.gpu
def test_lengths_from_the_host_are_right_on_a_side_stream():
    torch = pytest.importorskip("torch")

    backend = TorchBackend("cuda")
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        for _ in range(20):
            check_ragged(backend, *RAGGED[0], put_lengths=list)


@pytest.mark.gpu
def test_lengths_on_the_gpu_are_clamped():
    backend = TorchBackend("cuda")
    check_ragged(backend, RAGGED[0][0], (37, 0, 5, 20), put_lengths=lambda n: backend.put(np.array((99, -7, 5, 20))))


@pytest.mark.parametrize(
    ("lengths", "error", "message"),
    [
        ([1, 2, 3], ValueError, r"query_lengths: expected shape \[N\] with N = 4, got \[3\]"),
        ([1, 2, 3, 38], ValueError, r"query_lengths: expected 0 to Q = 37, got 38 for image 3"),
        ([1, -2, 3, 3], ValueError, r"query_lengths: expected 0 to Q = 37, got -2 for image 1"),
        (np.ones(4), TypeError, "query_lengths: expected an integer dtype, got float64"),
        ("four", TypeError, "query_lengths: expected an array"),
    ],
)
def test_wrong_lengths_are_refused(main_backend, lengths, error, message):
    put = [main_backend.put(array) for array in RAGGED[0][0].inputs()]
    with pytest.raises(error, match=message):
        cupy_msda.ms_deform_attn(*put[:5], query_lengths=lengths)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("compiled", [False, True])
def test_torch_gradients_eager_and_compiled(device, compiled):
    torch = pytest.importorskip("torch")

    from cupy_msda.torch import decomposed, ms_deform_attn

    backend = TorchBackend(device)
    case, lengths = RAGGED[0]
    inputs = case.inputs(seed=3)
    want_output, want_grads = cases.expected_ragged(inputs, lengths)
    put = [backend.put(array) for array in poisoned(inputs, lengths)]
    leaves = [put[index].requires_grad_() for index in (0, 3, 4)]
    of_images = torch.tensor(lengths, device=device)

    def call(value, locations, weights):
        return ms_deform_attn(value, *put[1:3], locations, weights, query_lengths=of_images)

    output = (torch.compile(call, fullgraph=True, backend="aot_eager") if compiled else call)(*leaves)
    assert_close(backend.get(output), want_output, "float32")
    for grad, want in zip(torch.autograd.grad(output, leaves, put[5]), want_grads, strict=True):
        if want.ndim != 6:  # the gradient of locations is compared in pixel units only
            assert_close(backend.get(grad), want, "float32")
    with decomposed(), torch.no_grad():
        assert_close(backend.get(call(*leaves)), want_output, "float32")


@pytest.mark.parametrize("device", DEVICES)
def test_second_derivatives(device):
    torch = pytest.importorskip("torch")

    from cupy_msda.torch import ms_deform_attn

    torch.manual_seed(0)
    value = torch.randn(2, 20, 1, 3, dtype=torch.float64, device=device, requires_grad=True)
    locations = torch.rand(2, 3, 1, 1, 2, 2, dtype=torch.float64, device=device, requires_grad=True)
    weights = torch.rand(2, 3, 1, 1, 2, dtype=torch.float64, device=device, requires_grad=True)
    lengths = torch.tensor([1, 2], device=device)

    def call(*leaves):
        return ms_deform_attn(leaves[0], [(4, 5)], None, *leaves[1:], query_lengths=lengths)

    assert torch.autograd.gradgradcheck(call, (value, locations, weights), nondet_tol=1e-12)


def test_only_wanted_gradients_are_computed(main_backend):
    from cupy_msda import api

    case, lengths = RAGGED[0]
    inputs = case.inputs(seed=4)
    want = cases.expected_ragged(inputs, lengths)[1]
    put = [main_backend.put(array) for array in poisoned(inputs, lengths)]
    grads = api.backward(call_of(*put, wanted=Wanted(False, False, True), query_lengths=lengths))
    assert grads[0] is grads[1] is None
    assert_close(main_backend.get(grads[2]), want[2], "float32")
