"""The host code of the CUDA path, from arrays to launches, on an emulated GPU: results against the reference."""

import ctypes
import threading
from dataclasses import replace

import numpy as np
import pytest

import cupy_msda
from cupy_msda.arrays import frameworks
from cupy_msda.cuda import plan, plan_backward, session, sorted_heuristics
from cupy_msda.cuda.launch import PreparedLaunch
from tests.helpers import cases, emulated_gpu, emulator
from tests.helpers.cases import Case
from tests.helpers.emulated_calls import (
    DENSE,
    FUSED,
    GAPS,
    HALF,
    PACKED_BOXES,
    PLAIN,
    Metadata,
    assert_results,
    call,
    check,
    run,
    wanted,
)

pytestmark = pytest.mark.skipif(emulator.COMPILER is None, reason="needs g++")
gpu = pytest.fixture(emulated_gpu.fixture)


def kernels_of(gpu):
    return [launch.spec.kernel for launch in gpu.launches]


@pytest.mark.parametrize("device", [0, 1])
def test_the_device_of_the_arrays_computes(gpu, device):
    check(gpu, PLAIN.inputs(), device)
    assert {launch.device for launch in gpu.launches} == {device}


@pytest.mark.parametrize("deterministic", [False, True])
def test_two_devices_have_each_their_kernels_tables_and_side_streams(gpu, deterministic):
    for device in (0, 1, 0, 1):
        check(gpu, PLAIN.inputs(seed=device), device, deterministic=deterministic)


def test_a_device_is_current_again_after_a_call_on_another(gpu):
    gpu.home = gpu.device = 1
    check(gpu, PLAIN.inputs(), device=0)
    assert gpu.device == 1


def test_launches_are_on_the_current_stream_of_the_caller(gpu):
    gpu.streams.use(second=True)
    check(gpu, PLAIN.inputs())
    assert {launch.stream for launch in gpu.launches} == {gpu.streams.current(0)}


@pytest.mark.parametrize("device", [0, 1])
@pytest.mark.parametrize("dtype", [np.int32, np.int64])
@pytest.mark.parametrize("case", [PLAIN, GAPS], ids=str)
def test_metadata_on_the_device(gpu, case, dtype, device):
    inputs = case.inputs()
    starts = None if inputs.starts is None else gpu.put(inputs.starts.astype(dtype), device)
    check(gpu, inputs, device, metadata=Metadata(gpu.put(inputs.shapes.astype(dtype), device), starts))


@pytest.mark.parametrize("dtype", [np.int32, np.int64])
def test_metadata_with_strides_on_the_device(gpu, dtype):
    inputs = PLAIN.inputs()
    check(gpu, inputs, metadata=Metadata(gpu.put(np.asfortranarray(inputs.shapes.astype(dtype)))))


@pytest.mark.parametrize("kind", ["list", "int32", "int64"])
def test_metadata_on_the_host(gpu, kind):
    inputs = GAPS.inputs()
    shapes, starts = ((m.tolist() if kind == "list" else m.astype(kind)) for m in (inputs.shapes, inputs.starts))
    check(gpu, inputs, metadata=Metadata(shapes, starts))


def test_metadata_on_the_host_and_the_device(gpu):
    inputs = GAPS.inputs()
    check(gpu, inputs, metadata=Metadata(gpu.put(inputs.shapes), inputs.starts))


@pytest.mark.parametrize("dtype", [np.int32, np.int64])
def test_metadata_and_lengths_on_another_device(gpu, dtype):
    inputs, lengths = GAPS.inputs(), [3, 0]
    given = (gpu.put(part.astype(dtype), 1) for part in (inputs.shapes, inputs.starts, np.array(lengths)))
    assert_results(run(gpu, inputs, metadata=Metadata(*given)), wanted(inputs, lengths), inputs)


def test_metadata_that_is_read_back_is_waited_for(gpu):
    """Value on the host: the sizes of the levels are numbers there."""
    inputs = PLAIN.inputs()
    output = cupy_msda.ms_deform_attn(inputs.value, gpu.put(inputs.shapes), None, inputs.locations, inputs.weights)
    np.testing.assert_allclose(output, wanted(inputs)[0], rtol=1e-4, atol=1e-5)
    assert gpu.streams.waited_for(gpu.streams.current(0))


def test_level_sizes_that_change_between_calls(gpu):
    for levels in (((6, 7), (3, 4)), ((7, 6), (4, 3)), ((6, 7), (3, 4))):
        check(gpu, replace(PLAIN, levels=levels).inputs())


def test_a_value_with_strides_is_not_copied(gpu):
    inputs = PLAIN.inputs()
    strided = gpu.put(np.ascontiguousarray(inputs.value.transpose(0, 2, 1, 3)).transpose(0, 2, 1, 3))
    results = run(gpu, inputs._replace(value=strided))
    assert_results(results, wanted(inputs), inputs)
    assert {launch.words[0] for launch in gpu.launches} == {strided.data.ptr}


def test_a_value_whose_channels_have_strides_is_copied(gpu):
    inputs = PLAIN.inputs()
    strided = np.ascontiguousarray(inputs.value.transpose(0, 1, 3, 2)).transpose(0, 1, 3, 2)
    results = run(gpu, inputs._replace(value=gpu.put(strided)))
    assert_results(results, wanted(inputs), inputs)


@pytest.mark.parametrize("device", [0, 1])
@pytest.mark.parametrize("name", ["locations", "weights", "grad_output"])
def test_other_inputs_with_strides_are_copied(gpu, name, device):
    inputs = PLAIN.inputs()
    strided = gpu.put(np.repeat(getattr(inputs, name), 2, -1), device)[..., ::2]
    assert not strided.host.flags.c_contiguous
    assert_results(run(gpu, inputs._replace(**{name: strided}), device), wanted(inputs), inputs)


def unaligned(gpu, array, elements):
    """The array so many elements after an aligned address."""
    whole = gpu.put(np.concatenate((array.ravel()[:elements], array.ravel())))
    return gpu.cupy.ndarray.over(whole.host[elements:].reshape(array.shape), 0)


@pytest.mark.parametrize("elements", [1, 2])
@pytest.mark.parametrize("name", ["value", "locations", "grad_output"])
def test_an_address_without_alignment(gpu, name, elements):
    inputs = PLAIN.inputs()
    for _ in range(2):  # the aligned call before it has the same sizes
        check(gpu, inputs)
        results = run(gpu, inputs._replace(**{name: unaligned(gpu, getattr(inputs, name), elements)}))
        assert_results(results, wanted(inputs), inputs)


def test_sixteen_bits_are_summed_in_the_workspace_and_cast(gpu):
    inputs = PLAIN.inputs(*HALF)
    value = gpu.put(inputs.value)
    assert_results(run(gpu, inputs._replace(value=value)), wanted(inputs), inputs)
    assert kernels_of(gpu) == ["forward", "backward", "cast"]
    assert [launch.words[0] for launch in gpu.launches[:2]] == [value.data.ptr] * 2


@pytest.mark.parametrize("pair", [("float32", "float32"), HALF], ids="-".join)
def test_a_deterministic_backward_has_the_same_bits(gpu, pair):
    inputs = DENSE.inputs(*pair)
    first, second = (check(gpu, inputs, deterministic=True)[1][0].get() for _ in range(2))
    assert first.tobytes() == second.tobytes()
    assert kernels_of(gpu)[:3] == ["forward", "bucket_sort", "reduce_buckets"]


def test_deterministic_changes_between_calls_of_one_problem(gpu):
    for deterministic in (False, True, None, True, False):
        del gpu.launches[:]
        check(gpu, PLAIN.inputs(), deterministic=deterministic)
        assert ("bucket_sort" in kernels_of(gpu)) == bool(deterministic)


def test_a_side_stream_computes_what_the_sum_does_not_need(gpu):
    check(gpu, PLAIN.inputs(), deterministic=True)
    _, sort, reduce, samples = gpu.launches
    assert sort.stream == reduce.stream == gpu.streams.current(0)
    assert samples.stream != sort.stream


def test_a_deterministic_backward_with_chunks_of_buckets(gpu, monkeypatch):
    monkeypatch.setattr(sorted_heuristics, "SMALLEST_CHUNK", 64)
    check(gpu, DENSE.inputs(), deterministic=True)
    reduce = next(launch for launch in gpu.launches if launch.spec.kernel == "reduce_buckets")
    names = [parameter.name for parameter in reduce.spec.parameters]
    assert reduce.words[names.index("queue")]


@pytest.mark.parametrize("fused", [False, True])
def test_a_deterministic_backward_in_slabs(gpu, monkeypatch, fused):
    monkeypatch.setattr(plan_backward, "WORKSPACE", 1)
    inputs = PLAIN.inputs()
    monkeypatch.setattr(sorted_heuristics, "MAX_BUCKETS", len(inputs.shapes) + 2)
    monkeypatch.setattr(sorted_heuristics, "MAX_BUCKET_SIZE", 32)
    check(gpu, cases.to_fused(inputs) if fused else inputs, deterministic=True)
    assert kernels_of(gpu).count("bucket_sort") == 6 * -(-inputs.value.shape[1] // 32)


@pytest.mark.parametrize("form", [FUSED, PACKED_BOXES], ids=str)
def test_each_fused_form(gpu, form):
    check(gpu, cases.to_fused(PLAIN.inputs(), **form))


def test_a_fused_call_in_sixteen_bits(gpu):
    """The workspace has the sums of value and those of the reference points."""
    check(gpu, cases.to_fused(PLAIN.inputs(*HALF), **PACKED_BOXES))
    assert kernels_of(gpu) == ["forward", "backward", "cast", "reduce_references"]


def test_a_deterministic_fused_call_whose_samples_are_materialised(gpu):
    inputs = cases.to_fused(Case("three", M=3, P=3).inputs())
    check(gpu, inputs, deterministic=True)
    assert "materialise" in kernels_of(gpu)


@pytest.mark.parametrize("place", ["list", "int32 on the device", "int64 on the device"])
def test_query_lengths(gpu, place):
    inputs, lengths = PLAIN.inputs(), [3, 0]
    given = lengths if place == "list" else gpu.put(np.array(lengths, place[:5]))
    results = run(gpu, inputs, metadata=Metadata(lengths=given))
    assert_results(results, wanted(inputs, lengths), inputs)


@pytest.mark.parametrize("case", [Case("N", N=0), Case("Q", queries=0), Case("D", D=0), Case("P", P=0)], ids=str)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_empty_problem_gives_zeros_without_a_launch(gpu, case, dtype):
    inputs = case.inputs(dtype)
    output, grads = run(gpu, inputs)
    for result in (output, *grads[:3]):
        assert not result.get().astype(float).any()
    assert output.dtype == inputs.value.dtype
    assert not gpu.launches


@pytest.mark.parametrize("form", [None, PACKED_BOXES], ids=str)
def test_naive_kernels(gpu, monkeypatch, form):
    monkeypatch.setenv("CUPY_MSDA_KERNELS", "naive")
    inputs = PLAIN.inputs(*HALF)
    check(gpu, cases.to_fused(inputs, **form) if form else inputs)
    assert all(kernel.startswith(("naive", "cast")) for kernel in kernels_of(gpu))


def test_naive_kernels_with_strides_lengths_and_metadata_on_the_device(gpu, monkeypatch):
    monkeypatch.setenv("CUPY_MSDA_KERNELS", "naive")
    inputs, lengths = PLAIN.inputs(*HALF), [3, 0]
    strided = np.ascontiguousarray(inputs.value.transpose(0, 2, 1, 3)).transpose(0, 2, 1, 3)
    given = Metadata(gpu.put(inputs.shapes), None, gpu.put(np.array(lengths)))
    results = run(gpu, inputs._replace(value=gpu.put(strided)), metadata=given)
    assert_results(results, wanted(inputs, lengths), inputs)


VARIANTS = [{"interpolation": "nearest"}, {"padding_mode": "border"}, {"align_corners": True}]


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_variants_of_naive_kernels(gpu, monkeypatch, variant):
    monkeypatch.setenv("CUPY_MSDA_KERNELS", "naive")
    inputs = Case("variant", M=3, variant=variant).inputs(*HALF)
    assert_results(run(gpu, inputs, **variant), wanted(inputs, **variant), inputs)


@pytest.mark.parametrize("first", ["levels", "kernel"])
def test_a_first_call_in_a_capture_is_refused(gpu, first):
    inputs = PLAIN.inputs()
    if first == "levels":  # with kernels that are compiled
        run(gpu, Case("other", M=3, levels=((7, 6), (3, 4))).inputs())
    else:
        gpu.cupy.cuda.runtime.setDevice(0)
    gpu.streams.capturing.add(gpu.streams.current(0))
    with pytest.raises(RuntimeError, match="copy the sizes" if first == "levels" else "compile and load"):
        run(gpu, inputs)
    gpu.streams.capturing.clear()


@pytest.mark.parametrize("deterministic", [False, True])
def test_a_repeated_call_can_be_captured(gpu, deterministic):
    check(gpu, PLAIN.inputs(), deterministic=deterministic)
    gpu.streams.capturing.add(gpu.streams.current(0))
    check(gpu, PLAIN.inputs(seed=1), deterministic=deterministic)
    gpu.streams.capturing.clear()


@pytest.mark.parametrize("deterministic", [False, True])
def test_a_first_call_after_warmup_can_be_captured(gpu, deterministic):
    sizes = cupy_msda.Sizes(levels=PLAIN.levels, N=2, Q=5, M=3, D=8, P=2)
    assert cupy_msda.warmup(sizes) > 0
    assert cupy_msda.warmup(sizes) == 0
    gpu.streams.capturing.add(gpu.streams.current(0))
    check(gpu, PLAIN.inputs(), deterministic=deterministic)
    gpu.streams.capturing.clear()


def test_two_threads_call_at_once(gpu):
    inputs = [PLAIN.inputs(seed=seed) for seed in range(2)]
    results = [[], []]

    def work(number):
        for _ in range(4):
            results[number].append(call(gpu, inputs[number], device=number, deterministic=bool(number)))

    threads = [threading.Thread(target=work, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    gpu.check()
    for found, of in zip(results, inputs, strict=True):
        assert len(found) == 4
        for result in found:
            assert_results(result, wanted(of), of)


class Exporter:
    """An array that another library has on a GPU, and offers by DLPack."""

    def __init__(self, array):
        self.array = array

    def __dlpack_device__(self):
        return 2, self.array.device.id

    def __dlpack__(self, stream=None):
        assert stream is not None
        return self.array.host.__dlpack__()


def test_the_null_stream_has_a_number_of_its_own_in_dlpack(gpu, monkeypatch):
    """1, the legacy default stream: DLPack does not allow 0 on CUDA."""
    asked = []

    class Producer(Exporter):
        def __dlpack__(self, stream=None):
            asked.append(stream)
            return super().__dlpack__(stream)

    monkeypatch.setattr(frameworks.Framework, "stream", lambda self, device: 0)
    for number in (0, 5):
        monkeypatch.setattr(frameworks.Framework, "stream", lambda self, device, number=number: number)
        frameworks.Framework().view(Producer(gpu.put(PLAIN.inputs().value)))
    assert asked == [1, 5]


@pytest.mark.parametrize("failing", ["a copy", "metadata"])
def test_the_device_of_the_caller_is_current_after_a_call_that_fails(gpu, monkeypatch, failing):
    """The failure is on another device."""
    gpu.home = gpu.device = 1
    inputs = PLAIN.inputs()
    if failing == "a copy":
        monkeypatch.setattr(session, "_contiguous", lambda view: 1 / 0)
    else:
        monkeypatch.setattr(session.Session, "metadata", lambda self: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run(gpu, inputs, device=0)
    assert gpu.device == 1


def test_transposed_arrays_of_another_library(gpu):
    """A copy in the order of the strides, which is CuPy's default, would not be contiguous."""
    inputs = PLAIN.inputs()
    transposed = [gpu.put(np.ascontiguousarray(part.swapaxes(1, 2))).transpose(0, 2, 1, *range(3, part.ndim))
                  for part in inputs[3:5]]  # fmt: skip
    value, locations, weights = map(Exporter, (gpu.put(inputs.value), *transposed))
    output = cupy_msda.ms_deform_attn(value, gpu.put(inputs.shapes), None, locations, weights)
    np.testing.assert_allclose(output.get(), wanted(inputs)[0], rtol=1e-4, atol=1e-5)


def test_arrays_of_another_library(gpu):
    inputs = PLAIN.inputs()
    put = [Exporter(gpu.put(part)) for part in inputs[:1] + inputs[3:5]]
    strided = Exporter(gpu.put(np.repeat(inputs.locations, 2, -1))[..., ::2])
    want = wanted(inputs)[0]
    for locations in (put[1], strided):
        output = cupy_msda.ms_deform_attn(put[0], gpu.put(inputs.shapes), None, locations, put[2])
        np.testing.assert_allclose(output.get(), want, rtol=1e-4, atol=1e-5)


def test_a_launch_during_another_has_words_of_its_own(gpu, monkeypatch):
    """As of another thread, between the time that a launch packs its words and the time that the driver reads them."""
    planned = plan.cast_gradient("float16", 8)
    sizes = planned.spec.words()
    outer, inner = (list(range(first, first + sum(sizes))) for first in (100, 200))
    read, during = [], []

    def launch_kernel(*arguments):
        if during:
            prepared.run(0, *during.pop())
        pointers = (ctypes.c_void_p * len(sizes)).from_address(arguments[-2])
        read.append([word for at, size in zip(pointers, sizes, strict=True)
                     for word in (ctypes.c_int64 * size).from_address(at)])  # fmt: skip

    monkeypatch.setattr(gpu.cupy.cuda.driver, "launchKernel", launch_kernel)
    prepared = PreparedLaunch(planned, 0)
    prepared.run(0, *outer)  # leaves a block
    during.append(inner)
    prepared.run(0, *outer)
    prepared.run(0, *inner)
    assert read == [outer, inner, outer, inner]
