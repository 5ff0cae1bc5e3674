"""``validate=True`` warns about sizes as (W, H), and about locations in pixels or in [-1, 1]; nothing else does."""

import warnings

import numpy as np
import pytest

torch = pytest.importorskip("torch")

import cupy_msda
from cupy_msda.torch import decomposed, ms_deform_attn, ms_deform_attn_fused
from tests.helpers.cases import CASES, VARIANTS, Case, to_fused

LEVELS = ((24, 40), (12, 20), (6, 10), (3, 5))
L, N, Q, M, P, D = len(LEVELS), 2, 30, 4, 4, 8
RNG = np.random.default_rng(0)


def smooth(h, w):
    """Features [h*w, M, D] that change over three pixels, as those of a backbone do."""
    noise = RNG.standard_normal((h + 4, w + 4, M * D))
    window = np.lib.stride_tricks.sliding_window_view(noise, (3, 3), (0, 1)).mean((-1, -2))
    return window[:h, :w].reshape(h * w, M, D)


def features(levels=LEVELS):
    return np.stack([np.concatenate([smooth(h, w) for h, w in levels]) for _ in range(N)]).astype(np.float32)


def inputs(locations=None, levels=LEVELS):
    if locations is None:
        # References in the image, offsets of up to P pixels: on small levels many locations are outside.
        size = np.array(levels, np.float32)[:, None, ::-1]
        offsets = RNG.uniform(-P, P, (N, Q, M, L, P, 2)) / size
        locations = RNG.random((N, Q, 1, 1, 1, 2)) + offsets
    weights = RNG.random((N, Q, M, L, P))
    return features(levels), levels, None, locations.astype(np.float32), weights.astype(np.float32)


def swapped(levels):
    return tuple((w, h) for h, w in levels)


def in_pixels():
    size = np.array(LEVELS, np.float32)[:, None, ::-1]
    return RNG.random((N, Q, M, L, P, 2)) * size


def in_grid_coordinates():
    return RNG.uniform(-1, 1, (N, Q, M, L, P, 2))


def on_small_levels(locations=None):
    """Locations around the image, unless given, on levels of a few pixels alone."""
    value, shapes, starts, around, weights, _ = Case("small", levels=((6, 7), (3, 4)), P=4, queries=30).inputs()
    return value, shapes, starts, around if locations is None else locations(around.shape), weights


def fused_inputs(references):
    value, levels, _, offsets, logits = inputs(RNG.standard_normal((N, Q, M, L, P, 2)))
    return value, levels, None, references.astype(np.float32), offsets, logits


BOXES = np.concatenate((RNG.random((N, Q, L, 2)), RNG.uniform(0.1, 2, (N, Q, L, 2))), -1)
SUSPECT = {
    "sizes as (W, H)": ("spatial_shapes", lambda: (*inputs()[:1], swapped(LEVELS), *inputs()[2:])),
    "locations in pixels": ("sampling_locations", lambda: inputs(in_pixels())),
    "locations from -1 to 1": ("sampling_locations", lambda: inputs(in_grid_coordinates())),
    "locations in image pixels on small levels": (
        "sampling_locations", lambda: on_small_levels(lambda shape: RNG.random(shape, np.float32) * 96)
    ),
    "references in pixels": ("reference_points", lambda: fused_inputs(RNG.random((N, Q, L, 2)) * (40, 24))),
    "references in image pixels": ("reference_points", lambda: fused_inputs(RNG.random((N, Q, 1, 2)) * (640, 384))),
    "boxes in pixels": ("reference_points", lambda: fused_inputs(BOXES * (40, 24, 40, 24))),
    "references from -1 to 1": ("reference_points", lambda: fused_inputs(RNG.uniform(-1, 1, (N, Q, L, 2)))),
}  # fmt: skip
USUAL = {
    "locations around the image": inputs,
    "sizes as (H, W)": lambda: inputs(levels=swapped(LEVELS)),
    "locations around small levels": on_small_levels,
    "locations at the border": lambda: inputs(RNG.choice([-0.02, 0.5, 1.02], (N, Q, M, L, P, 2))),
    "locations that do not count": lambda: inputs(np.full((N, Q, M, L, P, 2), np.inf)),
    "features of noise": lambda: (RNG.standard_normal(features().shape).astype(np.float32), *inputs()[1:]),
    "features of noise, sizes as (W, H)": lambda: (
        RNG.standard_normal(features().shape).astype(np.float32), swapped(LEVELS), *inputs()[2:]
    ),
    "features that are all equal": lambda: (np.ones_like(features()), swapped(LEVELS), *inputs()[2:]),
    "features with a NaN": lambda: (np.full_like(features(), np.nan), swapped(LEVELS), *inputs()[2:]),
    "references in the image": lambda: fused_inputs(RNG.random((N, Q, L, 2))),
    "references a little outside": lambda: fused_inputs(RNG.uniform(-0.1, 1.1, (N, Q, 1, 2))),
    "boxes": lambda: fused_inputs(BOXES),
}  # fmt: skip


def function_of(arguments, functions=(cupy_msda.ms_deform_attn, cupy_msda.ms_deform_attn_fused)):
    return functions[len(arguments) - 5]


def to_torch(arguments):
    return [torch.from_numpy(part) if isinstance(part, np.ndarray) else part for part in arguments]


def attend(arguments, **options):
    return function_of(arguments, (ms_deform_attn, ms_deform_attn_fused))(*to_torch(arguments), **options)


def eager_with_gradients(arguments, **options):
    value, *others = to_torch(arguments)
    functions = (ms_deform_attn, ms_deform_attn_fused)
    return function_of(arguments, functions)(value.requires_grad_(), *others, **options)


def decomposed_call(arguments, **options):
    with decomposed():
        return attend(arguments, **options)


CALLS = {
    "array": lambda arguments, **options: function_of(arguments)(*arguments, **options),
    "eager": attend,
    "eager_with_gradients": eager_with_gradients,
    "registered": lambda arguments, **options: attend(arguments, query_lengths=[Q] * N, **options),
    "decomposed": decomposed_call,
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("name", SUSPECT)
def test_a_suspect_argument_is_named_once_where_the_caller_calls(name, call):
    blamed, make = SUSPECT[name]
    arguments = make()
    with pytest.warns(UserWarning, match=rf"^{blamed}: expected .* got .*\d") as warned:
        CALLS[call](arguments, validate=True)
    assert len(warned) == 1
    assert warned[0].filename == __file__


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("name", SUSPECT)
def test_nothing_warns_without_validate(name, call):
    arguments = SUSPECT[name][1]()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        CALLS[call](arguments)


@pytest.mark.parametrize("name", USUAL)
def test_usual_arguments_do_not_warn(name):
    arguments = USUAL[name]()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        CALLS["array"](arguments, validate=True)


@pytest.mark.parametrize("case", [*CASES, *VARIANTS], ids=str)
def test_problems_of_the_tests_do_not_warn(case):
    *arguments, _ = case.inputs()
    fused = to_fused(case.inputs(), num_points=case.variant.get("num_points"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        cupy_msda.ms_deform_attn(*arguments, **case.variant, validate=True)
        cupy_msda.ms_deform_attn_fused(*fused[:3], fused.references, *fused[3:5], **case.variant, validate=True)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_sixteen_bit_locations_are_read(dtype):
    value, levels, starts, locations, weights = to_torch(inputs(in_pixels()))
    with pytest.warns(UserWarning, match=r"sampling_locations: .* look like pixels"):
        ms_deform_attn(value.to(dtype), levels, starts, locations.to(dtype), weights.to(dtype), validate=True)


def test_padding_is_not_looked_at():
    value, levels, starts, locations, weights = inputs()
    locations[:, 10:] = 1000
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        cupy_msda.ms_deform_attn(value, levels, starts, locations, weights, query_lengths=[10, 10], validate=True)
    with pytest.warns(UserWarning, match="sampling_locations"):
        cupy_msda.ms_deform_attn(value, levels, starts, locations, weights, validate=True)


def test_points_per_level_are_looked_at_by_level():
    case = Case("points", levels=((20, 30), (2, 2)), variant={"num_points": (1, 4)})
    value, shapes, starts, locations, weights, _ = case.inputs()
    locations[..., 1:, :] = 3.0  # on the small level: two pixels away
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        cupy_msda.ms_deform_attn(value, shapes, starts, locations, weights, num_points=(1, 4), validate=True)
    locations[..., 0, :] = 3.0
    with pytest.warns(UserWarning, match="sampling_locations"):
        cupy_msda.ms_deform_attn(value, shapes, starts, locations, weights, num_points=(1, 4), validate=True)


def test_large_calls_are_sampled(monkeypatch):
    from cupy_msda import plausibility

    monkeypatch.setattr(plausibility, "_MOST", 1000)
    with pytest.warns(UserWarning, match=r"sampling_locations: .* look like pixels"):
        cupy_msda.ms_deform_attn(*inputs(in_pixels()), query_lengths=[Q, Q - 3], validate=True)


@pytest.mark.gpu
@pytest.mark.parametrize("name", SUSPECT)
def test_a_suspect_argument_on_a_gpu_is_named(name):
    blamed, make = SUSPECT[name]
    value, levels, *others = to_torch(make())
    arguments = [value, torch.tensor(levels), *others]
    on_gpu = [part.cuda() if isinstance(part, torch.Tensor) else part for part in arguments]
    for function in (function_of(arguments), function_of(arguments, (ms_deform_attn, ms_deform_attn_fused))):
        with pytest.warns(UserWarning, match=rf"^{blamed}: expected"):
            function(*on_gpu, validate=True)


@pytest.mark.gpu
def test_metadata_is_read_after_the_callers_stream_has_written_it():
    value, levels, _, locations, weights = (
        part.cuda() if isinstance(part, torch.Tensor) else part for part in to_torch(inputs())
    )
    right, shapes = torch.tensor(levels).cuda(), torch.zeros(L, 2, dtype=torch.int64, device="cuda")
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda._sleep(500_000_000)
        shapes.copy_(right)
        ms_deform_attn(value, shapes, None, locations, weights, validate=True)


def test_a_wrong_call_raises_and_does_not_warn():
    value, levels, starts, locations, weights = inputs(in_pixels())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(ValueError, match="spatial_shapes"):
            cupy_msda.ms_deform_attn(value[:, 1:], levels, starts, locations, weights, validate=True)
