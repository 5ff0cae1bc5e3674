"""The warm-up compiles what later calls launch, and refuses what is no call."""

import numpy as np
import pytest

import cupy_msda
from cupy_msda import Sizes, arrays
from cupy_msda.call import ALL, FusedFrontEnd, Problem
from cupy_msda.cuda import plan, plan_backward, warmup
from cupy_msda.cuda.gpu import H100

ENCODER = Sizes(levels=((20, 30), (10, 15)), N=2)
DECODER = Sizes(levels=((20, 30), (10, 15)), N=2, Q=300)


def specs(sizes, dtypes, backward=True):
    return {launch.spec for launch in warmup.launches(sizes, dtypes, device=0, backward=backward, gpu=H100)}


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("location_dtype", ["float32", None])
@pytest.mark.parametrize("on_the_host", [True, False])
@pytest.mark.parametrize("Q", [750, 300])
def test_what_a_call_launches_is_compiled(dtype, location_dtype, on_the_host, Q):
    found = specs([ENCODER, DECODER], [dtype])
    levels = ((20, 30, 0), (10, 15, 600)) if on_the_host else None
    call = Problem(2, 750, 8, 32, 2, 4, Q, dtype, location_dtype or dtype, ("cuda", 0), levels)
    launches = [plan.forward(call, 16, H100), *plan_backward.backward(call, 16, H100).launches]
    assert {launch.spec for launch in launches} <= found


def test_sizes_share_kernels():
    more = [Sizes(levels=((100 + i, 160), (50, 80)), N=2 + i) for i in range(4)]
    assert len(specs(more, ["float32"])) == len(specs(more[:1], ["float32"]))


def test_without_the_backward_only_the_forward_is_compiled():
    assert {spec.kernel for spec in specs([ENCODER], ["float16"], backward=False)} == {"forward"}


@pytest.mark.parametrize(
    ("sizes", "dtypes", "error", "message"),
    [
        (
            [ENCODER],
            ["int8"],
            TypeError,
            "dtypes: expected float16, bfloat16, float32, float64, float16/float32 or bfloat16/float32, got 'int8'",
        ),
    ],
)
def test_what_is_no_call_is_refused(sizes, dtypes, error, message):
    with pytest.raises(error, match=message):
        specs(sizes, dtypes)


def test_without_a_gpu_it_says_why(monkeypatch):
    monkeypatch.setattr(arrays, "cuda_unavailable", lambda: "CuPy finds no CUDA device")
    with pytest.raises(RuntimeError, match="warmup: CuPy finds no CUDA device"):
        cupy_msda.warmup(ENCODER)


@pytest.mark.parametrize(("progress", "count", "shown"), [(None, 3, False), (False, 30, False), (True, 3, True)])
def test_progress_bar(progress, count, shown, capsys):
    assert list(warmup._with_bar(range(count), count, progress)) == list(range(count))
    assert ("compiling kernels" in capsys.readouterr().err) == shown


def test_variants_are_compiled():
    sizes = [
        Sizes(ENCODER.levels, num_points=[3, 6], interpolation="nearest"),
        Sizes(ENCODER.levels, num_points=[2, 2], padding_mode="border"),
    ]
    # The reductions see contributions only.
    chosen = [spec.samples for spec in specs(sizes, ["float32"]) if hasattr(spec, "samples")]
    assert {(samples.points, samples.P, samples.nearest, samples.border) for samples in chosen} == {
        ((3, 6), 0, True, False),
        ((), 2, False, True),
    }
    with pytest.raises(ValueError, match=r"num_points: .*L = 2"):
        specs([Sizes(ENCODER.levels, num_points=[1])], ["float32"])


def test_calls_with_query_lengths_are_compiled():
    chosen = specs([Sizes(ENCODER.levels, ragged=True)], ["float32"])
    assert {spec.samples.ragged for spec in chosen if hasattr(spec, "samples")} == {True}
    assert not any(spec.samples.ragged for spec in specs([ENCODER], ["float32"]) if hasattr(spec, "samples"))


@pytest.mark.parametrize("coordinates", [2, 4])
@pytest.mark.parametrize("one_reference", [False, True])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("reference_dtype", ["float32", "float16"])
@pytest.mark.parametrize("of_references", [False, True])
def test_fused_calls_are_compiled(coordinates, one_reference, packed, reference_dtype, of_references):
    sizes = Sizes(ENCODER.levels, N=2, reference_coordinates=coordinates, one_reference=one_reference, packed=packed)
    fused = FusedFrontEnd(coordinates, 1 if one_reference else 2, reference_dtype, packed)
    levels = ((20, 30, 0), (10, 15, 600))
    call = Problem(2, 750, 8, 32, 2, 4, 750, "float16", "float16", ("cuda", 0), levels, fused=fused)
    wanted = call.computed(ALL._replace(references=of_references))
    launches = [plan.forward(call, 16, H100), *plan_backward.backward(call, 16, H100, wanted).launches]
    assert {launch.spec for launch in launches} <= specs([sizes], ["float16"])


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"levels": ()}, ValueError, r"levels: expected levels of positive \(H, W\), got \(\)"),
        ({"levels": ((0, 3),)}, ValueError, r"levels: expected levels of positive \(H, W\), got 0"),
        ({"levels": [(3.5, 1)]}, TypeError, r"levels: expected levels of positive \(H, W\), got 3.5"),
        ({"levels": [(True, 1)]}, TypeError, r"levels: expected levels of positive \(H, W\), got True"),
        ({"levels": [(3, 1, 1)]}, ValueError, r"levels: expected .*, got \(3, 1, 1\) in"),
        ({"levels": [3]}, TypeError, r"levels: expected .*, got 3 in \[3\]"),
        ({"levels": ["31"]}, TypeError, r"levels: expected .*, got '31' in"),
        ({"levels": 3}, TypeError, r"levels: expected .*, got 3"),
        ({"levels": np.ones((1, 2))}, TypeError, "levels: expected .*, got 1.0"),
        ({"N": True}, TypeError, "N: expected an int of at least 0, got True"),
        ({"N": 1.5}, TypeError, "N: expected an int of at least 0, got 1.5"),
        ({"N": None}, TypeError, "N: expected an int of at least 0, got None"),
        ({"Q": "300"}, TypeError, "Q: expected an int of at least 0 or None, got '300'"),
        ({"P": -4}, ValueError, "P: expected an int of at least 0, got -4"),
        ({"D": 0}, ValueError, "D: expected an int of at least 1, got 0"),
        ({"M": 0}, ValueError, "M: expected an int of at least 1, got 0"),
        ({"ragged": "no"}, TypeError, "ragged: expected True or False, got str"),
        ({"one_reference": 1}, TypeError, "one_reference: expected True or False, got int"),
        ({"packed": None}, TypeError, "packed: expected True or False, got NoneType"),
        ({"align_corners": 1}, TypeError, "align_corners: expected True or False, got int"),
        ({"interpolation": "cubic"}, ValueError, "interpolation: expected 'bilinear' or 'nearest', got 'cubic'"),
        ({"num_points": [1]}, ValueError, "num_points: expected one number per level, L = 2"),
        ({"num_points": [True, 1]}, TypeError, "num_points: expected a positive int, got True"),
        ({"reference_coordinates": 3}, ValueError, "reference_coordinates: expected 2, 4 or None, got 3"),
        ({"reference_coordinates": 2.0}, TypeError, "reference_coordinates: expected 2, 4 or None, got 2.0"),
        ({"packed": True}, ValueError, "reference_coordinates: expected 2 or 4 with one_reference or packed, got None"),
    ],
)
def test_sizes_that_no_call_has_are_refused(fields, error, message):
    with pytest.raises(error, match=message):
        Sizes(**{"levels": ENCODER.levels} | fields)


def test_sizes_of_numpy_are_those_of_python():
    levels = np.array(ENCODER.levels)
    assert Sizes(levels, N=np.int64(2), num_points=np.array([1, 2]), ragged=np.True_) == Sizes(
        ENCODER.levels, N=2, num_points=(1, 2), ragged=True
    )
    assert Sizes([levels[0], levels[1].tolist()], N=2) == ENCODER
