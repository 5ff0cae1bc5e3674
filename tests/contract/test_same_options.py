"""What stands for the same option or metadata gives the same output on every path."""

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from tests.helpers.paths import LEVELS, D, M, N, Q, keywords, paths

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
RIGHT = keywords()
OPERANDS = ("value", "sampling_locations", "attention_weights", "reference_points")
FLAT = {name: RIGHT[name].reshape(N, Q, M, -1, *RIGHT[name].shape[5:]) for name in OPERANDS[1:3]}
NO_IMAGE = {name: RIGHT[name][:0] for name in OPERANDS}
NO_LEVEL = {
    "sampling_locations": RIGHT["sampling_locations"][:, :, :, :0],
    "attention_weights": RIGHT["attention_weights"][:, :, :, :0],
    "reference_points": RIGHT["reference_points"][:, :, :0],
}
NO_POINT = {name: FLAT[name][:, :, :, :0] for name in FLAT} | {"reference_points": NO_LEVEL["reference_points"]}
ONE, THREE = np.int64(1), np.uint8(3)

# The keywords that the others must agree with, and the others.
SAME = {
    "num_points": (
        FLAT | {"num_points": (1, 3)},
        [
            {"num_points": given}
            for given in (
                [1, 3], range(1, 4, 2), np.array([1, 3]), np.array([1, 3], np.uint8), [ONE, THREE], (ONE, 3),
                torch.tensor([1, 3]), [torch.tensor(1), 3], torch.Size([1, 3]), np.array([1, 0, 3, 0])[::2],
            )
        ],
    ),
    "interpolation": ({}, [{"interpolation": np.str_("bilinear")}, {"interpolation": "".join(("bi", "linear"))}]),
    "padding_mode": (
        {"padding_mode": "border"},
        [{"padding_mode": np.str_("border")}, {"padding_mode": "".join(("bor", "der"))}],
    ),
    "align_corners": ({"align_corners": True}, [{"align_corners": np.True_}]),
    "no align_corners": ({}, [{"align_corners": np.False_}, {"align_corners": False}]),
    "deterministic": ({"deterministic": True}, [{"deterministic": np.True_}]),
    "validate": ({}, [{"validate": given} for given in (True, False, np.True_, np.False_)]),
    "im2col_step": (
        {"im2col_step": 2},
        [{"im2col_step": given} for given in (np.int64(2), np.uint8(2), np.array(2), torch.tensor(2), 2**40, 2**70)],
    ),
    "spatial_shapes": (
        {"spatial_shapes": LEVELS},
        [
            {"spatial_shapes": given}
            for given in (
                [list(level) for level in LEVELS], np.array(LEVELS), np.array(LEVELS, np.uint8), np.matrix(LEVELS),
                torch.tensor(LEVELS), torch.tensor(LEVELS, dtype=torch.int32),
                [torch.tensor(level) for level in LEVELS], [np.array(level) for level in LEVELS],
                [torch.Size(level) for level in LEVELS],
                [(torch.tensor(h), np.int32(w)) for h, w in LEVELS], np.array(LEVELS)[::-1][::-1],
            )
        ],
    ),
    "level_start_index": (
        {"level_start_index": [0, 42]},
        [
            {"level_start_index": given}
            for given in (
                None, (0, 42), range(0, 43, 42), np.array([0, 42]), torch.tensor([0, 42]), np.array([42, 0])[::-1],
            )
        ],
    ),
    "query_lengths": (
        {"query_lengths": [3, 4]},
        [
            {"query_lengths": given}
            for given in (
                (3, 4), range(3, 5), np.array([3, 4]), np.array([3, 4], np.uint16), torch.tensor([3, 4]),
                torch.tensor([3, 4], dtype=torch.uint16), [torch.tensor(3), np.int8(4)],
            )
        ],
    ),
    "no image": (
        NO_IMAGE,
        [
            {"query_lengths": given}
            for given in (
                [], (), np.empty(0), np.empty(0, np.int64), torch.tensor([]), torch.empty(0, dtype=torch.int64),
            )
        ],
    ),
    "no level": (
        NO_LEVEL | {"spatial_shapes": np.zeros((0, 2), np.int64)},
        [
            changes | {"level_start_index": starts}
            for changes in (
                {"spatial_shapes": []}, {"spatial_shapes": ()}, {"spatial_shapes": np.empty((0, 2))},
                {"spatial_shapes": torch.empty(0, 2)}, {"spatial_shapes": [], "query_lengths": [Q] * N},
                NO_POINT | {"spatial_shapes": [], "num_points": []},
                NO_POINT | {"spatial_shapes": [], "num_points": np.empty(0)},
            )
            for starts in (None, [], np.empty(0), torch.empty(0, dtype=torch.int64))
        ],
    ),
}  # fmt: skip


def numbers(results):
    results = results if isinstance(results, tuple) else (results,)
    return [None if part is None else torch.as_tensor(part).detach().cpu().numpy() for part in results]


@pytest.mark.filterwarnings("ignore:.*matrix subclass:PendingDeprecationWarning")
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", SAME)
def test_every_path_reads_the_same(name, device):
    expected, others = SAME[name]
    for path in paths(device):
        want = numbers(path.call(**expected))
        for changes in others:
            if "validate" in changes and not path.takes_validate:
                continue
            have = numbers(path.call(**expected | changes))
            for one, other in zip(have, want, strict=True):
                if other is not None and one.shape == other.shape:
                    np.testing.assert_array_equal(one, other, err_msg=f"{path}: {changes}")
                else:
                    assert other is None or one.size == other.size == 0, f"{path}: {changes}"


@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("changes", [NO_IMAGE, NO_LEVEL | {"spatial_shapes": []}], ids=["no image", "no level"])
def test_an_empty_call_gives_zeros_and_gradients_on_every_path(changes, requires_grad):
    for path in paths():
        if requires_grad and "with_gradients" not in path.name:
            continue
        output = path.call(**changes)
        if isinstance(output, tuple):
            continue
        assert tuple(output.shape) == (len((changes | RIGHT | changes)["value"]), Q, M * D), path
        assert not np.any(numbers(output)[0])
        if requires_grad:
            assert output.requires_grad, path
            output.sum().backward()
