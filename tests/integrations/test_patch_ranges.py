"""Functions that are the operator for some numbers alone are kept, and those that are it for all numbers are served."""

import pytest
import torch

import cupy_msda.torch
from tests.helpers import model_functions as stand_ins
from tests.helpers import patched_modules
from tests.helpers.patched_modules import call, line, put

module = pytest.fixture(patched_modules.module)

RANGES = {
    "weights above 0": lambda value, locations, weights: (value, locations, weights.relu()),
    "weights below 1": lambda value, locations, weights: (value, locations, weights.clamp(max=1)),
    "weights below 50": lambda value, locations, weights: (value, locations, weights.clamp(max=50)),
    "weights above -50": lambda value, locations, weights: (value, locations, weights.clamp(min=-50)),
    "locations near the level": lambda value, locations, weights: (value, locations.clamp(-0.4, 1.4), weights),
    "locations right of -0.4": lambda value, locations, weights: (
        value, torch.stack((locations[..., 0].clamp(min=-0.4), locations[..., 1]), -1), weights
    ),
    "locations above 1.4": lambda value, locations, weights: (
        value, torch.stack((locations[..., 0], locations[..., 1].clamp(max=1.4)), -1), weights
    ),
    "locations modulo 3": lambda value, locations, weights: (value, (locations + 1) % 3 - 1, weights),
    "values from -5 to 5": lambda value, locations, weights: (value.clamp(-5, 5), locations, weights),
    "values below 1000": lambda value, locations, weights: (value.clamp(max=1000), locations, weights),
}  # fmt: skip


@pytest.mark.parametrize("ranged", RANGES.values(), ids=RANGES)
def test_a_function_that_is_the_operator_in_a_range_alone_is_kept(module, ranged):
    original = stand_ins.pixels_first()

    def ms_deform_attn_core_pytorch(value, value_spatial_shapes, sampling_locations, attention_weights):
        value, sampling_locations, attention_weights = ranged(value, sampling_locations, attention_weights)
        return original(value, value_spatial_shapes, sampling_locations, attention_weights)

    put(module, ms_deform_attn_core_pytorch)
    with cupy_msda.torch.patch() as patch:
        assert line(patch).status == "kept"
        assert "negative or large numbers" in line(patch).reason


@pytest.mark.parametrize("align_corners", [False, True])
@pytest.mark.parametrize("padding_mode", ["zeros", "border"])
def test_a_clamp_that_changes_nothing_is_served(module, padding_mode, align_corners):
    original = stand_ins.pixels_first(padding_mode, align_corners)

    def ms_deform_attn_core_pytorch(value, value_spatial_shapes, sampling_locations, attention_weights):
        return original(value, value_spatial_shapes, sampling_locations.clamp(-2, 3), attention_weights)

    put(module, ms_deform_attn_core_pytorch)
    with cupy_msda.torch.patch() as patch:
        call(module.ms_deform_attn_core_pytorch)
        assert line(patch).calls == 1
