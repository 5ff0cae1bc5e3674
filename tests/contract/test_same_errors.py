"""One wrong call, every path: the same type of error, and a message that begins with the argument to blame."""

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from tests.helpers.paths import D, M, N, Q, S, keywords, paths

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
RIGHT = keywords()
VALUE, LOCATIONS, WEIGHTS = RIGHT["value"], RIGHT["sampling_locations"], RIGHT["attention_weights"]
FLAT = {"sampling_locations": LOCATIONS.reshape(N, Q, M, -1, 2), "attention_weights": WEIGHTS.reshape(N, Q, M, -1)}
ARRAY_OF_WORDS = np.array(["bilinear", "nearest"])


def numbers():
    yield 1
    yield 3


# The argument to blame, the type of the error, and the wrong keywords (or a function that makes them).
WRONG = {
    "value is None": ("value", TypeError, {"value": None}),
    "value is a list": ("value", TypeError, {"value": [[1.0]]}),
    "value of no dimensions": ("value", ValueError, {"value": np.array(1.0, np.float32)}),
    "value of rank 3": ("value", ValueError, {"value": VALUE.reshape(N, S, M * D)}),
    "value of ints": ("value", TypeError, {"value": VALUE.astype(np.int32)}),
    "value of bools": ("value", TypeError, {"value": VALUE > 0}),
    "value of complex numbers": ("value", TypeError, {"value": VALUE.astype(np.complex64)}),
    "value with S and M exchanged": ("value", ValueError, {"value": VALUE.swapaxes(1, 2)}),
    "value with N and S exchanged": ("value", ValueError, {"value": VALUE[:1].swapaxes(0, 1), "one_image": True}),
    "value with M and D exchanged": ("value", ValueError, {"value": VALUE.swapaxes(2, 3)}),
    "value of another M": ("sampling_locations", ValueError, {"value": VALUE[:, :, :1]}),
    "value of another dtype": ("sampling_locations", TypeError, {"value": VALUE.astype(np.float64)}),
    "locations are None": ("sampling_locations", TypeError, {"sampling_locations": None}),
    "locations of rank 5": ("sampling_locations", ValueError, {"sampling_locations": LOCATIONS[0]}),
    "locations of another N": ("sampling_locations", ValueError, {"sampling_locations": LOCATIONS[:1]}),
    "locations of 3 coordinates": ("sampling_locations", ValueError, {"sampling_locations": LOCATIONS[..., [0, 1, 0]]}),
    "locations of float16": ("sampling_locations", TypeError, {"sampling_locations": LOCATIONS.astype(np.float16)}),
    "locations with Q and M exchanged": (
        "sampling_locations", ValueError, {"sampling_locations": LOCATIONS.swapaxes(1, 2)}
    ),
    "weights of another P": ("attention_weights", ValueError, {"attention_weights": WEIGHTS[..., :1]}),
    "weights of another Q": ("attention_weights", ValueError, {"attention_weights": WEIGHTS[:, :3]}),
    "weights of rank 6": ("attention_weights", ValueError, {"attention_weights": LOCATIONS}),
    "weights of float64": ("attention_weights", TypeError, {"attention_weights": WEIGHTS.astype(np.float64)}),
    "shapes are None": ("spatial_shapes", TypeError, {"spatial_shapes": None}),
    "shapes are None with border": ("spatial_shapes", TypeError, {"spatial_shapes": None, "padding_mode": "border"}),
    "shapes are a generator": ("spatial_shapes", TypeError, lambda: {"spatial_shapes": (n for n in ((6, 7), (3, 4)))}),
    "shapes are a dict": ("spatial_shapes", TypeError, {"spatial_shapes": {6: 7, 3: 4}}),
    "shapes are a string": ("spatial_shapes", TypeError, {"spatial_shapes": "67"}),
    "shapes of floats": ("spatial_shapes", TypeError, {"spatial_shapes": [(6.0, 7.0), (3.0, 4.0)]}),
    "shapes with one float": ("spatial_shapes", TypeError, {"spatial_shapes": [(6, 7), (3, 4.5)]}),
    "shapes of bools": ("spatial_shapes", TypeError, {"spatial_shapes": [(True, True), (True, True)]}),
    "shapes with one bool": ("spatial_shapes", TypeError, {"spatial_shapes": [(True, 7), (3, 4)]}),
    "shapes with one bool of NumPy": ("spatial_shapes", TypeError, {"spatial_shapes": [(6, 7), (3, np.True_)]}),
    "shapes with one bool array": (
        "spatial_shapes", TypeError, {"spatial_shapes": [(6, 7), (3, np.array(True))]}
    ),
    "shapes with one bool tensor": (
        "spatial_shapes", TypeError, {"spatial_shapes": [(6, 7), (3, torch.tensor(True))]}
    ),
    "shapes with one row of bools": (
        "spatial_shapes", TypeError, {"spatial_shapes": [(6, 7), np.array([True, True])]}
    ),
    "shapes of strings": ("spatial_shapes", TypeError, {"spatial_shapes": [("a", "b"), ("c", "d")]}),
    "shapes in a float tensor": ("spatial_shapes", TypeError, {"spatial_shapes": torch.ones(2, 2)}),
    "shapes in a bool tensor": ("spatial_shapes", TypeError, {"spatial_shapes": torch.ones(2, 2, dtype=torch.bool)}),
    "shapes of rank 1": ("spatial_shapes", ValueError, {"spatial_shapes": [6, 7]}),
    "shapes of three columns": ("spatial_shapes", ValueError, {"spatial_shapes": [(6, 7, 1), (3, 4, 1)]}),
    "shapes of no columns": ("spatial_shapes", ValueError, {"spatial_shapes": [[], []]}),
    "shapes of unequal rows": ("spatial_shapes", ValueError, {"spatial_shapes": [(6, 7), (3,)]}),
    "shapes beyond 64 bits": ("spatial_shapes", ValueError, {"spatial_shapes": [(2**70, 7), (3, 4)]}),
    "shapes with a zero": ("spatial_shapes", ValueError, {"spatial_shapes": [(0, 7), (3, 4)]}),
    "shapes beyond S": ("spatial_shapes", ValueError, {"spatial_shapes": [(6, 8), (3, 4)]}),
    "shapes of another L": ("sampling_locations", ValueError, {"spatial_shapes": [(6, 7), (3, 2), (1, 2)]}),
    "shapes of no level": ("sampling_locations", ValueError, {"spatial_shapes": []}),
    "shapes of another L with border": (
        "sampling_locations", ValueError, {"spatial_shapes": [(6, 7)], "padding_mode": "border"}
    ),
    "starts are an int": ("level_start_index", TypeError, {"level_start_index": 0}),
    "starts of another L": ("level_start_index", ValueError, {"level_start_index": [0]}),
    "starts are empty": ("level_start_index", ValueError, {"level_start_index": []}),
    "starts below 0": ("level_start_index", ValueError, {"level_start_index": [0, -1]}),
    "starts with one bool": ("level_start_index", TypeError, {"level_start_index": [False, 42]}),
    "starts of floats": ("level_start_index", TypeError, {"level_start_index": [0.0, 42.0]}),
    "starts beyond S": ("spatial_shapes", ValueError, {"level_start_index": [0, 50]}),
    "lengths are an int": ("query_lengths", TypeError, {"query_lengths": 3}),
    "lengths are a generator": ("query_lengths", TypeError, lambda: {"query_lengths": numbers()}),
    "lengths are a string": ("query_lengths", TypeError, {"query_lengths": "34"}),
    "lengths of bools": ("query_lengths", TypeError, {"query_lengths": [True, False]}),
    "lengths with one bool": ("query_lengths", TypeError, {"query_lengths": [True, 3]}),
    "lengths of floats": ("query_lengths", TypeError, {"query_lengths": [3.0, 4.0]}),
    "lengths above Q": ("query_lengths", ValueError, {"query_lengths": [3, 9]}),
    "lengths below 0": ("query_lengths", ValueError, {"query_lengths": [3, -1]}),
    "lengths of another N": ("query_lengths", ValueError, {"query_lengths": [3]}),
    "lengths of rank 2": ("query_lengths", ValueError, {"query_lengths": [[3, 4]]}),
    "points are an int": ("num_points", TypeError, {"num_points": 4}),
    "points are a string": ("num_points", TypeError, {"num_points": "22"}),
    "points are a dict": ("num_points", TypeError, {"num_points": {2: 1}}),
    "points are a generator": ("num_points", TypeError, lambda: {"num_points": numbers()}),
    "points of floats": ("num_points", TypeError, {"num_points": [2.0, 2.0]}),
    "points in a float array": ("num_points", TypeError, {"num_points": np.array([2.0, 2.0])}),
    "points of bools": ("num_points", TypeError, {"num_points": [True, True]}),
    "points of bool tensors": ("num_points", TypeError, {"num_points": [torch.tensor(True)] * 2}),
    "points of rank 2": ("num_points", ValueError, {"num_points": np.array([[2, 2]])}),
    "points of 0": ("num_points", ValueError, {"num_points": [4, 0]}),
    "points of another L": ("num_points", ValueError, {"num_points": [1, 2, 1]}),
    "points of another sum": ("sampling_locations", ValueError, {"num_points": [1, 2]} | FLAT),
    "points beyond 64 bits": ("num_points", ValueError, {"num_points": [2**70, 2]} | FLAT),
    "interpolation is an array": ("interpolation", ValueError, {"interpolation": ARRAY_OF_WORDS}),
    "interpolation is a list": ("interpolation", ValueError, {"interpolation": ["bilinear"]}),
    "interpolation is None": ("interpolation", ValueError, {"interpolation": None}),
    "interpolation of bytes": ("interpolation", ValueError, {"interpolation": b"bilinear"}),
    "interpolation of another name": ("interpolation", ValueError, {"interpolation": "bicubic"}),
    "padding is an array": ("padding_mode", ValueError, {"padding_mode": np.array(["zeros", "border"])}),
    "padding of another name": ("padding_mode", ValueError, {"padding_mode": "reflection"}),
    "border with nearest": ("padding_mode", ValueError, {"padding_mode": "border", "interpolation": "nearest"}),
    "corners with nearest": ("align_corners", ValueError, {"align_corners": True, "interpolation": "nearest"}),
    **{
        f"{name} is {given!r}": (name, TypeError, {name: given})
        for name in ("align_corners", "deterministic", "validate")
        for given in (0, 1, 0.0, "yes", np.array([True, False]), np.array(True), torch.tensor(True), np.int64(1))
    },
    "align_corners is None": ("align_corners", TypeError, {"align_corners": None}),
    "validate is None": ("validate", TypeError, {"validate": None}),
    **{
        f"im2col_step is {given!r}": ("im2col_step", TypeError, {"im2col_step": given})
        for given in (True, np.True_, torch.tensor(True), 1.5, 2.0, "64", None, np.array([64]))
    },
    "im2col_step is 0": ("im2col_step", ValueError, {"im2col_step": 0}),
    "im2col_step is -1": ("im2col_step", ValueError, {"im2col_step": np.int64(-1)}),
}  # fmt: skip


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", WRONG)
def test_every_path_blames_the_same_argument(name, device):
    blamed, error, changes = WRONG[name]
    for path in paths(device):
        given = changes() if callable(changes) else dict(changes)
        if "validate" in given and not path.takes_validate:
            continue
        if given.pop("one_image", False):
            given |= {name: RIGHT[name][:1] for name in ("sampling_locations", "attention_weights", "reference_points")}
        with pytest.raises(error, match=rf"^{path.names.get(blamed, blamed)}\b") as raised:
            path.call(**given)
        assert raised.type is error, path
