"""The handlers of JAX on an emulated GPU: call frames in, launches out, held against the float64 reference."""

import numpy as np
import pytest

from cupy_msda.jax import call_frame, cuda_calls, handler
from tests.helpers import emulated_gpu, emulator
from tests.helpers.cases import VARIANTS, Case, to_fused
from tests.helpers.emulated_calls import FUSED, HALF, PACKED_BOXES, PLAIN, wanted
from tests.helpers.emulated_xla import EmulatedXla, operation_of
from tests.helpers.tolerance import assert_close

pytestmark = pytest.mark.skipif(emulator.COMPILER is None, reason="needs g++")
gpu = pytest.fixture(emulated_gpu.fixture)
ALL = ("value", "locations", "weights", "references")
SORTED = Case("sorted", M=3, queries=60)


@pytest.fixture(autouse=True)
def no_launches(monkeypatch):
    monkeypatch.setattr(cuda_calls, "_launches", {})
    monkeypatch.setattr(call_frame, "_functions", {})


class Checked:
    """Calls of one problem, forward and backward, whose results are compared."""

    def __init__(self, gpu, case=PLAIN, form=None, pair=("float32", "float32"), device=0, **options):
        self.inputs = case.inputs(*pair)
        if form is not None:
            self.inputs = to_fused(self.inputs, num_points=case.variant.get("num_points"), **form)
        self.gpu, self.xla, self.pair, self.device = gpu, EmulatedXla(gpu, device), pair, device
        self.options, self.traced = options | case.variant, options.pop("traced", False)
        self.options.pop("traced", None)
        self.expected = wanted(self.inputs, **self.options_of_reference())

    def options_of_reference(self):
        return {name: value for name, value in self.options.items() if name != "deterministic"}

    def operation(self, names=None):
        options = dict(self.options)
        return operation_of(self.inputs, wanted=names, traced=self.traced, **options)

    def run(self, operation, arrays, workspace=0, target=handler.TARGET):
        given = [self.gpu.put(np.ascontiguousarray(array), self.device).host for array in arrays.values()]
        shapes = {name: array.shape for name, array in arrays.items()}
        dtypes = {name: array.dtype.name for name, array in arrays.items()}
        made = [
            self.gpu.put(np.zeros(shape, given[0].dtype if name is None else name), self.device).host
            for shape, name in operation.results(shapes, dtypes)
        ]
        extra = [self.gpu.empty((workspace,), np.uint8, self.device)] if workspace else []
        for array in made:
            array.view(np.uint8)[...] = 0xFF
        self.xla.call(operation, given, [*made, *extra], target)
        self.gpu.check_order()
        return made

    def check_forward(self):
        operation, arrays = self.operation()
        (output,) = self.run(operation, arrays)
        assert self.xla.error is None
        assert_close(output, self.expected[0], self.pair[0])

    def check_backward(self, names=ALL, in_result=False):
        operation, arrays = self.operation([name for name in names if name in self.operation()[0].differentiable])
        workspace = 0
        if in_result:
            shapes = {name: array.shape for name, array in arrays.items()}
            dtypes = {name: array.dtype.name for name, array in arrays.items()}
            problem = operation.problem(shapes, dtypes, ("cuda", self.device))
            workspace = cuda_calls.prepare(operation, problem)
        results = self.run(operation, arrays, workspace)
        assert self.xla.error is None
        assert not self.xla.allocated
        expected = dict(zip(ALL, (*self.expected[1], None)[:4], strict=True))
        for name, result in zip(operation.gradients, results, strict=True):
            dtype = self.pair[0] if name == "value" else self.pair[1]
            assert_close(result, expected[name].reshape(result.shape), dtype, name)
        return workspace


@pytest.mark.parametrize("traced", [False, True])
@pytest.mark.parametrize("form", [None, FUSED, PACKED_BOXES], ids=str)
def test_each_form_is_right_whenever_it_is_called(gpu, form, traced):
    calls = Checked(gpu, form=form, traced=traced)
    for _ in range(2):
        calls.check_forward()
        calls.check_backward()
    assert len(cuda_calls._launches) == 2


@pytest.mark.parametrize("case", VARIANTS[:5], ids=str)
def test_each_variant(gpu, case):
    calls = Checked(gpu, case)
    calls.check_forward()
    calls.check_backward()


def test_the_second_gpu(gpu):
    calls = Checked(gpu, device=1)
    calls.check_forward()
    calls.check_backward()
    assert {launch.device for launch in gpu.launches} == {1}


def test_a_workspace_that_is_too_small_is_refused(gpu):
    """As of a function that was compiled before tuning."""
    calls = Checked(gpu, deterministic=True)
    operation, arrays = calls.operation(["value"])
    calls.run(operation, arrays, workspace=64)
    assert "expected a workspace of" in str(calls.xla.error)
    assert "jax.clear_caches()" in str(calls.xla.error)
    assert not gpu.launches


def test_the_workspace_is_a_result_or_comes_from_xla(gpu):
    calls = Checked(gpu, pair=HALF, deterministic=True)
    workspace = calls.check_backward(in_result=True)
    assert workspace
    assert calls.xla.requested == 0
    calls.check_backward()
    assert calls.xla.requested == workspace
