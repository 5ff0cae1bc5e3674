"""The layer names its own arguments: what its user never passed is not blamed."""

import re

import numpy as np
import pytest
import torch

from cupy_msda.torch import MSDeformAttn, decomposed
from tests.helpers.torch_calls import LEVELS, PIXELS, attention_module, module_inputs, to_float32

NAMES = ("query", "reference_points", "input_flatten", "input_spatial_shapes", "input_level_start_index")
N, Q, C, L = 2, 5, 16, len(LEVELS)
INPUTS = dict(zip(NAMES, module_inputs(), strict=True))
# Names of the operator's arguments, which the user of the layer never passes.
OPERATOR = r"\b(sampling_offsets|attention_logits|value|spatial_shapes|level_start_index|im2col_step)\b"


def zeros(*shape):
    return torch.zeros(shape, dtype=torch.float64)


# The argument to blame, the type of the error, and the wrong arguments.
WRONG = {
    "one level less": ("input_spatial_shapes", ValueError, {"input_spatial_shapes": [(6, 9)]}),
    "one level more": ("input_spatial_shapes", ValueError, {"input_spatial_shapes": [(6, 7), (3, 2), (3, 2)]}),
    "no level": ("input_spatial_shapes", ValueError, {"input_spatial_shapes": []}),
    "one level less in a tensor": (
        "input_spatial_shapes", ValueError, {"input_spatial_shapes": torch.tensor([[6, 9]])}
    ),
    "all one level less": (
        "input_spatial_shapes", ValueError,
        {
            "input_spatial_shapes": [(6, 9)], "input_level_start_index": [0],
            "reference_points": INPUTS["reference_points"][:, :, :1],
        },
    ),
    "one start less": ("input_level_start_index", ValueError, {"input_level_start_index": [0]}),
    "references of one level more": ("reference_points", ValueError, {"reference_points": zeros(N, Q, L + 1, 2)}),
    "references of rank 3": ("reference_points", ValueError, {"reference_points": zeros(N, Q, 2)}),
    "references of other queries": ("reference_points", ValueError, {"reference_points": zeros(N, Q + 1, L, 2)}),
    "references of other images": ("reference_points", ValueError, {"reference_points": zeros(N + 1, Q, L, 2)}),
    "references of 3 coordinates": ("reference_points", ValueError, {"reference_points": zeros(N, Q, L, 3)}),
    "references are None": ("reference_points", TypeError, {"reference_points": None}),
    "query of rank 2": ("query", ValueError, {"query": zeros(Q, C)}),
    "query of other channels": ("query", ValueError, {"query": zeros(N, Q, C + 1)}),
    "query is an array": ("query", TypeError, {"query": np.zeros((N, Q, C))}),
    "features of rank 4": ("input_flatten", ValueError, {"input_flatten": zeros(N, PIXELS, 2, 8)}),
    "features of other images": ("input_flatten", ValueError, {"input_flatten": zeros(2 * N, PIXELS, C)}),
    "features of other channels": ("input_flatten", ValueError, {"input_flatten": zeros(N, PIXELS, 2 * C)}),
    "features are None": ("input_flatten", TypeError, {"input_flatten": None}),
    "pixels missing": ("input_spatial_shapes", ValueError, {"input_flatten": zeros(N, PIXELS - 1, C)}),
    "a zero size": ("input_spatial_shapes", ValueError, {"input_spatial_shapes": [(6, 0), (3, 4)]}),
    "sizes are None": ("input_spatial_shapes", TypeError, {"input_spatial_shapes": None}),
    "sizes of floats": ("input_spatial_shapes", TypeError, {"input_spatial_shapes": [(6.0, 7.0), (3.0, 4.0)]}),
    "sizes of three columns": ("input_spatial_shapes", ValueError, {"input_spatial_shapes": [(6, 7, 1), (3, 4, 1)]}),
    "sizes of rank 0": ("input_spatial_shapes", ValueError, {"input_spatial_shapes": torch.tensor(6)}),
    "a negative start": ("input_level_start_index", ValueError, {"input_level_start_index": [0, -1]}),
    "starts of floats": ("input_level_start_index", TypeError, {"input_level_start_index": [0.0, 42.0]}),
    "mask of other pixels": (
        "input_padding_mask", ValueError, {"input_padding_mask": torch.zeros(N, PIXELS + 1, dtype=torch.bool)}
    ),
    "mask of one image": ("input_padding_mask", ValueError, {"input_padding_mask": torch.zeros(1, PIXELS).bool()}),
    "mask of floats": ("input_padding_mask", TypeError, {"input_padding_mask": torch.zeros(N, PIXELS)}),
}  # fmt: skip


@pytest.mark.parametrize(
    "context", [torch.enable_grad, torch.no_grad, decomposed], ids=lambda context: context.__name__
)
@pytest.mark.parametrize("name", WRONG)
def test_the_layer_blames_its_own_argument(name, context):
    blamed, error, changes = WRONG[name]
    with context(), pytest.raises(error, match=rf"^{blamed}: expected") as raised:
        attention_module()(**INPUTS | changes)
    assert raised.type is error
    assert not re.search(OPERATOR, str(raised.value))


def test_right_inputs_of_every_form_are_taken():
    layer = attention_module()
    want = layer(**INPUTS)
    for changes in (
        {"input_spatial_shapes": LEVELS},
        {"input_spatial_shapes": np.array(LEVELS)},
        {"input_level_start_index": None},
        {"input_level_start_index": range(0, 43, 42)},
        {"input_padding_mask": torch.zeros(N, PIXELS, dtype=torch.bool)},
    ):
        torch.testing.assert_close(layer(**INPUTS | changes), want)
    one = INPUTS["reference_points"][:, :, :1]
    torch.testing.assert_close(
        layer(**INPUTS | {"reference_points": one}), layer(**INPUTS | {"reference_points": one.expand(-1, -1, L, -1)})
    )


def test_a_layer_with_another_number_of_levels_says_so():
    layer = MSDeformAttn(C, n_levels=4, n_heads=2, n_points=3)
    with pytest.raises(ValueError, match=r"input_spatial_shapes: expected shape \[L, 2\] with L = n_levels = 4, got 2"):
        layer(*to_float32(INPUTS.values()))
