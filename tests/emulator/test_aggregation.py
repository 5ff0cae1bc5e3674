"""Blocks that add up their samples of a cell before the atomics: cells of several levels, full, at the end of a row."""

import pytest

from tests.helpers import cases, emulator
from tests.helpers.cases import Case
from tests.helpers.tolerance import assert_close

pytestmark = pytest.mark.skipif(emulator.COMPILER is None, reason="needs g++")


def many():
    return Case("aggregated", levels=((5, 6), (5, 6), (2, 2)), N=1, M=2, D=32, P=4, queries=64).inputs(seed=32)


def one_cell_of_two_levels():
    """The same pixels as two levels of different widths, and on both only the first cell."""
    inputs = Case("overlap", levels=((5, 6), (6, 5)), starts=(0, 0), S=30, N=1, M=1, D=32, queries=64).inputs()
    inputs.locations[..., 0, :, :] = 0.9 / 6, 0.8 / 5
    inputs.locations[..., 1, :, :] = 0.9 / 5, 0.8 / 6
    inputs.locations[0, :10, :, 0] = 9
    return inputs


def cells_at_the_ends_of_two_rows():
    """Two cells, one at the end of a row, the other left of the next row: their pixels follow each other."""
    inputs = Case("two", levels=((5, 6),), N=1, M=1, D=32, P=4, queries=64).inputs()
    inputs.locations[0, :25] = 4.8 / 6, 1.9 / 5
    inputs.locations[0, 25:] = 0.1 / 6, 2.9 / 5
    return inputs


@pytest.mark.parametrize("order", [0, 1])
@pytest.mark.parametrize("draw", [many, one_cell_of_two_levels, cells_at_the_ends_of_two_rows])
def test_samples_of_a_cell_are_added_up(draw, order):
    inputs = draw()
    want = cases.expected(inputs)[1][0]
    assert_close(emulator.backward(inputs, sanitize=True, order=order)[0], want, "float32")
