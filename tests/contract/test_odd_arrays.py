"""Arrays with more to them than numbers: read right, or refused by the name of the argument."""

import numpy as np
import pytest

jax = pytest.importorskip("jax")
jnp = pytest.importorskip("jax.numpy")
torch = pytest.importorskip("torch")

import cupy_msda
from cupy_msda.arrays import dlpack
from cupy_msda.torch import ms_deform_attn
from tests.helpers.cases import Case

CASE = Case("odd")
INPUTS = CASE.inputs()
NAMES = ("value", "spatial_shapes", "level_start_index", "sampling_loc", "attn_weight", "grad_output")
OPERANDS = ("value", "sampling_loc", "attn_weight", "grad_output")


def attend(**changes):
    given = dict(zip(NAMES, INPUTS, strict=True)) | {"level_start_index": np.array([0, 42])} | changes
    output = cupy_msda.ms_deform_attn_forward(*(given[name] for name in NAMES[:5]), 64)
    return output, *cupy_msda.ms_deform_attn_backward(*given.values(), 64)


def given(name):
    return dict(zip(NAMES, INPUTS, strict=True))[name] if name != "level_start_index" else np.array([0, 42])


def assert_same(have, want):
    for one, other in zip(have, want, strict=True):
        assert type(one) is np.ndarray
        np.testing.assert_array_equal(one, other)


class Scaled(np.ndarray):
    """A subclass whose arithmetic differs, as that of an array with units."""

    def __array_ufunc__(self, *args, **kwargs):
        raise TypeError("the arithmetic of a subclass")


def read_only(array):
    array = array.copy()
    array.flags.writeable = False
    return array


def unaligned(array):
    raw = np.zeros(array.nbytes + 1, np.uint8)
    view = raw[1:].view(array.dtype).reshape(array.shape)
    view[...] = array
    return view


def in_a_record(array):
    record = np.zeros(array.shape, [("flag", np.uint8), ("number", array.dtype)])
    record["number"] = array
    return record["number"]


def memory_mapped(array, file):
    mapped = np.memmap(file, array.dtype, "w+", shape=array.shape)
    mapped[...] = array
    return mapped


RIGHT = {
    "read-only": read_only,
    "subclass": lambda array: array.view(Scaled),
    "unaligned": unaligned,
    "field of records": in_a_record,
    "backwards": lambda array: array[::-1].copy()[::-1],
    "Fortran order": np.asfortranarray,
    "record array": lambda array: array.view(np.recarray),
}


@pytest.mark.parametrize("kind", RIGHT)
@pytest.mark.parametrize("name", NAMES)
def test_an_odd_array_is_read_right(kind, name):
    assert_same(attend(**{name: RIGHT[kind](given(name))}), attend())


def test_memory_mapped_arrays_are_read_right(tmp_path):
    assert_same(attend(**{name: memory_mapped(given(name), tmp_path / name) for name in NAMES}), attend())


@pytest.mark.parametrize("name", NAMES)
def test_a_read_only_array_stays_as_it_is_in_torch(name, recwarn):
    tensors = {
        name: torch.from_numpy(given(name)) if name in OPERANDS else read_only(given(name)) for name in NAMES[:5]
    }
    ms_deform_attn(*tensors.values())
    ms_deform_attn(*tensors.values(), query_lengths=read_only(np.array([5, 5])))
    assert not recwarn.list


# The type of the error and a word of its message.
REFUSED = {
    "mask": (lambda array: np.ma.masked_array(array, np.zeros(array.shape, bool)), TypeError, "without a mask"),
    "other byte order": (lambda array: array.astype(array.dtype.newbyteorder()), TypeError, "native byte order"),
    "objects": (lambda array: array.astype(object), TypeError, "object"),
    "records": (lambda array: array.astype([("a", array.dtype)]), TypeError, "void|record"),
    "no dimension": (lambda array: array.ravel()[:1].reshape(()), ValueError, r"got \[\]"),
    "strings": (lambda array: array.astype("U8"), TypeError, "str"),
    "dates": (lambda array: array.astype(np.int64).astype("M8[s]"), TypeError, "datetime64"),
    "bools": (lambda array: array.astype(bool), TypeError, "bool"),
}


@pytest.mark.parametrize("kind", REFUSED)
@pytest.mark.parametrize("name", NAMES)
def test_an_odd_array_is_refused_by_name(kind, name):
    make, error, word = REFUSED[kind]
    with pytest.raises(error, match=rf"^{name}: expected.*({word})"):
        attend(**{name: make(given(name))})


@pytest.mark.filterwarnings("ignore:.*matrix subclass:PendingDeprecationWarning")
def test_a_matrix_is_an_array_of_rank_2():
    assert_same(attend(spatial_shapes=np.matrix(INPUTS.shapes)), attend())
    with pytest.raises(ValueError, match=r"^value: expected shape \[N, S, M, D\], got \[54, 2\]"):
        attend(value=np.matrix(INPUTS.value[0, :, :, 0]))


@pytest.mark.parametrize("function", [cupy_msda.ms_deform_attn_backward, cupy_msda.ms_deform_attn_fused_backward])
def test_a_gradient_that_is_none_is_refused_by_name(function):
    operands = [INPUTS.value, INPUTS.shapes, None, INPUTS.locations[:, :, 0, :, 0], INPUTS.locations, INPUTS.weights]
    if function is cupy_msda.ms_deform_attn_backward:
        del operands[3]
    with pytest.raises(TypeError, match=r"^grad_output: expected an array.*NoneType"):
        function(*operands, None, 64)


TORCH_DTYPES = {
    "bool": torch.bool,
    "complex32": torch.complex32,
    "complex64": torch.complex64,
    "float8_e4m3fn": torch.float8_e4m3fn,
    "float8_e5m2": torch.float8_e5m2,
    "uint16": torch.uint16,
}


@pytest.mark.filterwarnings("ignore:ComplexHalf")
@pytest.mark.parametrize("function", [cupy_msda.ms_deform_attn, ms_deform_attn], ids=["array", "torch"])
@pytest.mark.parametrize("dtype", TORCH_DTYPES)
def test_a_dtype_of_torch_is_named_as_torch_names_it(dtype, function):
    tensors = [torch.from_numpy(array) for array in (INPUTS.value, INPUTS.shapes, INPUTS.locations, INPUTS.weights)]
    for place, name in ((0, "value"), (2, "sampling_locations"), (3, "attention_weights"), (1, "spatial_shapes")):
        if name == "spatial_shapes" and dtype == "uint16":
            continue  # integers
        changed = list(tensors)
        changed[place] = tensors[place].to(torch.float32).to(TORCH_DTYPES[dtype])
        with pytest.raises(TypeError, match=rf"^{name}: expected .*got {dtype}$"):
            function(*changed[:2], None, *changed[2:])


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")
@pytest.mark.parametrize("function", [cupy_msda.ms_deform_attn, ms_deform_attn], ids=["array", "torch"])
def test_a_quantized_tensor_is_refused_by_name(function):
    value, *others = (torch.from_numpy(array) for array in (INPUTS.value, INPUTS.locations, INPUTS.weights))
    value = torch.quantize_per_tensor(value, 1.0, 0, torch.quint8)
    with pytest.raises(TypeError, match=r"^value: expected .*(quint8|quantized)"):
        function(value, INPUTS.shapes, None, *others)


@pytest.mark.parametrize("dtype", ["bool", "float8_e4m3fn", "float8_e5m2", "complex64", "float4_e2m1fn"])
def test_a_dtype_of_jax_is_named_as_jax_names_it(dtype):
    value, locations, weights = (jnp.asarray(array) for array in (INPUTS.value, INPUTS.locations, INPUTS.weights))
    with pytest.raises(TypeError, match=rf"^value: expected dtype .*got {dtype}$"):
        cupy_msda.ms_deform_attn(value.astype(dtype), INPUTS.shapes, None, locations, weights)


def test_a_random_key_of_jax_is_refused_by_name():
    locations, weights = (jnp.asarray(array) for array in (INPUTS.locations, INPUTS.weights))
    with pytest.raises(TypeError, match=r"^value: expected .*key"):
        cupy_msda.ms_deform_attn(jax.random.key(0), INPUTS.shapes, None, locations, weights)


def test_a_donated_array_of_jax_is_refused_by_name():
    value, locations, weights = (jnp.asarray(array) for array in (INPUTS.value, INPUTS.locations, INPUTS.weights))
    value.delete()
    with pytest.raises(TypeError, match=r"^value: expected .*deleted"):
        cupy_msda.ms_deform_attn(value, INPUTS.shapes, None, locations, weights)


def test_a_producer_that_cannot_export_is_refused_by_name():
    class Producer:
        def __dlpack_device__(self):
            return (1, 0)

        def __dlpack__(self, stream=None):
            raise BufferError("no export of this array")

    with pytest.raises(TypeError, match=r"^value: no export of this array"):
        attend(value=Producer())


@pytest.mark.parametrize(
    ("given", "name"),
    [
        ((2, 32, 1), "float32"),
        ((2, 32, 4), "float32 x 4"),
        ((6, 8, 1), "bool"),
        ((99, 8, 1), "DLPack type 99 of 8 bits"),
    ],
)
def test_every_type_of_dlpack_has_a_name(given, name):
    assert dlpack._dtype_name(dlpack._DataType(*given)) == name


@pytest.mark.skipif(np.lib.NumpyVersion(np.__version__) < "2.1.0", reason="NumPy has DLPack 1 since 2.1")
def test_a_version_of_dlpack_to_come_is_refused():
    array = np.arange(3.0)
    capsule = array.__dlpack__(max_version=(1, 0))
    versioned = dlpack._VersionedTensor.from_address(dlpack._get_pointer(capsule, b"dltensor_versioned"))
    versioned.major, major = 2, versioned.major
    with pytest.raises(TypeError, match=r"expected an export by DLPack 0 or 1, got one by 2\."):
        dlpack.read_capsule(capsule)
    versioned.major = major


@pytest.mark.parametrize(
    ("kind", "number", "device"),
    [(1, 0, ("cpu", 0)), (1, 3, ("cpu", 0)), (2, 0, ("cuda", 0)), (2, 3, ("cuda", 3))],
)
def test_the_device_of_a_capsule(kind, number, device):
    """Its number counts on a GPU alone."""
    array = np.arange(3.0)
    capsule = array.__dlpack__()
    tensor = dlpack._Tensor.from_address(dlpack._get_pointer(capsule, b"dltensor"))
    tensor.device.type, tensor.device.id = kind, number
    assert dlpack.read_capsule(capsule).device == device
    tensor.device.type, tensor.device.id = 1, 0
