"""`explain` on an emulated GPU: it names what a call launches, copies and could do better, and runs nothing."""

from dataclasses import replace

import numpy as np
import pytest

import cupy_msda
from cupy_msda import Sizes
from cupy_msda.call import ALL
from cupy_msda.cuda import cost_model, reasons
from cupy_msda.cuda.gpu import H100
from cupy_msda.cuda.tuning import loaded, tuned
from cupy_msda.cuda.tuning.tuned import Choices, Entry
from cupy_msda.sizes import problems_of
from tests.helpers import emulated_gpu
from tests.helpers.cases import to_fused
from tests.helpers.emulated_calls import DENSE, FUSED, PACKED_BOXES, PLAIN

SIZES = Sizes(((100, 167), (50, 84), (25, 42), (13, 21)), N=2)


@pytest.fixture
def gpu(monkeypatch):
    """Launches compute nothing."""
    return emulated_gpu.install(monkeypatch, run=lambda planned, words: None)


def arguments_of(gpu, inputs, **changes):
    names = ("value", "locations", "weights") if not hasattr(inputs, "references") else (
        "value", "references", "locations", "weights"
    )  # fmt: skip
    value, *samples = (changes.get(name, gpu.put(getattr(inputs, name))) for name in names)
    return [value, inputs.shapes, None, *(part for part in samples if part is not None)]


@pytest.mark.parametrize(
    ("arguments", "options", "words"),
    [
        ([SIZES], {"gpu": 0}, "gpu: expected a compute capability"),
        ([SIZES], {"interpolation": "nearest"}, "interpolation: expected a field of Sizes"),
        ([[SIZES]], {}, "or one Sizes, got list"),
        (list(PLAIN.inputs()[:5]), {"gpu": 80}, "gpu: expected None with arrays"),
    ],
)
def test_bad_questions_are_refused(arguments, options, words):
    with pytest.raises((TypeError, ValueError), match=words):
        cupy_msda.explain(*arguments, **options)


@pytest.mark.parametrize("case", [PLAIN, DENSE], ids=str)
@pytest.mark.parametrize("form", [None, FUSED, PACKED_BOXES], ids=["plain", "fused", "packed"])
@pytest.mark.parametrize("deterministic", [False, True])
def test_the_kernels_are_those_that_a_call_launches(gpu, case, form, deterministic):
    inputs = case.inputs() if form is None else to_fused(case.inputs(), **form)
    arguments = arguments_of(gpu, inputs)
    explanation = cupy_msda.explain(*arguments, deterministic=deterministic)
    assert not gpu.launches
    grad_output = gpu.put(inputs.grad_output)
    options = {"deterministic": deterministic}
    if form is None:
        cupy_msda.ms_deform_attn(*arguments, **options)
        cupy_msda.ms_deform_attn_backward(*arguments, grad_output, 64, **options)
    else:
        arguments += [None] * (len(arguments) == 5)
        cupy_msda.ms_deform_attn_fused(*arguments, **options)
        cupy_msda.ms_deform_attn_fused_backward(*arguments, grad_output, **options)
    launched = sorted(str(launch.spec) for launch in gpu.launches)
    assert sorted(str(kernel.launch.spec) for _, kernel in explanation.kernels) == launched
    assert all(kernel.name in str(explanation) for _, kernel in explanation.kernels)
    assert explanation.path.startswith("CUDA kernels on cuda:0, Emulated GPU")


def test_copies_are_named(gpu):
    inputs = PLAIN.inputs()
    value = gpu.put(np.asfortranarray(inputs.value))
    locations = gpu.put(np.asfortranarray(inputs.locations))
    shapes = gpu.put(inputs.shapes.astype(np.int32))
    arguments = arguments_of(gpu, inputs, value=value, locations=locations)
    arguments[1] = shapes
    found = cupy_msda.explain(*arguments, query_lengths=[3, 3][: inputs.value.shape[0]]).advice
    for word in ("value is copied", "sampling_locations is copied", "spatial_shapes is converted", "query_lengths are"):
        assert any(text.startswith(word) for text in found), (word, found)
    assert not any("copied" in text for text in cupy_msda.explain(*arguments_of(gpu, inputs)).advice)


def test_an_address_that_is_not_aligned_is_named(gpu):
    inputs = PLAIN.inputs()
    whole = gpu.put(np.zeros(inputs.value.size + 1, np.float32))
    value = gpu.cupy.ndarray.over(whole.host[1:].reshape(inputs.value.shape), 0)
    explanation = cupy_msda.explain(*arguments_of(gpu, inputs, value=value))
    assert any("begins at a multiple of 4 bytes" in text for text in explanation.advice)
    assert "loads of 4 bytes, because an address or a stride is no multiple of more" in str(explanation)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"dtype": "float64"}, "float64 is for checks"),
        ({"dtype": "float32"}, "halves the bytes"),
        ({"deterministic": True}, "deterministic=True sorts"),
    ],
)
def test_what_would_be_faster_is_named(gpu, options, words):
    assert any(words in text for text in cupy_msda.explain(SIZES, **options).advice)


def test_channels_that_are_no_multiple_of_a_vector_are_named(gpu):
    explanation = cupy_msda.explain(replace(SIZES, D=36), dtype="float16")
    assert "loads of 8 bytes, because D = 36 is no multiple of more" in str(explanation)
    assert "D = 36: channels in multiples of 8" in str(explanation)


def test_floors_follow_from_bytes_and_the_rates_of_the_device(gpu):
    """The attributes of the emulated GPU are 3.35 TB/s; every pixel is read and written once."""
    problem = problems_of([SIZES], ["float32"], 0)[0]
    floors = dict(cupy_msda.explain(SIZES).floors)
    vectors, samples = 2 * 22223 * 8 * 32 * 4, 2 * 22223 * 8 * 16 * 3 * 4
    assert floors["forward"].nbytes == 2 * vectors + samples
    assert floors["backward"].nbytes == 3 * vectors + 2 * samples
    assert floors["forward"].memory_us == pytest.approx(floors["forward"].nbytes / 3.352e6, rel=1e-3)
    reads = problem.N * problem.Q * 8 * 16 * 4 * 32 * 4
    assert floors["forward"].l1_us == pytest.approx(reads / (1.98e9 * 132 * 128) * 1e6)


def test_tuned_axes_are_marked(gpu, monkeypatch):
    problem = problems_of([SIZES], ["float32"], 0)[0]
    subjects = {"forward": ({"warps": 4}, None), "grad_value": ({"way": "sorted"}, ALL)}
    entries = entries_of(problem, subjects)
    assert cupy_msda.explain(SIZES).tuned.startswith("no: `python -m cupy_msda tune`")
    monkeypatch.setattr(loaded, "_choices", {0: Choices(entries)})
    explanation = cupy_msda.explain(SIZES)
    assert "forward 20.0 us by default, 10.0 us tuned" in explanation.tuned
    assert "warps=4*" in str(explanation)
    assert "measured on this GPU" in str(explanation)
    assert cupy_msda.explain(replace(SIZES, M=4)).tuned == "not for calls of these or of similar sizes"


def entries_of(problem, subjects):
    return [
        Entry(tuned.subject_of(name, problem, wanted), tuned.measured_of(problem), axes, 20.0, 10.0)
        for name, (axes, wanted) in subjects.items()
    ]


@pytest.mark.parametrize("way", ["atomics", "aggregated"])
@pytest.mark.parametrize("alignment", [16, 8, 4])
def test_tuned_axes_that_misaligned_addresses_exclude_are_named(way, alignment):
    problem = problems_of([SIZES], ["float32"], 0)[0]
    samples, all_of = {"warps": 4, "unroll": 2}, ALL
    found = entries_of(problem, {"forward": (samples, None), way: (samples, all_of), "grad_value": ({"way": way}, ALL)})
    on = replace(H100, choices=Choices(found))
    kernels = {"forward": reasons.forward(problem, alignment, on), way: reasons.backward(problem, alignment, on, ALL)}
    by_estimate = cost_model.fastest_way(problem)
    for subject, (first, *_) in kernels.items():
        unused = f"the tuned {subject} is not used: it holds for addresses at multiples of 16 bytes, and these are at"
        said = [text for text in first.reasons if unused in text]
        if alignment == 16:
            assert first.measured == samples
            assert not said
        elif subject in ("forward", by_estimate):
            assert not first.measured
            assert said == [f"{unused} multiples of {alignment}"]
    why = " ".join(kernels[way][0].reasons)
    assert ("measured on this GPU" in why) == (alignment == 16)
    assert ("the tuned grad_value is not used" in why) == (alignment < 16)


@pytest.mark.parametrize("alignment", [16, 4])
def test_a_tuned_sort_holds_for_every_address(alignment):
    """It loads no vectors of value."""
    problem = replace(problems_of([SIZES], ["float32"], 0)[0], deterministic=True)
    on = replace(H100, choices=Choices(entries_of(problem, {"bucket_sort": ({"min_blocks": 1}, None)})))
    sort = next(kernel for kernel in reasons.backward(problem, alignment, on, ALL) if kernel.name == "bucket_sort")
    assert sort.measured == {"min_blocks": 1}
    assert sort.configuration["min_blocks"] == 1
    assert not any("is not used" in text for text in sort.reasons)


@pytest.mark.parametrize(
    ("dtype", "described"),
    [
        ("float16", "ms_deform_attn of float16, "),
        ("float16/float32", "ms_deform_attn of float16 and float32, "),
        ("bfloat16/bfloat16", "ms_deform_attn of bfloat16, "),
        ("float64", "ms_deform_attn of float64, "),
    ],
)
def test_sizes_of_16_bit_values_with_float32_locations(dtype, described):
    assert cupy_msda.explain(SIZES, dtype=dtype, gpu=90).call.startswith(described)


@pytest.mark.parametrize("dtype", ["int8", "float16/bfloat16", "float32/float16", "float64/float32", "float32/", None])
def test_other_dtypes_of_sizes_are_refused(dtype):
    with pytest.raises(
        TypeError, match=r"dtype: expected float16, bfloat16, float32, float64, float16/float32 or .* got"
    ):
        cupy_msda.explain(SIZES, dtype=dtype, gpu=90)


def test_a_dtype_of_sizes_stands_for_both_dtypes_of_locations_unless_these_are_named():
    def pairs(*dtypes):
        return [(problem.value_dtype, problem.location_dtype) for problem in problems_of([SIZES], dtypes, 0)]

    assert pairs("float16", "float32") == [("float16", "float16"), ("float16", "float32"), ("float32", "float32")]
    assert pairs("float16/float32", "float16/float16") == [("float16", "float32"), ("float16", "float16")]
    boxes = replace(SIZES, reference_coordinates=4)
    assert [p.fused.dtype for p in problems_of([boxes], ["bfloat16/float32"], 0)] == ["float32"]


def test_other_paths(gpu, monkeypatch):
    inputs = PLAIN.inputs()
    on_cpu = cupy_msda.explain(inputs.value, inputs.shapes, None, inputs.locations, inputs.weights)
    assert on_cpu.path.startswith("CPU, ")
    assert not on_cpu.kernels
    empty = cupy_msda.explain(replace(SIZES, N=0))
    assert empty.path.endswith("nothing to compute, the results are zeros")
    monkeypatch.setenv("CUPY_MSDA_KERNELS", "naive")
    naive = cupy_msda.explain(SIZES)
    assert naive.path.startswith("reference CUDA kernels")
    assert "unset it" in naive.advice[0]


def test_wrong_arguments_have_the_messages_of_the_operator(gpu):
    inputs = PLAIN.inputs()
    value, shapes, starts, locations, weights = arguments_of(gpu, inputs)
    with pytest.raises(TypeError, match="num_points"):
        cupy_msda.explain(value, shapes, starts, locations, weights, num_points="x")
    with pytest.raises(ValueError, match="attention_weights: expected"):
        cupy_msda.explain(value, shapes, starts, locations, weights[:1, :1])
