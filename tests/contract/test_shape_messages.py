"""A message about a shape says which argument each expected size comes from, and which order of dimensions it has."""

import itertools
import re

import numpy as np
import pytest

import cupy_msda
from cupy_msda.call import FUSED_NAMES, OPERATOR_NAMES, PLAIN
from cupy_msda.shapes import Shapes

N, M, D, L, P, Q = 2, 4, 8, 3, 5, 7
LEVELS = ((6, 7), (3, 4), (2, 2))
S = sum(h * w for h, w in LEVELS)
SIZES = {"N": N, "S": S, "M": M, "D": D, "L": L, "P": P, "Q": Q, "2": 2}
RIGHT = {
    "value": "N, S, M, D",
    "sampling_locations": "N, Q, M, L, P, 2",
    "attention_weights": "N, Q, M, L, P",
}


def shape_of(symbols, **sizes):
    return tuple((SIZES | sizes)[symbol] for symbol in symbols.split(", "))


def message(levels=LEVELS, **shapes):
    """Of the error that a call with arrays of these shapes raises."""
    given = {name: shape_of(symbols) for name, symbols in RIGHT.items()} | shapes
    value, locations, weights = (np.zeros(given[name], np.float32) for name in RIGHT)
    with pytest.raises(ValueError, match=r"^\w+: expected shape") as raised:
        cupy_msda.ms_deform_attn(value, levels, None, locations, weights)
    return str(raised.value)


@pytest.mark.parametrize("order", ["N, M, S, D", "S, N, M, D", "N, S, D, M", "N, M, D, S"])
def test_a_value_in_another_order_is_blamed_itself(order):
    got, locations = list(shape_of(order)), list(shape_of(RIGHT["sampling_locations"]))
    assert message(value=shape_of(order)) == (
        f"value: expected shape [N, S, M, D], got {got}, which looks like [{order}]: N = 2 and M = 4 are those of "
        f"sampling_locations {locations}"
    )


@pytest.mark.parametrize("order", ["N, M, Q, L, P, 2", "Q, N, M, L, P, 2", "N, Q, L, M, P, 2"])
def test_locations_in_another_order_say_so(order):
    assert f"which looks like [{order}]" in message(sampling_locations=shape_of(order))


@pytest.mark.parametrize("order", ["N, M, Q, L, P", "Q, N, M, L, P", "N, Q, L, M, P"])
def test_weights_in_another_order_say_so(order):
    text = message(attention_weights=shape_of(order))
    assert text.startswith("attention_weights: ")
    assert f"which looks like [{order}]" in text


WRONG_SIZES = {
    "sampling_locations": {"N": "value", "M": "value", "L": "spatial_shapes"},
    "attention_weights": {
        "N": "value", "M": "value", "L": "spatial_shapes", "Q": "sampling_locations", "P": "sampling_locations",
    },
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "symbol"), [(name, symbol) for name, symbols in WRONG_SIZES.items() for symbol in symbols]
)
def test_a_wrong_size_names_where_the_expected_one_comes_from(name, symbol):
    text = message(**{name: shape_of(RIGHT[name], **{symbol: 11})})
    assert text.startswith(f"{name}: expected shape [{RIGHT[name]}] = ")
    assert re.search(rf"; {symbol} = {SIZES[symbol]} is that of {WRONG_SIZES[name][symbol]} \[", text)
    assert text.count(" is that of ") == 1
    assert "looks like" not in text


def rules(value, locations, pixels, names=OPERATOR_NAMES):
    given = {"value": value, names.locations: locations, "spatial_shapes": (L, 2)}
    return Shapes(given, names, PLAIN, lambda: pixels)


def test_an_encoder_tells_value_from_locations_by_the_pixels():
    """Where Q = S, an exchange of S and M in value looks like one of Q and M in locations."""
    exchanged, right = (N, M, S, D), (N, S, M, D)
    for pixels in (S, None):
        with pytest.raises(ValueError, match=r"^value: .*which looks like \[N, M, S, D\]"):
            rules(exchanged, (N, S, M, L, P, 2), pixels).read_samples()
        with pytest.raises(ValueError, match=r"^sampling_locations: .*which looks like \[N, M, Q, L, P, 2\]"):
            rules(right, (N, M, S, L, P, 2), pixels).read_samples()


def test_levels_on_a_gpu_leave_the_pixels_unknown():
    with pytest.raises(ValueError, match=r"^value: .*which looks like \[N, M, S, D\]"):
        rules((N, M, S, D), (N, Q, M, L, P, 2), None).read_samples()


def test_a_packed_call_says_what_it_needs():
    with pytest.raises(ValueError, match=r"L\*P\*3\] = .*multiple of 3\*L, and L = 3 is that of spatial_shapes"):
        rules((N, S, M, D), (N, Q, M, 3 * L * P + 1), S, FUSED_NAMES).read_packed()
    with pytest.raises(ValueError, match=r"^value: .*which looks like \[N, M, S, D\]"):
        rules((N, M, S, D), (N, Q, M, 3 * L * P), S, FUSED_NAMES).read_packed()


@pytest.mark.parametrize("exchanged", list(itertools.combinations(range(4), 2)), ids=str)
def test_an_exchange_of_any_two_dimensions_of_value_names_value_or_its_sizes(exchanged):
    first, second = exchanged
    shape = list(shape_of(RIGHT["value"]))
    shape[first], shape[second] = shape[second], shape[first]
    if exchanged == (1, 3):  # S and D: the levels do not fit
        given = [np.zeros(shape_of(RIGHT[name]), np.float32) for name in list(RIGHT)[1:]]
        with pytest.raises(ValueError, match=rf"^spatial_shapes: .*S = {D} of value \[2, 8, 4, 58\]"):
            cupy_msda.ms_deform_attn(np.zeros(shape, np.float32), LEVELS, None, *given)
    else:
        assert "value" in message(value=tuple(shape))
