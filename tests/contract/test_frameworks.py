"""Arrays of any framework are read without a copy, and results are in the same framework."""

import sys

import ml_dtypes
import numpy as np
import pytest

import cupy_msda
from cupy_msda import arrays
from tests.helpers import backends
from tests.helpers.cases import CASES
from tests.helpers.tolerance import assert_close


class Producer:
    """An array of an unknown framework that has DLPack and nothing else."""

    def __init__(self, array):
        self.array = array

    def __dlpack__(self, **arguments):
        return self.array.__dlpack__(**arguments)

    def __dlpack_device__(self):
        return self.array.__dlpack_device__()


class NamedProducer(Producer):
    """One that has an array namespace."""

    def __array_namespace__(self):
        class Namespace:
            from_dlpack = staticmethod(lambda array: NamedProducer(np.from_dlpack(array)))

        return Namespace


@pytest.mark.parametrize("backend", backends.CPU_BACKENDS, ids=lambda b: b.name)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_cpu_arrays_are_not_copied(backend, dtype):
    array = np.arange(24, dtype=ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype).reshape(2, 3, 4)
    theirs = backend.put(array)
    view = arrays.view("value", theirs)
    pointer = {
        "numpy": lambda: theirs.ctypes.data,
        "numba": lambda: theirs.ctypes.data,
        "torch-cpu": lambda: theirs.data_ptr(),
        "jax-cpu": lambda: theirs.unsafe_buffer_pointer(),
    }[backend.name]()
    ours = arrays.to_numpy(view)
    assert (view.data, ours.ctypes.data) == (pointer, pointer)
    np.testing.assert_array_equal(ours.view(array.dtype), array)


def test_view_shares_memory_with_the_tensor():
    torch = pytest.importorskip("torch")

    tensor = torch.zeros(3)
    arrays.to_numpy(arrays.view("value", tensor))[1] = 7
    assert tensor.tolist() == [0, 7, 0]


def test_view_keeps_memory_alive():
    torch = pytest.importorskip("torch")

    array = arrays.to_numpy(arrays.view("value", torch.full((1000,), 3.0)))
    torch.full((1000,), 5.0)
    assert (array == 3).all()


def test_torch_stream_without_the_private_function(monkeypatch):
    torch = pytest.importorskip("torch")

    class Stream:
        cuda_stream = 0x5EED

    asked = []
    monkeypatch.delattr(torch._C, "_cuda_getCurrentRawStream", raising=False)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: asked.append(device) or Stream)
    assert arrays.framework_of(torch.zeros(1)).stream(("cuda", 3)) == 0x5EED
    assert asked == [3]


def test_torch_stream_by_the_private_function(monkeypatch):
    torch = pytest.importorskip("torch")

    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda device: 100 + device, raising=False)
    assert arrays.framework_of(torch.zeros(1)).stream(("cuda", 3)) == 103


@pytest.mark.gpu
def test_torch_stream_functions_agree(monkeypatch):
    torch = pytest.importorskip("torch")

    framework = arrays.framework_of(torch.zeros(1))
    with torch.cuda.stream(torch.cuda.Stream()):
        private = framework.stream(("cuda", 0))
        monkeypatch.delattr(torch._C, "_cuda_getCurrentRawStream")
        assert private == framework.stream(("cuda", 0)) == torch.cuda.current_stream().cuda_stream


@pytest.mark.parametrize("producer", [Producer, NamedProducer])
def test_any_dlpack_producer_is_accepted(producer):
    inputs = CASES[0].inputs()
    wrapped = [a if a is None or a.dtype.kind == "i" else producer(a) for a in inputs]
    output = cupy_msda.ms_deform_attn(*wrapped[:5])
    assert isinstance(output, np.ndarray if producer is Producer else NamedProducer)
    result = output if producer is Producer else output.array
    assert_close(result, cupy_msda.ms_deform_attn(*inputs[:5]).astype(np.float64), "float32")


class OldProducer(Producer):
    """One of a version of DLPack that has no versions."""

    def __dlpack__(self, *, stream=None):
        return self.array.__dlpack__(stream=stream)


def read_only(array):
    array = array.copy()
    array.flags.writeable = False
    return array


@pytest.mark.parametrize("producer", [Producer, OldProducer])
def test_a_producer_is_read_without_a_copy_by_every_version_of_dlpack(producer):
    array = np.arange(24, dtype=np.float32).reshape(2, 3, 4)[:, ::-1]
    view = arrays.view("value", producer(array))
    assert view.data == array.ctypes.data
    np.testing.assert_array_equal(arrays.to_numpy(view), array)


@pytest.mark.skipif(np.lib.NumpyVersion(np.__version__) < "2.1.0", reason="NumPy has DLPack 1 since 2.1")
def test_a_producer_may_have_read_only_memory():
    inputs = CASES[0].inputs()
    given = [None if array is None else Producer(read_only(array)) for array in inputs]
    want = (cupy_msda.ms_deform_attn(*inputs[:5]), *cupy_msda.ms_deform_attn_backward(*inputs, 64))
    have = (cupy_msda.ms_deform_attn(*given[:5]), *cupy_msda.ms_deform_attn_backward(*given, 64))
    for one, other in zip(have, want, strict=True):
        np.testing.assert_array_equal(one, other)


def test_read_only_memory_is_refused_where_its_producer_has_no_way_to_say_so():
    inputs = CASES[0].inputs()
    with pytest.raises(TypeError, match=r"^value: .*readonly"):
        cupy_msda.ms_deform_attn(OldProducer(read_only(inputs[0])), *inputs[1:5])


@pytest.mark.parametrize("layout", ["transposed", "reversed", "broadcast", "odd bytes"])
def test_strides_of_any_kind_are_read(layout):
    array = np.arange(24, dtype=np.float32).reshape(4, 6)
    record = np.zeros(5, [("pad", "i1"), ("x", "<f4")])
    record["x"] = range(5)
    strided = {
        "transposed": array.T,
        "reversed": array[::-1, ::-2],
        "broadcast": np.broadcast_to(array[0], (3, 6)),
        "odd bytes": record["x"],
    }[layout]
    np.testing.assert_array_equal(arrays.to_numpy(arrays.view("value", strided)), strided)


def test_result_is_in_the_callers_framework_and_on_its_device(backend):
    put = [backend.put(array) for array in CASES[0].inputs()]
    for result in (cupy_msda.ms_deform_attn(*put[:5]), *cupy_msda.ms_deform_attn_backward(*put, 64)):
        assert arrays.framework_of(result) is arrays.framework_of(put[0])
        assert arrays.view("result", result).device == arrays.view("value", put[0]).device


def test_cuda_array_without_cupy_names_the_command(monkeypatch):
    class OnTheGPU:
        dtype, shape = np.float32, (1, 6, 1, 2)

        def __dlpack_device__(self):
            return (2, 0)

        def __dlpack__(self, **arguments):
            raise AssertionError("not reached")

    monkeypatch.setitem(sys.modules, "cupy", None)
    with pytest.raises(RuntimeError, match=r"needs CuPy, which is not installed: pip install 'cupy-cuda13x>=14.0'"):
        cupy_msda.ms_deform_attn(OnTheGPU(), [(2, 3)], None, np.zeros(1), np.zeros(1))
