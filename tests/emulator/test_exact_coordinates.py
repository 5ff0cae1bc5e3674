"""Samples exactly on a pixel, half-way between two and on an edge, where a comparison that is off by equality shows."""

import itertools

import numpy as np
import pytest

import cupy_msda
from cupy_msda.cuda.gpu import H100
from tests.helpers import cases, emulator
from tests.helpers.cases import Inputs
from tests.helpers.tolerance import assert_close

H, W = 4, 8  # (k + 0.5) / size is exact, and with align_corners k / (size - 1) on a level of 5 x 9
VARIANTS = [
    {},
    {"align_corners": True},
    {"padding_mode": "border"},
    {"padding_mode": "border", "align_corners": True},
    {"interpolation": "nearest"},
]


def coordinates(size, corners):
    """Normalised ones of every half pixel, from before the first to after the last."""
    pixels = np.arange(-3, 2 * size + 3) / 2
    return pixels / (size - 1) if corners else (pixels + 0.5) / size


def inputs_of(corners):
    h, w = (H + 1, W + 1) if corners else (H, W)
    rng = np.random.default_rng(3)
    points = np.array(list(itertools.product(coordinates(w, corners), coordinates(h, corners))), np.float32)
    Q = len(points)
    return Inputs(
        rng.standard_normal((1, h * w, 1, 4)).astype(np.float32), np.array([(h, w)]), None,
        points.reshape(1, Q, 1, 1, 1, 2), np.ones((1, Q, 1, 1, 1), np.float32),
        rng.standard_normal((1, Q, 4)).astype(np.float32),
    )  # fmt: skip


def by_numpy(inputs, variant):
    output = cupy_msda.ms_deform_attn(*inputs[:5], **variant)
    return output, cupy_msda.ms_deform_attn_backward(*inputs, 64, **variant)


def by_kernels(inputs, variant):
    return emulator.forward(inputs, variant=variant), emulator.backward(inputs, variant=variant)


PATHS = [
    by_numpy,
    pytest.param(by_kernels, marks=pytest.mark.skipif(emulator.COMPILER is None, reason="needs g++")),
]


@pytest.mark.parametrize("compute", PATHS)
@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_each_sample_computes_the_reference(variant, compute):
    """Sample by sample: one that differs does not vanish among the others."""
    inputs = inputs_of(variant.get("align_corners", False))
    want_output, want_grads = cases.expected(inputs, **variant)
    output, grads = compute(inputs, variant)
    np.testing.assert_allclose(output, want_output, atol=1e-5)
    assert_close(grads[0], want_grads[0], "float32")
    np.testing.assert_allclose(grads[1], want_grads[1], rtol=1e-4, atol=1e-3)
    np.testing.assert_allclose(grads[2], want_grads[2], atol=1e-5)


@pytest.mark.skipif(emulator.COMPILER is None, reason="needs g++")
@pytest.mark.parametrize("gpu", [emulator.SMALL_GPU, H100], ids=["throughput", "latency"])
@pytest.mark.parametrize("shape", [(1, 30_000), (30_000, 1)], ids=str)
def test_the_fraction_keeps_its_bits_on_a_wide_level(shape, gpu):
    """px - floor(px) would have lost log2(W) bits: a thousandth of the value here."""
    for D, pair in ((4, ("float32", "float32")), (32, ("float16", "float32"))):
        case = cases.Case("wide", levels=(shape,), N=1, M=1, D=D, P=2, queries=80)
        inputs = case.inputs(*pair, seed=71)
        want_output, want_grads = cases.expected(inputs)
        assert_close(emulator.forward(inputs, gpu=gpu), want_output, pair[0])
        grads = emulator.backward(inputs, gpu=gpu)
        assert_close(grads[2], want_grads[2], pair[1], "grad_weights")
        assert_close(emulator.summation(inputs), want_grads[0], pair[0])
