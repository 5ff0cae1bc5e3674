"""The planner: a pure function, and what it promises the kernels."""

from dataclasses import replace

import pytest

from cupy_msda.arrays import item_size
from cupy_msda.call import Problem, ValueStrides, Variant, Wanted
from cupy_msda.cuda import plan, plan_backward
from tests.helpers.cases import CASES, DTYPE_PAIRS

VALUE = Wanted(True, False, False)
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
        assert key.queries * key.lanes <= 32
        assert launch.block == 32 * key.warps <= 1024
        assert launch.shared == plan.shared_bytes(key) <= 48 * 1024
        assert -(-key.L * key.P // key.chunk) * key.chunk < key.L * key.P + key.chunk
        if key.kind == "backward":
            assert key.queries * key.lanes == 32
            assert key.vec * item_size("float64" if key.value_dtype == "float64" else "float32") <= 16


@pytest.mark.parametrize(("alignment", "vec"), [(16, 4), (8, 2), (4, 1)])
def test_vectors_are_as_wide_as_the_addresses_allow(alignment, vec):
    assert [launch.key.vec for launch in both(problem(), alignment)] == [vec, vec]


def test_sixteen_bit_backward_owns_sixteen_bytes_of_the_float32_gradient():
    assert plan.forward(problem("float16"), 16).key.vec == 8
    assert plan.backward(problem("float16"), 16).key.vec == 4


@pytest.mark.parametrize("Q", [1, 127, 128, 129, 22223])
def test_every_query_has_a_warp(Q):
    for launch in both(problem(Q=Q)):
        key = launch.key
        in_block = key.warps * key.rounds * key.queries
        blocks, *rows = launch.grid
        more = rows_of_heads_at_the_end(launch, heads=2 * 8)
        assert rows == [2 * 8 + more, 1]
        assert (blocks - 1) * in_block < Q <= blocks * in_block


def rows_of_heads_at_the_end(launch, heads):
    return launch.grid[1] - heads if launch.key.kind == "forward" and launch.key.rounds > 1 else 0


@pytest.mark.parametrize(
    ("Q", "N", "multiprocessors", "ending"),
    [(22223, 2, 132, 2), (22223, 2, 1320, 16), (22223, 1, 1, 1), (2000, 9, 132, 25), (500_000, 1, 132, 1)],
)
def test_heads_at_the_end_are_about_a_wave_of_blocks_of_one_round(Q, N, multiprocessors, ending):
    launch = plan.forward(problem(Q=Q, S=Q, N=N), 16, multiprocessors)
    assert launch.key.rounds == 2
    assert rows_of_heads_at_the_end(launch, heads=N * 8) == ending


@pytest.mark.parametrize("value", ["float32", "float16"])
def test_pixels_that_fill_the_gpu_are_taken_in_rounds_and_hold_few_levels_in_registers(value):
    def of(**sizes):
        key = plan.forward(problem(value, **sizes), 16).key
        assert key.rounds == 1 or (key.screened and key.unroll == key.chunk == key.K)
        return key.rounds, key.levels_in_registers

    assert of(Q=22223) == (2, True)
    assert of(Q=22223, levels=((1, 1, 0),) * 5) == of(Q=22223, P=8) == (2, True)
    assert of(Q=22223, levels=((1, 1, 0),) * 6) == (2, False)
    assert of(Q=22223, D=64) == ((2, True) if value == "float32" else (1, False))
    assert of(Q=22222) == of(Q=22223, P=9) == of(Q=22223, D=33) == of(Q=22223, D=4) == (1, False)


@pytest.mark.parametrize(("N", "heads"), [(8191, [65528, 1]), (8192, [65535, 2]), (100_000, [65535, 13])])
def test_a_grid_has_room_for_the_heads_of_any_batch(N, heads):
    for launch in both(problem(N=N)):
        assert [*launch.grid[1:]] == heads


@pytest.mark.parametrize(("N", "rounds", "rows"), [(8191, 2, [65530, 1]), (8192, 1, [65535, 2])])
def test_pixels_are_taken_in_rounds_while_the_second_axis_holds_all_rows(N, rounds, rows):
    launch = plan.forward(problem(Q=22223, N=N), 16)
    assert (launch.key.rounds, [*launch.grid[1:]]) == (rounds, rows)


@pytest.mark.parametrize(
    ("pair", "P", "alignment", "together"),
    [
        (("float32", "float32"), 4, 16, 2),
        (("float32", "float32"), 4, 8, 1),
        (("float16", "float16"), 3, 16, 4),
        (("bfloat16", "float32"), 3, 16, 2),
        (("float16", "float16"), 4, 8, 1),
    ],
)
def test_samples_are_read_together_where_their_number_and_alignment_allow(pair, P, alignment, together):
    assert plan.forward(problem(*pair, Q=22223, P=P), alignment).key.together == together
    assert plan.forward(problem(*pair, Q=22223, P=3, levels=LEVELS[:1]), 16).key.together == 1


@pytest.mark.parametrize(("pixels", "banded"), [(2**21, True), (2**21 + 1, False)])
def test_queries_are_taken_in_bands_where_the_kernels_division_is_exact(pixels, banded):
    assert [bool(launch.key.band) for launch in both(problem(S=pixels, Q=pixels))] == [banded, banded]


@pytest.mark.parametrize(("S", "wide"), [(2**26 - 1, False), (2**26, True)])
def test_index_width(S, wide):
    """32 bits hold 16 places for each row of an image, with room for a line outside it."""
    assert [launch.key.index_64 for launch in both(problem(S=S))] == [wide, wide]


def test_index_width_counts_samples_too():
    assert not plan.forward(problem(Q=2**22), 16).key.index_64
    assert plan.forward(problem(Q=2**23), 16).key.index_64


def backward_plan(**sizes):
    return plan_backward.backward(problem(**{"N": 2, "Q": 300} | sizes), 16)


def test_many_samples_a_row_are_merged():
    encoder = backward_plan(Q=22223)
    assert encoder.atomics.key.merge
    assert encoder.samples is encoder.summation is None
    assert not backward_plan(Q=300, S=2000, N=1).atomics.key.merge


def test_few_samples_in_a_large_value_are_summed_in_lists():
    assert backward_plan(N=8, Q=900).summation.sum.key.kind == "add"
    assert backward_plan(N=2, value="float16").summation
    assert backward_plan(N=1).atomics
    assert backward_plan(S=2**20).atomics  # would take too many slabs
    assert backward_plan(N=1, value="float16").summation
    assert backward_plan(N=1, Q=10, S=80, value="float16").atomics


def test_a_fixed_order_has_no_atomics():
    for Q, kind in ((300, "add"), (22223, "sum")):
        found = replace(problem(Q=Q), deterministic=True)
        planned = plan_backward.backward(found, 16)
        assert planned.atomics is planned.rounding is None
        assert planned.summation.sum.key.kind == kind
        assert not planned.samples.key.grad_value


def test_only_what_is_wanted_is_planned():
    lists = replace(problem(), deterministic=True)
    assert plan_backward.backward(lists, 16, wanted=Wanted(value=False)).summation is None
    assert plan_backward.backward(lists, 16, wanted=VALUE).samples is None
    atomics = plan_backward.backward(problem(N=1), 16, wanted=VALUE).atomics
    assert atomics.key.grad_value
    assert not atomics.key.grad_locations
    assert not atomics.key.grad_weights


def test_sixteen_bits_are_rounded_once_unless_summed_in_lists():
    assert backward_plan(value="float16", Q=22223).rounding
    assert not backward_plan(value="float16", N=8).rounding


@pytest.mark.parametrize("value", ["float16", "float32", "float64"])
@pytest.mark.parametrize(("D", "S", "Q", "P"), [(32, 22223, 22223, 4), (1025, 40000, 300, 4), (32, 10**6, 900, 100)])
def test_a_sum_in_lists_fits_everywhere(value, D, S, Q, P):
    """64 KiB of shared memory is what sm_75 has; a run's places are 16-bit numbers."""
    planned = plan_backward.summation(problem(value, D=D, S=S, Q=Q, P=P), 16)
    assert planned.sort.shared <= 64 * 1024
    assert planned.sum.shared <= 48 * 1024
    assert planned.capacity < 2**16
    assert planned.runs * planned.capacity >= 2 * Q * 4 * P
    assert planned.nbytes <= plan_backward.WORKSPACE or planned.heads == 1


def test_patches_only_where_queries_are_pixels():
    assert plan.forward(problem(Q=22223), 16).key.band
    assert not plan.forward(problem(Q=22222), 16).key.band


def test_neighbours_outside_are_screened_where_pixels_fill_the_gpu_and_loops_are_not_nested():
    assert plan.forward(problem(Q=22223), 16).key.screened
    assert not plan.forward(problem(Q=22222), 16).key.screened
    assert not plan.forward(problem(Q=22223, N=1, M=1), 16, 100_000).key.screened
    chunked = plan.forward(problem(Q=22223, P=9), 16).key
    assert (chunked.chunk < chunked.K, chunked.screened) == (True, False)
    assert not plan.forward(problem(Q=22223, D=33), 16).key.screened
    border = replace(problem(Q=22223), variant=Variant(None, "bilinear", "border", False))
    assert not plan.forward(border, 16).key.screened


@pytest.mark.parametrize(
    ("value", "D", "M", "heads"),
    [
        ("float16", 32, 8, 2),
        ("float16", 32, 7, 1),
        ("float16", 16, 8, 4),
        ("float16", 16, 6, 2),
        ("float16", 64, 8, 1),
        ("float16", 30, 8, 1),
        ("float32", 32, 8, 1),
        ("float32", 16, 8, 2),
        ("float32", 1, 8, 4),
    ],
)
@pytest.mark.parametrize("Q", [300, 22223])
def test_a_warp_takes_the_heads_whose_rows_are_one_line(value, D, M, heads, Q):
    found = replace(problem(value, D=D, Q=Q), M=M)
    key = plan.forward(found, 16).key
    assert key.lanes * key.split * key.heads * key.queries <= 32
    assert key.heads == min(heads, 32 // (key.lanes * key.split))
    assert plan.backward(found, 16).key.heads == 1
    apart = replace(found, value_strides=ValueStrides(2 * M * D * 22223, 2 * M * D, 2 * D))
    assert plan.forward(apart, 16).key.heads == 1


def test_warps_wait_for_each_other_only_where_a_block_does_something_together():
    assert plan.forward(problem(), 16).key.alone
    assert not plan.backward(problem(), 16).key.alone
    many = tuple((1, 1, 0) for _ in range(33))
    assert not plan.forward(problem(levels=many, P=1), 16).key.alone


def test_metadata_by_value_unless_it_is_on_the_device_or_long():
    assert not plan.forward(problem(), 16).key.levels_on_device
    assert plan.forward(problem(levels=None), 16).key.levels_on_device
    many = tuple((1, 1, 0) for _ in range(plan.MAX_LEVELS_BY_VALUE + 1))
    assert plan.forward(problem(levels=many, P=1), 16).key.levels_on_device


def test_key_does_not_know_how_many_queries_pixels_or_images():
    """No recompilation from image to image."""
    one, other = problem(Q=1000, S=22223, N=4), problem(Q=900, S=30000, N=8)
    assert [launch.key for launch in both(one)] == [launch.key for launch in both(other)]


def test_few_queries_are_shared_by_more_lanes():
    few, many = (plan.forward(problem("float16", Q=Q), 16, 132).key for Q in (300, 3000))
    assert (few.lanes * few.split, many.lanes * many.split) == (16, 8)
    assert few.min_blocks * few.warps < many.min_blocks * many.warps
    assert plan.forward(problem("float16", Q=300), 16, 16).key == many
    assert plan.forward(problem(Q=22223), 16).key.split == 1


@pytest.mark.parametrize(("D", "P", "split"), [(32, 4, 2), (4, 4, 16), (4, 1, 4), (64, 4, 1), (48, 4, 1)])
def test_no_group_of_lanes_is_without_samples(D, P, split):
    assert plan.forward(problem(D=D, P=P), 16).key.split == split


def test_planning_is_pure():
    assert both(problem()) == both(problem())
    assert len({str(plan.forward(problem(D=case.D), 16).key) for case in CASES}) > 5


def test_variants_are_axes_of_the_key():
    form = Variant((3, 6, 3, 1), "nearest")
    found = replace(problem(P=0), variant=form)
    for launch in both(found):
        key = launch.key
        assert (key.points, key.P, key.K, key.nearest, key.border) == ((3, 6, 3, 1), 0, 13, True, False)
        assert key.macros()["MSDA_POINTS"] == "3,6,3,1"
        assert key.chunk <= 13
    clamped = replace(problem(), variant=Variant(None, "bilinear", "border", True))
    for launch in both(clamped):
        key = launch.key
        assert (key.points, key.P, key.K, key.border, key.align_corners) == ((), 4, 16, True, True)
        assert "MSDA_POINTS" not in key.macros()


def test_samples_of_all_levels_decide_between_32_and_64_bits():
    # 2 * Q * M * K offsets into the locations: 16 samples fit into 31 bits here, 17 do not.
    fits = problem(Q=8388607, M=8, S=50, levels=((1, 1, 0),) * 4)
    over = replace(fits, P=0, variant=Variant((5, 4, 4, 4)))
    assert not plan.forward(fits, 16).key.index_64
    assert plan.forward(over, 16).key.index_64
