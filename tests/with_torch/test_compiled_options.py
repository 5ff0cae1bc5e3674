"""Options of NumPy, empty metadata and wrong options in compiled code: as in eager code."""

import numpy as np
import pytest
import torch

from cupy_msda.torch import ms_deform_attn
from tests.helpers.paths import LEVELS, M, N, Q, keywords

RIGHT = {name: torch.from_numpy(part) for name, part in keywords().items() if isinstance(part, np.ndarray)}
VALUE, LOCATIONS, WEIGHTS = (RIGHT[name] for name in ("value", "sampling_locations", "attention_weights"))
FLAT = (VALUE, LOCATIONS.reshape(N, Q, M, -1, 2), WEIGHTS.reshape(N, Q, M, -1))
PLAIN = (VALUE, LOCATIONS, WEIGHTS)
SHAPES = torch.tensor(LEVELS)


def compiled(function, arguments):
    torch._dynamo.reset()
    return torch.compile(function, backend="aot_eager")(*arguments)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(
    ("arguments", "shapes", "options"),
    [
        (FLAT, SHAPES, {"num_points": np.array([1, 3])}),
        (FLAT, SHAPES, {"num_points": range(1, 4, 2)}),
        (PLAIN, SHAPES, {"align_corners": np.True_, "deterministic": np.False_, "im2col_step": np.int64(2)}),
        (tuple(part[:0] for part in PLAIN), SHAPES, {"query_lengths": []}),
        (PLAIN, np.array(LEVELS), {"level_start_index": np.array(LEVELS)[:, 0] * 0}),
        (PLAIN, [np.array(level) for level in LEVELS], {}),
        ((VALUE, LOCATIONS[:, :, :, :0], WEIGHTS[:, :, :, :0]), [], {"level_start_index": []}),
    ],
    ids=["points", "range", "flags", "no image", "array", "rows that are arrays", "no level"],
)
def test_compiled_code_reads_options_as_eager_code_does(arguments, shapes, options):
    def call(value, locations, weights):
        others = dict(options)
        starts = others.pop("level_start_index", None)
        return ms_deform_attn(value, shapes, starts, locations, weights, **others)

    assert torch.equal(compiled(call, arguments), call(*arguments))


def test_rows_that_are_tensors_stay_on_their_device_in_compiled_code():
    rows = list(SHAPES)

    def call(*given):
        return ms_deform_attn(given[0], rows, None, *given[1:])

    with torch.device("meta"):
        assert torch.equal(compiled(call, PLAIN), call(*PLAIN))


@pytest.mark.parametrize("metadata", [
    {"spatial_shapes": [(True, 7), LEVELS[1]]},
    {"level_start_index": [False, 42]},
    {"query_lengths": [True, 3]},
], ids=str)  # fmt: skip
def test_compiled_code_refuses_a_bool_among_ints(metadata):
    def call(value, locations, weights):
        named = {"spatial_shapes": LEVELS, "level_start_index": None} | metadata
        return ms_deform_attn(value, sampling_locations=locations, attention_weights=weights, **named)

    (name,) = metadata
    with pytest.raises(TypeError, match=rf"^{name}: expected integers, got a bool in"):
        call(*PLAIN)
    with pytest.raises(TypeError, match=rf"^{name}: expected integers, got a bool in"):
        compiled(call, PLAIN)


@pytest.mark.parametrize("options", [{"im2col_step": True}, {"align_corners": 0}, {"deterministic": 1}], ids=str)
def test_compiled_code_refuses_what_eager_code_refuses(options):
    def call(value, locations, weights):
        return ms_deform_attn(value, SHAPES, None, locations, weights, **options)

    (name,) = options
    with pytest.raises(TypeError, match=rf"^{name}: expected"):
        call(*PLAIN)
    with pytest.raises(TypeError, match=rf"^{name}: expected"):
        compiled(call, PLAIN)
