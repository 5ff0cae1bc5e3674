"""Dot products by tensor cores, with every number of lanes per query, with and without aggregation."""

import numpy as np
import pytest

from cupy_msda.call import Wanted
from cupy_msda.cuda import kernels
from tests.helpers import cases, emulator
from tests.helpers.cases import Case
from tests.helpers.tolerance import assert_close

pytestmark = pytest.mark.skipif(emulator.COMPILER is None, reason="needs g++")


@pytest.mark.parametrize("aggregated", [False, True])
@pytest.mark.parametrize(("D", "location"), [(32, "float16"), (64, "float32"), (128, "float16"), (256, "float32")])
def test_gradients_of_samples(D, aggregated, location, monkeypatch):
    case = Case("tensor_cores", levels=((5, 6), (2, 2)), N=1, M=2, D=D, P=4, queries=70 if aggregated else 9)
    inputs = case.inputs("float16", location, seed=33)
    monkeypatch.setattr(emulator, "is_dense", lambda _: True)
    got = emulator.backward(inputs, wanted=Wanted(value=aggregated), sanitize=D == 64)
    for grad, want in zip(got[1:], cases.expected(inputs)[1][1:], strict=True):
        assert_close(grad, want, location)


@pytest.mark.parametrize("aggregated", [False, True])
@pytest.mark.parametrize(("D", "dtype"), [(32, "float16"), (64, "bfloat16"), (128, "float16"), (256, "bfloat16")])
def test_without_tensor_cores(D, dtype, aggregated, monkeypatch):
    """As on sm_75, where 16-bit products take other instructions."""
    text = kernels.source("backward")
    without = text.replace("has_mma = true", "has_mma = false")
    assert without != text
    case = Case("fma", levels=((5, 6), (2, 2)), N=1, M=2, D=D, P=4, queries=70)
    inputs = case.inputs(dtype, "float32", seed=35)
    monkeypatch.setattr(emulator, "is_dense", lambda _: True)
    got = emulator.backward(inputs, wanted=Wanted(value=aggregated), text=without)
    for grad, want in zip(got[1:], cases.expected(inputs)[1][1:], strict=True):
        assert_close(grad, want, "float32")


@pytest.mark.parametrize("D", [32, 128])
@pytest.mark.parametrize("wanted", [Wanted(locations=False), Wanted(weights=False)], ids=cases.gradient_names)
def test_frozen_samples_of_paired_tiles(D, wanted):
    """Rows of value that are no multiple of 16 bytes apart, too."""
    case = Case("frozen", levels=((5, 6), (2, 2)), N=1, M=2, D=D, P=4, queries=70)
    inputs = case.inputs("float16", seed=34)
    want = cases.expected(inputs)[1]
    wide = np.full((1, 34, 2, D + 4), np.nan, np.float16)
    wide[..., :D] = inputs.value
    for value in (inputs.value, wide[..., :D]):
        grads = emulator.backward(inputs._replace(value=value), wanted=wanted)
        assert_close(grads[0], want[0], "float16")
        for grad, exact in zip(grads[1:], want[1:], strict=True):
            if grad is not None:
                assert_close(grad, exact, "float16")
