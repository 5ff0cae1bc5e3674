"""NaN, infinity and huge numbers in every input of the CUDA sources, run on the CPU: against the reference."""

import itertools

import pytest

from cupy_msda.call import Wanted
from cupy_msda.cuda import plan
from cupy_msda.cuda.gpu import H100
from tests.helpers import emulated_naive, emulator, non_finite
from tests.helpers.emulator import SMALL_GPU
from tests.helpers.non_finite import FUSED_FORMS, FUSED_KINDS, PLAIN_KINDS, VARIANTS

pytestmark = pytest.mark.skipif(emulator.COMPILER is None, reason="needs g++")

PAIRS = (("float32", "float32"), ("float64", "float64"), ("float16", "float16"), ("bfloat16", "float32"))
# Pixels, channels, points and GPU of a problem. Many samples per pixel: masked neighbours where queries are pixels,
# tensor cores, aggregation, a reduction by blocks. Few: lane groups, atomics, a reduction by warps.
MANY, FEW = (64, 32, 1, SMALL_GPU), (400, 8, 2, H100)


def check(name, form, pair, shape):
    """Every kind of problem of one variant; `form` is one of FUSED_FORMS, or None for a plain call."""
    S, D, P, gpu = shape
    variant = VARIANTS[name]
    for kind in FUSED_KINDS if form else PLAIN_KINDS:
        inputs = non_finite.fused(kind, form, pair, S, D) if form else non_finite.plain(kind, pair, S, D, P)
        compare = non_finite.check_fused if form else non_finite.check_plain
        output = emulator.forward(inputs, gpu=gpu, variant=variant)
        wanted = Wanted(references=form is not None)
        grads = emulator.backward(inputs, gpu=gpu, variant=variant, wanted=wanted)
        want = compare(output, grads, inputs, pair, **variant)
        non_finite.assert_same(emulator.summation(inputs, variant=variant), want[0], pair[0], "sorted")


def choices(*axes, short):
    """The product of the axes; what `short` refuses is among the longer proofs."""
    return [
        pytest.param(*choice, marks=() if short(*choice) else pytest.mark.long) for choice in itertools.product(*axes)
    ]


def test_problems_reach_every_path():
    many, few = non_finite.plain("locations", S=64, D=32), non_finite.plain("locations", S=400, P=2)
    planned, other = emulator.prepare(many, False, None), emulator.prepare(few, False, None)
    assert plan.forward(planned, 16, SMALL_GPU).spec.masked_neighbours
    assert plan.backward(planned, 16, SMALL_GPU, Wanted(), emulator.is_dense(planned)).spec.aggregation_bits
    assert plan.forward(other, 16, H100).spec.lane_groups > 1
    assert not emulator.is_dense(other)


@pytest.mark.parametrize(("name", "pair"), choices(VARIANTS, PAIRS, short=lambda name, pair: pair == PAIRS[0]), ids=str)
def test_plain_call_with_many_samples_per_pixel(name, pair):
    check(name, None, pair, MANY)


@pytest.mark.parametrize(
    ("name", "pair"),
    choices(VARIANTS, PAIRS, short=lambda name, pair: name == "border, align_corners" and pair == PAIRS[1]),
    ids=str,
)
def test_plain_call_with_few_samples_per_pixel(name, pair):
    check(name, None, pair, FEW)


@pytest.mark.parametrize(
    ("name", "form", "pair"),
    choices(
        VARIANTS,
        FUSED_FORMS,
        PAIRS,
        short=lambda name, form, pair: (
            pair == PAIRS[0]
            and (name, form) in (("zeros", "points"), ("zeros", "boxes"), ("border, align_corners", "boxes"))
        ),
    ),
    ids=str,
)
def test_fused_call_with_many_samples_per_pixel(name, form, pair):
    check(name, form, pair, MANY)


@pytest.mark.parametrize(
    ("name", "form", "pair"),
    choices(
        VARIANTS,
        FUSED_FORMS,
        PAIRS,
        short=lambda *choice: choice == ("border, align_corners", "one point, packed", PAIRS[0]),
    ),
    ids=str,
)
def test_fused_call_with_few_samples_per_pixel(name, form, pair):
    check(name, form, pair, FEW)


@pytest.mark.parametrize(("name", "pair"), choices(VARIANTS, PAIRS, short=lambda name, pair: pair == PAIRS[0]), ids=str)
def test_naive_kernels(monkeypatch, name, pair):
    emulated_naive.device(monkeypatch)
    variant = VARIANTS[name]
    for kind in PLAIN_KINDS:
        inputs = non_finite.plain(kind, pair)
        output, grads = emulated_naive.forward(inputs, **variant), emulated_naive.backward(inputs, **variant)
        non_finite.check_plain(output, grads[:3], inputs, pair, **variant)
    for form, kind in itertools.product(FUSED_FORMS, FUSED_KINDS):
        inputs = non_finite.fused(kind, form, pair)
        output, grads = emulated_naive.forward(inputs, **variant), emulated_naive.backward(inputs, **variant)
        non_finite.check_fused(output, grads, inputs, pair, **variant)
