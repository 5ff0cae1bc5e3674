"""naive.cu and the Python code that launches it, on the CPU: memory is NumPy's, launches are emulated."""

import ctypes
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from cupy_msda import arrays
from cupy_msda.call import ALL
from cupy_msda.cuda import naive
from cupy_msda.cuda.steps import Addresses
from tests.helpers import cases, emulator
from tests.helpers.cases import CASES, DTYPE_PAIRS, PARTIAL_GRADIENTS, VARIANTS, Case
from tests.helpers.tolerance import assert_close

pytestmark = pytest.mark.skipif(emulator.COMPILER is None, reason="needs g++")

SMALL = [case for case in CASES if case.name in ("plain", "one_pixel_levels", "overlapping_levels", "D33")]
FORMS = [
    {"coordinates": 2, "packed": False},
    {"coordinates": 2, "levels": 1, "packed": True},
    {"coordinates": 4, "packed": True},
    {"coordinates": 4, "levels": 1, "packed": False},
]
NAMES = ("grad_value", "grad_locations", "grad_weights", "grad_references")


def address(array):
    return 0 if array is None else array.ctypes.data


@pytest.fixture(autouse=True)
def device(monkeypatch):
    """Launches by the emulator, on addresses of this process."""
    kept = []

    def table(numbers, device, stream):
        kept.append(np.array(numbers, np.int64))
        return address(kept[-1])

    class Result:
        def __init__(self, shape, dtype, like):
            self.array = np.full(shape, np.nan, dtype)
            self.data = address(self.array)

    runtime = SimpleNamespace(memsetAsync=lambda at, byte, nbytes, stream: ctypes.memset(at, byte, nbytes))
    monkeypatch.setattr(arrays, "require_cupy", lambda what: SimpleNamespace(cuda=SimpleNamespace(runtime=runtime)))
    monkeypatch.setattr(naive, "device_table", table)
    monkeypatch.setattr(naive, "Result", Result)
    monkeypatch.setattr(naive, "_run", lambda planned, device: lambda stream, *words: emulator.run(planned, words))


def metadata_of(problem, inputs):
    table = np.array(problem.levels, np.int64).reshape(-1, 3)
    return [np.ascontiguousarray(table[:, :2]), np.ascontiguousarray(table[:, 2])]


def weights_of(problem, locations, weights):
    inside = 2 * problem.K * locations.itemsize if problem.packed else None
    return address(weights) if inside is None else address(locations) + inside


def forward(inputs, lengths=None, **variant):
    problem = emulator.prepare(inputs, False, variant, lengths)
    output = np.full(problem.output_shape, np.nan, inputs.value.dtype)
    shapes, starts = metadata_of(problem, inputs)
    valid = emulator.lengths_of(lengths)
    references = getattr(inputs, "references", None)
    session = SimpleNamespace(
        problem=problem,
        stream=0,
        device=0,
        operands=SimpleNamespace(value=None),
        metadata=lambda: (address(shapes), address(starts)),
        lengths=lambda: address(valid),
        value=SimpleNamespace(data=address(inputs.value)),
        locations=SimpleNamespace(data=address(inputs.locations)),
        weights=weights_of(problem, inputs.locations, inputs.weights),
        references=None if references is None else SimpleNamespace(data=address(references)),
    )
    naive.forward(session, SimpleNamespace(data=address(output)))
    return output


def backward(inputs, lengths=None, wanted=ALL, **variant):
    problem = emulator.prepare(inputs, False, variant, lengths)
    references = getattr(inputs, "references", None)
    if references is not None:
        wanted = wanted._replace(references=True)
    computed = problem.computed(wanted)
    like = (inputs.value, inputs.locations, inputs.weights, references)
    grads = [
        np.full(array.shape, np.nan, array.dtype) if asked and array is not None else None
        for array, asked in zip(like, computed, strict=True)
    ]
    shapes, starts = metadata_of(problem, inputs)
    valid = emulator.lengths_of(lengths)
    steps = naive.NaiveBackward(problem, computed, 0)
    workspace = np.full(steps.workspace // 4, np.nan, np.float32)
    addresses = Addresses(
        value=address(inputs.value),
        locations=address(inputs.locations),
        weights=weights_of(problem, inputs.locations, inputs.weights),
        references=address(references),
        lengths=address(valid),
        grad_output=address(inputs.grad_output),
        grad_value=address(grads[0]),
        grad_locations=address(grads[1]),
        grad_weights=weights_of(problem, grads[1], grads[2]) if grads[1] is not None else address(grads[2]),
        grad_references=address(grads[3]),
        workspace=address(workspace),
    )
    steps.run(0, (address(shapes), address(starts)), addresses)
    return grads


def check_gradients(inputs, grads, want, dtypes, num_points=None):
    for name, got, expected, dtype in zip(NAMES, grads, want, dtypes, strict=False):
        if name == "grad_locations" and not hasattr(inputs, "references"):
            got, expected = (cases.pixel_units(grad, inputs.shapes, num_points) for grad in (got, expected))
        if expected is not None:
            assert_close(got, expected, dtype, name)


def check(case, pair=("float32", "float32"), seed=0):
    inputs = case.inputs(*pair, seed=seed)
    want_output, want_grads = cases.expected(inputs, **case.variant)
    assert_close(forward(inputs, **case.variant), want_output, pair[0])
    grads = backward(inputs, **case.variant)
    check_gradients(inputs, grads, want_grads, (pair[0], pair[1], pair[1]), case.variant.get("num_points"))


@pytest.mark.parametrize("case", SMALL, ids=str)
def test_each_size_computes_the_reference(case):
    check(case)


@pytest.mark.parametrize("pair", DTYPE_PAIRS, ids="-".join)
def test_each_dtype_computes_the_reference(pair):
    check(SMALL[0], pair, seed=1)


@pytest.mark.parametrize("case", VARIANTS, ids=str)
def test_each_variant_computes_the_reference(case):
    check(case, seed=2)


@pytest.mark.parametrize("pair", [DTYPE_PAIRS[1], DTYPE_PAIRS[3]], ids="-".join)
@pytest.mark.parametrize("form", FORMS, ids=str)
def test_each_fused_form_computes_the_reference(form, pair):
    inputs = cases.to_fused(SMALL[0].inputs(*pair), **form)
    want_output, want_grads = cases.expected_fused(inputs)
    assert_close(forward(inputs), want_output, pair[0])
    dtypes = (pair[0], pair[1], pair[1], inputs.references.dtype.name)
    check_gradients(inputs, backward(inputs), want_grads, dtypes)


@pytest.mark.parametrize("wanted", PARTIAL_GRADIENTS, ids=cases.gradient_names)
def test_only_the_gradients_that_are_wanted_are_computed(wanted):
    inputs = SMALL[0].inputs("float16")
    want = backward(inputs)
    for got, all_, asked in zip(backward(inputs, wanted=wanted), want, wanted, strict=True):
        assert (got is not None) == asked
        if asked:
            np.testing.assert_allclose(got.astype(float), all_.astype(float), rtol=2e-3, atol=1e-4)


def test_queries_beyond_the_valid_ones_give_zeros():
    case, lengths = SMALL[0], (2, 0)
    for inputs in (case.inputs(), cases.to_fused(case.inputs())):
        output, grads = forward(inputs, lengths), backward(inputs, lengths)
        for n, length in enumerate(lengths):
            assert np.any(output[n, :length]) or not length
            assert not output[n, length:].any()
            for grad in grads[1:]:
                assert grad is None or not grad[n, length:].any()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_sample_out_of_bounds_gives_zero_and_no_gradient(bad):
    inputs = Case("one", N=1, M=1, queries=1).inputs()
    inputs.locations[..., 0, 0, :] = bad
    inputs.weights[..., 0, 0] = np.nan
    want_output, want_grads = cases.expected(inputs)
    assert_close(forward(inputs), want_output, "float32")
    check_gradients(inputs, backward(inputs), want_grads, ("float32",) * 3)


def test_a_deterministic_backward_is_refused():
    problem = replace(emulator.prepare(SMALL[0].inputs(), False, None), deterministic=True)
    with pytest.raises(NotImplementedError, match="deterministic: expected False with CUPY_MSDA_KERNELS=naive"):
        naive.NaiveBackward(problem, ALL, 0)


@pytest.mark.parametrize(("setting", "selected"), [(None, False), ("fast", False), ("naive", True)])
def test_the_environment_selects_these_kernels(monkeypatch, setting, selected):
    if setting is None:
        monkeypatch.delenv("CUPY_MSDA_KERNELS", raising=False)
    else:
        monkeypatch.setenv("CUPY_MSDA_KERNELS", setting)
    assert naive.selected() == selected


def test_another_setting_is_refused(monkeypatch):
    monkeypatch.setenv("CUPY_MSDA_KERNELS", "slow")
    with pytest.raises(ValueError, match="CUPY_MSDA_KERNELS: expected 'fast' or 'naive', got 'slow'"):
        naive.selected()
