"""On a GPU: tuning ends, what it finds is right, and deterministic calls keep their bits."""

import random

import numpy as np
import pytest

import cupy_msda
from cupy_msda import Sizes
from cupy_msda.call import ALL
from cupy_msda.cuda.tuning import loaded
from cupy_msda.cuda.tuning.tuned import Choices
from tests.helpers import cases, drawn_entries
from tests.helpers.cases import Case
from tests.helpers.tolerance import assert_close

pytestmark = pytest.mark.gpu

LEVELS = ((40, 50), (20, 25))
CASES = [Case("pixels", levels=LEVELS, N=2, M=8, D=32), Case("queries", levels=LEVELS, N=2, M=8, D=32, queries=90)]


@pytest.fixture
def cupy(monkeypatch, tmp_path):
    monkeypatch.setenv("CUPY_MSDA_TUNING", str(tmp_path))
    loaded.reload()
    yield pytest.importorskip("cupy")
    monkeypatch.undo()
    loaded.reload()


def results(cupy, inputs, **options):
    """Output and gradients on the GPU, as NumPy arrays."""
    value, locations, weights, grad_output = map(
        cupy.asarray, (inputs.value, inputs.locations, inputs.weights, inputs.grad_output)
    )
    samples = (value, inputs.shapes, None, locations, weights)
    output = cupy_msda.ms_deform_attn(*samples, **options)
    return [part.get() for part in (output, *cupy_msda.ms_deform_attn_backward(*samples, grad_output, 64, **options))]


def check(found, inputs):
    output, grads = cases.expected(inputs)
    assert_close(found[0], output, "float32")
    for name, got, want in zip(("grad_value", "grad_locations", "grad_weights"), found[1:], grads, strict=True):
        if name == "grad_locations":
            got, want = (cases.pixel_units(grad, inputs.shapes) for grad in (got, want))
        assert_close(got, want, "float32", name)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_tuned_calls_are_right_and_keep_their_deterministic_bits(cupy, case):
    inputs = case.inputs()
    with cupy_msda.record() as calls:
        before = results(cupy, inputs, deterministic=True)
    found = cupy_msda.tune(calls, budget=25, progress=False)
    assert {entry.subject.name for entry in found} >= {"forward", "samples", "bucket_sort", "reduce_buckets"}
    assert all(entry.default_us > 0 and entry.tuned_us <= entry.default_us for entry in found)
    check(results(cupy, inputs), inputs)
    for one, other in zip(before, results(cupy, inputs, deterministic=True), strict=True):
        np.testing.assert_array_equal(one, other)


def test_every_kind_of_call_is_tuned(cupy):
    sizes = [Sizes(LEVELS, N=2, reference_coordinates=4, packed=True), Sizes(LEVELS, Q=40, ragged=True, D=30)]
    assert cupy_msda.tune(sizes, ["bfloat16", "float64"], budget=40, progress=False)


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("case", CASES, ids=str)
def test_drawn_configurations_are_right(cupy, monkeypatch, case, seed):
    """Whatever a tuning file says; deterministic calls have the bits of the default."""
    inputs, pick = case.inputs(), random.Random(seed)
    with cupy_msda.record() as calls:
        before = results(cupy, inputs, deterministic=True)
        results(cupy, inputs, deterministic=False)
    problems = {call.problem for call in calls}
    drawn = [drawn_entries.choices_of(pick, problem, ALL).entries for problem in sorted(problems, key=str)]
    monkeypatch.setattr(loaded, "_choices", {0: Choices(entry for entries in drawn for entry in entries)})
    loaded.forget_launches()
    check(results(cupy, inputs, deterministic=False), inputs)
    for one, other in zip(before, results(cupy, inputs, deterministic=True), strict=True):
        np.testing.assert_array_equal(one, other)
