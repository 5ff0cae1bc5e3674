"""Every specialisation of the kernel budget runs, and its results are right.

On a GPU, under compute-sanitizer too. Without one in the emulator: any two values of two axes of a problem meet there.
"""

from dataclasses import replace

import numpy as np
import pytest

from cupy_msda.arrays import frameworks
from cupy_msda.call import ALL
from cupy_msda.cuda import gpu, kernels, run
from tests.helpers import backends, cases, emulated_gpu, emulator, reference, smallest_calls
from tests.helpers.calls import call_of
from tests.helpers.cases import Case, FusedInputs
from tests.helpers.specialisations import text_of
from tests.helpers.tolerance import assert_close

pytestmark = [
    pytest.mark.gpu_if_present,
    pytest.mark.sanitizer,
    pytest.mark.processes(16),
    pytest.mark.skipif(not backends.GPU and emulator.COMPILER is None, reason="needs g++ or a CUDA device"),
]


@pytest.fixture
def device(monkeypatch):
    """A GPU, or one that the emulator plays."""
    if not backends.GPU:
        emulated_gpu.install(monkeypatch)


@pytest.fixture
def bfloat16_as_its_bits(monkeypatch):
    """CuPy arrays of uint16, which no call has otherwise, are of bfloat16: not every CuPy can make those."""
    view = frameworks.CuPyFramework.view

    def of_bits(self, array):
        found = view(self, array)
        return replace(found, dtype="bfloat16") if found.dtype == "uint16" else found

    monkeypatch.setattr(frameworks.CuPyFramework, "view", of_bits)


@pytest.fixture
def launched(monkeypatch):
    """The specialisations that are launched."""
    found, function = [], kernels.function

    def noted(spec, device):
        found.append(spec)
        return function(spec, device)

    monkeypatch.setattr(kernels, "function", noted)
    return found


def put(array, alignment=16):
    """`array` on the GPU, at an address that is a multiple of so many bytes, or of an element, and of no more."""
    import cupy

    bits = array.view(np.uint16) if array.dtype == cases.dtype_of("bfloat16") else array
    offset = 0 if alignment == 16 else max(1, alignment // bits.itemsize)
    memory = cupy.empty(bits.size + offset, bits.dtype)[offset:]
    memory.set(np.ascontiguousarray(bits).ravel())
    return memory.reshape(bits.shape)


def get(array, dtype):
    found = array.get()
    return found.view(dtype) if found.dtype != dtype else found


def put_value(value, small):
    """Value in the layout of the row: contiguous, or the first of two in one array, whose other one is not read."""
    if not small.problem.value_strides:
        return put(value, small.row["alignment"])
    whole = np.full((*value.shape[:2], 2, *value.shape[2:]), np.nan, value.dtype)
    whole[:, :, 0] = value
    return put(whole, small.row["alignment"])[:, :, 0]


def inputs_of(small):
    """Inputs without padding, and what is expected of them."""
    problem = small.problem
    sizes = {"N": problem.N, "M": problem.M, "D": problem.D, "P": problem.P, "queries": problem.Q}
    case = Case("small", small.levels, **sizes, variant=small.variant)
    inputs = case.inputs(problem.value_dtype, problem.location_dtype, seed=1)
    if problem.fused:
        coordinates, levels, dtype, packed = problem.fused
        points = problem.variant.num_points
        inputs = cases.to_fused(inputs, coordinates, levels, packed, dtype, num_points=points, seed=1)
    if small.lengths:
        inputs.grad_output[padding_of(small)] = 0
    expected = cases.expected_fused if problem.fused else cases.expected
    output, grads = expected(inputs, **small.variant)
    output[padding_of(small)] = 0
    return inputs, output, grads


def padding_of(small):
    """Which queries of each image are padding."""
    queries = np.arange(small.problem.Q)
    return queries >= np.array(small.lengths or (small.problem.Q,) * small.problem.N)[:, None]


def call_on_the_gpu(small, inputs):
    """The call; what kernels must not read of the padding is NaN."""
    problem = small.problem
    for array in (inputs.locations, inputs.weights, inputs.grad_output, getattr(inputs, "references", None)):
        if array is not None:
            array[padding_of(small)] = np.nan
    shapes, starts = inputs.shapes, None
    if problem.levels is None:
        shapes, starts = put(shapes), put(np.array(reference.contiguous_starts(shapes), np.int64))
    call = call_of(
        put_value(inputs.value, small), shapes, starts, put(inputs.locations),
        None if inputs.weights is None else put(inputs.weights),
        put(inputs.grad_output, small.row["alignment"]),
        put(inputs.references) if problem.fused else None,
        small.wanted or ALL, variant=problem.variant, deterministic=problem.deterministic,
        query_lengths=None if small.lengths is None else put(np.array(small.lengths)),
    )  # fmt: skip
    assert call.problem == problem  # the one that the planner was asked about
    return call


def check_gradients(small, inputs, got, want):
    """Those that are computed are close to the reference, the others are not there."""
    fused = isinstance(inputs, FusedInputs)
    like = (inputs.value, inputs.locations, inputs.weights, *([inputs.references] if fused else []))
    dtypes = [None if array is None else array.dtype for array in like]
    computed = small.problem.computed(small.wanted)
    for name, array, exact, dtype in zip(computed._fields, got, want, dtypes, strict=False):
        assert (array is not None) == (getattr(computed, name) and exact is not None), name
        if array is None:
            continue
        found = get(array, dtype)
        if name == "locations" and not fused:
            points = small.problem.variant.num_points
            found, exact = (cases.pixel_units(grad, inputs.shapes, points) for grad in (found, exact))
        assert_close(found, exact, dtype.name, name)


def rows():
    """All of them; without a GPU one in forty, and the others among the longer proofs."""
    for number, (row, specs) in enumerate(smallest_calls.specs_by_row()):
        yield pytest.param(row, specs, id=text_of(row), marks=[] if number % 40 == 0 else pytest.mark.long)


@pytest.mark.parametrize(("row", "specs"), list(rows()))
@pytest.mark.usefixtures("device", "bfloat16_as_its_bits")
def test_results_are_right(row, specs, launched, monkeypatch):
    small = smallest_calls.smallest(row, specs)
    smallest_calls.force(monkeypatch, row, specs)
    monkeypatch.setattr(gpu, "of_device", lambda device: small.gpu)
    inputs, want_output, want_grads = inputs_of(small)
    call = call_on_the_gpu(small, inputs)
    if small.forward:
        output = get(run.forward(call), inputs.value.dtype)
        assert_close(output, want_output, small.problem.value_dtype)
    if small.wanted:
        check_gradients(small, inputs, run.backward(call), want_grads)
    assert specs <= set(launched)
