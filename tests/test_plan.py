"""The planner: a pure function, and what it promises the kernels."""

import pytest
from cases import CASES, DTYPE_PAIRS

from cupy_msda import plan
from cupy_msda.interop import item_size
from cupy_msda.problem import Problem

LEVELS = ((100, 167, 0), (50, 84, 16700), (25, 42, 20900), (13, 21, 21950))


def problem(value="float32", location=None, D=32, P=4, Q=300, S=22223, M=8, N=2, levels=LEVELS):
    return Problem(N, S, M, D, len(levels or LEVELS), P, Q, value, location or value, ("cuda", 0), levels)


def both(found, alignment=16):
    return plan.forward(found, alignment), plan.backward(found, alignment)


@pytest.mark.parametrize("pair", DTYPE_PAIRS, ids="-".join)
@pytest.mark.parametrize("D", [1, 3, 30, 32, 33, 36, 48, 64, 71, 128, 256, 1025])
@pytest.mark.parametrize("P", [1, 4, 100])
def test_lanes_cover_the_channels(pair, D, P):
    for launch in both(problem(*pair, D=D, P=P)):
        key = launch.key
        turns = -(-D // (key.vec * key.lanes))
        assert D % key.vec == 0
        assert key.vec * item_size(key.value_dtype) <= 16
        assert (turns - 1) * key.vec * key.lanes < D
        assert key.queries * key.lanes <= launch.block <= 1024
        assert launch.block % 32 == 0
        assert launch.shared == plan.shared_bytes(key) <= 48 * 1024
        assert -(-key.L * key.P // key.chunk) * key.chunk < key.L * key.P + key.chunk
        if key.kind == "backward":
            assert key.lanes & (key.lanes - 1) == 0
            assert key.queries * key.lanes == launch.block
            assert key.vec * item_size("float64" if key.value_dtype == "float64" else "float32") <= 16


@pytest.mark.parametrize(("alignment", "vec"), [(16, 4), (8, 2), (4, 1)])
def test_vectors_are_as_wide_as_the_addresses_allow(alignment, vec):
    assert [launch.key.vec for launch in both(problem(), alignment)] == [vec, vec]


def test_sixteen_bit_backward_owns_sixteen_bytes_of_the_float32_gradient():
    assert plan.forward(problem("float16"), 16).key.vec == 8
    assert plan.backward(problem("float16"), 16).key.vec == 4


def test_every_query_has_a_block():
    for Q in (1, 31, 32, 33, 300):
        for launch in both(problem(Q=Q)):
            assert launch.grid == 2 * 8 * -(-Q // launch.key.queries)


def test_huge_grids_are_walked():
    assert plan.forward(problem(N=2**30), 16).grid == 2**31 - 1


@pytest.mark.parametrize(("S", "wide"), [(2**23 - 1, False), (2**23, True)])
def test_index_width(S, wide):
    assert [launch.key.index_64 for launch in both(problem(S=S))] == [wide, wide]


def test_patches_only_where_queries_are_pixels():
    assert plan.forward(problem(Q=22223), 16).key.band
    assert not plan.forward(problem(Q=22222), 16).key.band


def test_metadata_by_value_unless_it_is_on_the_device_or_long():
    assert not plan.forward(problem(), 16).key.levels_on_device
    assert plan.forward(problem(levels=None), 16).key.levels_on_device
    many = tuple((1, 1, 0) for _ in range(plan.MAX_LEVELS_BY_VALUE + 1))
    assert plan.forward(problem(levels=many, P=1), 16).key.levels_on_device


def test_key_does_not_know_how_many_queries_pixels_or_images():
    """No recompilation from image to image."""
    one, other = problem(Q=300, S=22223, N=1), problem(Q=900, S=30000, N=8)
    assert [launch.key for launch in both(one)] == [launch.key for launch in both(other)]


def test_planning_is_pure():
    assert both(problem()) == both(problem())
    assert len({str(plan.forward(problem(D=case.D), 16).key) for case in CASES}) > 5
