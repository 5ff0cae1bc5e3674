"""The means of tests/fuzz: its reference agrees with plain loops, and the comparison finds what is wrong."""

import json
import random
from dataclasses import replace

import numpy as np
import pytest

from tests.fuzz.__main__ import main
from tests.fuzz.compare import Outcome, compare, difference
from tests.fuzz.draw import LAYOUTS, Case, Form, draw
from tests.fuzz.emulated import run_emulated
from tests.fuzz.expected import expected
from tests.fuzz.hostile import fitting_levels, with_hostile_metadata
from tests.fuzz.passing import Memory, laid_out, to_torch
from tests.fuzz.shrink import code, shrink
from tests.helpers import emulator, reference
from tests.helpers.cases import dtype_of


def loops(case):
    """Output and gradients by the float64 loops, in the shapes of a Case."""
    form, arrays = case.form, case.arrays
    shapes = np.array(case.levels, np.int64).reshape(-1, 2)
    arrays = {name: array.astype(np.float64) for name, array in arrays.items()}
    for image, length in enumerate(case.lengths or ()):  # zeros where nothing is read
        for name in set(arrays) - {"value"}:
            arrays[name][image, length:] = 0
    locations, weights = arrays["locations"], arrays["weights"]
    if form.fused:
        locations, weights = reference.locations_and_weights(
            shapes, arrays["references"], locations, weights, form.points
        )
        for image, length in enumerate(case.lengths or ()):
            weights[image, length:] = 0
    N, Q = weights.shape[:2]
    parts = (arrays["value"], shapes, case.contiguous_starts, locations, weights)
    options = {"num_points": form.points} | form.variant
    output = reference.forward(*parts, **options)
    grads = reference.backward(*parts, arrays["grad_output"].reshape(N, Q, -1), **options)
    found = {"output": output.reshape(*arrays["grad_output"].shape), "value": grads[0]}
    found |= {"locations": grads[1], "weights": grads[2]}
    if form.fused:
        of_samples = (arrays["locations"], weights, form.points, grads[1], grads[2])
        grads = reference.fused_backward(shapes, arrays["references"], *of_samples)
        found |= dict(zip(("references", "locations", "weights"), grads, strict=True))
    for image, length in enumerate(case.lengths or ()):
        for name in set(found) - {"value"}:
            found[name][image, length:] = 0
    return found


@pytest.mark.parametrize("chunk", range(4))
def test_the_reference_agrees_with_plain_loops(chunk):
    for seed in range(40 * chunk, 40 * (chunk + 1)):
        case = draw(seed)
        if case.invalid or 0 in case.sizes.values() or case.sizes["S"] > 1000:
            continue
        want = expected(case)
        with np.errstate(all="ignore"):
            got = {name: numbers.astype(dtype_of(case.form.dtype_of(name))) for name, numbers in loops(case).items()}
        for name, narrow in got.items():
            assert not (problem := difference(narrow, want[name])), f"seed {seed}, {name}: {problem}"


def test_bounds_are_tight():
    """They are near the tolerance, measured by the largest number of a result, of nearly all finite calls."""
    ratios = []
    for seed in range(150):
        case = draw(seed)
        if case.style == "finite" and not case.invalid and case.form.dtypes[0] == "float32":
            want = expected(case)["output"]
            if want.numbers.size and abs(want.numbers).max() > 0:
                ratios.append(want.bound.max() / abs(want.numbers).max())
    assert len(ratios) > 10
    assert np.median(ratios) < 1e-4


def right_outcome(case):
    """What a path without faults gives."""
    found = {}
    for name, one in expected(case).items():
        found[name] = one.numbers.astype(dtype_of(case.form.dtype_of(name)))
    return Outcome(found)


def changed(outcome, name, at, number):
    results = {key: array.copy() for key, array in outcome.results.items()}
    results[name].reshape(-1)[at] = number
    return Outcome(results)


def plain_case():
    seeds = iter(range(10_000))
    while True:
        case = draw(next(seeds))
        if case.style == "finite" and not case.invalid and 0 not in case.sizes.values() and not case.form.fused:
            return case


@pytest.mark.parametrize("name", ["output", "value", "locations", "weights"])
def test_a_wrong_number_is_found(name):
    case = plain_case()
    right = right_outcome(case)
    assert compare(case, {"one": right, "other": right}, expected(case)) == []
    at = int(abs(right.results[name]).argmax())
    true = right.results[name].reshape(-1)[at]
    for number in (np.nan, np.inf, -true, true * (1.05 if true.dtype.itemsize == 2 else 1.001)):
        wrong = changed(right, name, at, number)
        kinds = {failure.kind for failure in compare(case, {"one": right, "other": wrong}, expected(case))}
        assert kinds == {"contract", "disagree"}


def test_a_number_in_the_place_of_nan_is_found():
    case = plain_case()
    case.arrays["value"][:] = np.nan
    want = expected(case)
    at = int(want["output"].nan.argmax())
    assert want["output"].nan.any()
    wrong = changed(right_outcome(case), "output", at, 0)
    assert [failure.kind for failure in compare(case, {"one": wrong}, want)] == ["contract"]


@pytest.mark.parametrize(("name", "kinds"), [("weights", set()), ("grad_output", {"disagree"})])
def test_an_infinite_weight_may_reach_the_gradient_of_value_as_nan(name, kinds):
    """The contract says so: the kernels subtract a * fraction from a."""
    case = plain_case()
    case.arrays[name][:] = np.inf
    right = right_outcome(case)
    infinite = np.flatnonzero(np.isinf(right.results["value"]))
    assert len(infinite)
    other = changed(right, "value", infinite, np.nan)
    found = compare(case, {"one": right, "other": other}, expected(case))
    assert {failure.kind for failure in found} == kinds


def test_one_path_that_raises_is_found():
    case = plain_case()
    outcomes = {"one": right_outcome(case), "other": Outcome(error=ValueError("no"))}
    assert [failure.kind for failure in compare(case, outcomes, expected(case))] == ["error"]
    refused = {"one": Outcome(error=ValueError("no")), "other": Outcome(error=RuntimeError("no"))}
    assert [failure.kind for failure in compare(case, refused, None)] == ["refusal"]
    assert compare(case, {"one": refused["one"], "other": refused["one"]}, None) == []


def test_an_input_that_is_written_to_is_found():
    memory = Memory(plain_case())
    assert memory.written() == []
    memory.arrays["weights"].flat[0] += 1
    assert memory.written() == ["weights"]


# ---- rounding next to a kink -----------------------------------------------------------------------------------------


def one_sample(width, padding_mode, references, offset):
    """A fused call of one sample with align_corners, which `offset` moves along the one row of its level."""
    coordinates = len(references)
    form = Form(
        M=1, D=1, points=(1,), per_level=False, dtypes=("float32",) * 3, padding_mode=padding_mode, align_corners=True,
        coordinates=coordinates, reference_levels=1,
    )  # fmt: skip
    arrays = {"value": np.arange(1, width + 1).reshape(1, width, 1, 1) ** 2, "weights": np.zeros((1, 1, 1, 1))}
    arrays |= {"locations": np.array([offset, 0]).reshape(1, 1, 1, 1, 2), "grad_output": np.ones((1, 1, 1, 1))}
    arrays["references"] = np.array(references).reshape(1, 1, 1, coordinates)
    arrays = {name: array.astype(np.float32) for name, array in arrays.items()}
    return Case(0, form, ((1, width),), None, None, arrays, {}, {}, form.names)


@pytest.mark.skipif(emulator.COMPILER is None, reason="needs g++")
@pytest.mark.parametrize(
    ("width", "padding_mode", "references", "offset"),
    [
        (8, "zeros", (0.125, 0.5), -2.142857074737549),  # -1 in the kernel, which is outside
        (4, "zeros", (0.875, 0.5), -2.1666667461395264),
        (6, "border", (0.5, 0.5, 0.25, 0.5), -2.4000000953674316),
    ],
)
def test_the_offset_in_pixels_may_be_rounded(width, padding_mode, references, offset):
    """float32 has the location in pixels exactly, but not the offset: a kernel may be on the other side of the kink."""
    case = one_sample(width, padding_mode, references, offset)
    outcomes = run_emulated(case)
    formula = {name: numbers.astype(np.float32) for name, numbers in loops(case).items()}
    assert abs(outcomes["emulated"].results["locations"] - formula["locations"]).max() > 0.1
    want = expected(case)
    assert compare(case, outcomes | {"formula": Outcome(formula)}, want) == []
    assert want["output"].bound.max() < 1e-3


@pytest.mark.parametrize(
    ("width", "padding_mode", "references", "offset", "right"),
    [
        (4, "zeros", (0.5, 0.5), -2.0, 1),  # the pixel to the right of the sample
        (8, "border", (0.5, 0.5), 0.0, 4),
        (5, "zeros", (0.5, 0.5, 0.25, 0.5), 2.0, 4),
        (7, "border", (0.75, 0.5, 0.5, 0.5), -1.0, 4),
    ],
)
def test_a_location_without_rounding_is_on_one_side(width, padding_mode, references, offset, right):
    """Then a kernel that is on the other side is wrong, and NaN reaches the output from a pixel of weight 0."""
    case = one_sample(width, padding_mode, references, offset)
    want = expected(case)
    assert want["locations"].bound.max() < 1e-2
    assert not want["output"].nan.any()
    case.arrays["value"][0, right] = np.nan
    assert expected(case)["output"].nan.all()


# ---- layouts, hostile metadata, shrinking, records -------------------------------------------------------------------


@pytest.mark.parametrize("layout", [*(one for one in LAYOUTS if one != "expanded"), "contiguous"])
def test_a_layout_keeps_the_numbers(layout):
    array = np.random.default_rng(0).standard_normal((3, 4, 2, 5))
    strided = laid_out(array, layout)
    np.testing.assert_array_equal(strided, array)
    np.testing.assert_array_equal(to_torch(strided, layout).resolve_neg().numpy(), array)


def test_hostile_levels_fit_as_the_kernels_count():
    case = replace(plain_case(), starts=None)
    S = case.sizes["S"]
    fits = fitting_levels(replace(case, levels=((1, 1), (2**32, 2**32), (1, S - 1), (-1, 2))))
    assert fits == [(1, 1, 0), None, (1, S - 1, 1), None]
    pick = random.Random(0)
    hostile = [with_hostile_metadata(case, pick) for _ in range(50)]
    assert any(None in fitting_levels(one) for one in hostile)


def test_a_failing_call_becomes_small_and_code():
    case = draw(9)

    def fails(one):
        return (one.arrays["weights"] > 0.5).any()

    small = shrink(case, fails)
    assert fails(small)
    assert small.arrays["weights"].size == 1
    assert "ms_deform_attn" in code(small)


def test_a_record_counts_every_call_and_is_completed(tmp_path, capsys):
    path = tmp_path / "record.json"
    command = ["--seed", "3", "--cases", "12", "--paths", "array", "eager", "--workers", "1", "--out", str(path)]
    main(command)
    record = json.loads(path.read_text())
    assert record["cases"] == 12
    assert record["paths"]["eager"]["calls"] == 12
    assert record["provenance"]["date"]
    before = record["paths"]
    main(command)  # nothing is left to do
    assert json.loads(path.read_text())["paths"] == before
    assert "12 of 12 calls" in capsys.readouterr().out
