"""Coordinates on wide levels, and on sizes that are no powers of two: bits of the fraction, and of the pixel."""

import numpy as np
import pytest

from tests.helpers import cases
from tests.helpers.cases import Case
from tests.helpers.checks import run_operator
from tests.helpers.tolerance import assert_close


@pytest.mark.parametrize("shape", [(1, 30_000), (30_000, 1), (2, 8193)], ids=str)
def test_the_fraction_keeps_its_bits_on_a_wide_level(main_backend, shape):
    """px - floor(px) would have lost log2(W) bits: a thousandth of the value here."""
    case = Case("wide", levels=(shape,), N=1, M=1, D=4, P=2, queries=300)
    inputs = case.inputs(seed=71)
    want_output, want_grads = cases.expected(inputs)
    output, grads = run_operator(main_backend, inputs)
    assert_close(output, want_output, "float32")
    assert_close(grads[0], want_grads[0], "float32")
    assert_close(grads[2], want_grads[2], "float32")


@pytest.mark.parametrize("size", [3, 100, 167, 393])
@pytest.mark.parametrize("axis", [0, 1])
def test_nearest_takes_the_pixel_of_the_formula_in_float32(main_backend, size, axis):
    """int(x * W + 0.5) with each step rounded: at the boundaries of pixels and one float around them."""
    boundaries = ((np.arange(size + 1) - 0.5) / size).astype(np.float32)
    around = [boundaries, *(np.nextafter(boundaries, np.float32(side)) for side in (-9, 9))]
    x = np.concatenate([*around, ((np.arange(size) + 0.5) / size).astype(np.float32)])
    pixel = np.floor(x * np.float32(size) + np.float32(0.5)).clip(0, size - 1)
    shape = (1, size) if axis == 0 else (size, 1)
    inputs = Case("nearest", levels=(shape,), N=1, M=1, D=1, P=1, queries=len(x)).inputs(seed=72)
    inputs.value[0, :, 0, 0] = np.arange(size)
    inputs.locations[0, :, 0, 0, 0, axis], inputs.locations[0, :, 0, 0, 0, 1 - axis] = x, 0.25
    inputs.weights[:] = 1
    output, _ = run_operator(main_backend, inputs, interpolation="nearest")
    np.testing.assert_array_equal(np.asarray(output)[0, :, 0], pixel)
