"""The planner: a pure function, and what it promises the kernels."""

from dataclasses import replace

import pytest

from cupy_msda.arrays import item_size
from cupy_msda.call import ALL, FusedFrontEnd, Problem, ValueStrides, Variant, Wanted
from cupy_msda.cuda import cost_model, gpu, heuristics, plan, plan_backward
from cupy_msda.cuda.gpu import H100
from tests.helpers.cases import CASES, DTYPE_PAIRS

VALUE = Wanted(True, False, False)
LEVELS = ((100, 167, 0), (50, 84, 16700), (25, 42, 20900), (13, 21, 21950))


def problem(value="float32", location=None, D=32, P=4, Q=300, S=22223, M=8, N=2, levels=LEVELS):
    return Problem(N, S, M, D, len(levels or LEVELS), P, Q, value, location or value, ("cuda", 0), levels)


def forward(found, alignment=16, on=H100):
    return plan.forward(found, alignment, on).spec


def both(found, alignment=16):
    return plan.forward(found, alignment, H100), plan.backward(found, alignment, H100)


def with_multiprocessors(count):
    return replace(H100, multiprocessors=count)


# ---- lanes and channels ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pair", DTYPE_PAIRS, ids="-".join)
@pytest.mark.parametrize("D", [1, 3, 30, 32, 33, 36, 48, 64, 71, 128, 256, 1025])
@pytest.mark.parametrize("P", [1, 4, 100])
def test_lanes_cover_the_channels(pair, D, P):
    for launch in both(problem(*pair, D=D, P=P)):
        spec = launch.spec
        vec, lanes, dtype = spec.channels.vec, spec.channels.lanes, spec.channels.value_dtype
        assert D % vec == 0
        assert vec * item_size(dtype) <= 16
        assert (spec.channels.channel_tiles - 1) * vec * lanes < D <= spec.channels.channel_tiles * vec * lanes
        assert spec.queries_per_tile * lanes <= 32
        assert launch.threads == 32 * spec.block.warps <= 1024
        assert launch.shared_bytes == spec.shared_bytes <= 48 * 1024
        K, chunk = spec.samples.K, spec.queries.chunk
        assert -(-K // chunk) * chunk < K + chunk
        if spec.kernel == "backward":
            assert spec.queries_per_tile * lanes == 32
            assert vec * item_size("float64" if dtype == "float64" else "float32") <= 16


@pytest.mark.parametrize(("alignment", "vec"), [(16, 4), (8, 2), (4, 1)])
def test_vectors_are_as_wide_as_the_addresses_allow(alignment, vec):
    assert [launch.spec.channels.vec for launch in both(problem(), alignment)] == [vec, vec]


@pytest.mark.parametrize("alignment", [32, 512, 4096, 2**20])
def test_an_alignment_beyond_16_bytes_changes_nothing(alignment):
    assert both(problem(), alignment) == both(problem(), 16)


def test_a_lane_of_the_16_bit_backward_holds_16_bytes_of_the_float32_gradient():
    assert forward(problem("float16")).channels.vec == 8
    assert plan.backward(problem("float16"), 16, H100).spec.channels.vec == 4


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
def test_a_warp_takes_the_heads_whose_value_vectors_are_one_cache_line(value, D, M, heads, Q):
    found = replace(problem(value, D=D, Q=Q), M=M)
    spec = forward(found)
    lanes = spec.channels.lanes * spec.lane_groups
    assert lanes * spec.heads_per_warp * spec.queries_per_tile <= 32
    assert spec.heads_per_warp == min(heads, 32 // lanes)
    apart = replace(found, value_strides=ValueStrides(2 * M * D * 22223, 2 * M * D, 2 * D))
    assert forward(apart).heads_per_warp == 1


def test_few_queries_leave_a_thread_more_registers():
    few, many = (forward(problem("float16", Q=Q)) for Q in (300, 3000))
    assert few.block.min_blocks * few.block.warps < many.block.min_blocks * many.block.warps
    assert forward(problem("float16", Q=300), on=with_multiprocessors(16)) == many
    assert forward(problem(Q=22223)).lane_groups == 1


@pytest.mark.parametrize(
    ("D", "L", "P", "groups"),
    [(32, 4, 4, 2), (32, 1, 8, 2), (32, 1, 7, 1), (4, 4, 4, 4), (4, 3, 5, 2), (4, 8, 8, 16), (64, 4, 4, 1)],
)
def test_a_lane_group_has_four_samples_or_more(D, L, P, groups):
    assert forward(replace(problem(D=D, P=P), L=L)).lane_groups == groups


@pytest.mark.parametrize(
    ("value", "D", "P", "fused", "many"),
    [
        ("float32", 32, 8, False, False), ("float32", 32, 9, False, True), ("float32", 32, 4, True, True),
        ("float32", 48, 4, False, False), ("float16", 48, 4, False, True), ("float16", 32, 4, True, False),
        ("float16", 16, 2, False, False), ("float16", 16, 3, False, True),
    ],
)  # fmt: skip
def test_gradients_of_samples_that_need_more_registers_have_fewer_warps(value, D, P, fused, many):
    found = problem(value, D=D, P=P)
    if fused:
        found = replace(found, fused=FusedFrontEnd(2, 4, value, False))
    spec = heuristics.backward(found, 16, H100, Wanted(value=False, locations=True, weights=True), False)
    assert (spec.block.warps * spec.block.min_blocks == 32) == many


# ---- grids -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("Q", [1, 127, 128, 129, 22223])
def test_every_query_has_a_warp(Q):
    for launch in both(problem(Q=Q)):
        spec = launch.spec
        in_block = spec.block.warps * spec.queries.query_tiles * spec.queries_per_tile
        blocks, *rows = launch.grid
        assert rows == [2 * 8 + rows_of_the_last_wave(launch, heads=2 * 8), 1]
        assert (blocks - 1) * in_block < Q <= blocks * in_block


def rows_of_the_last_wave(launch, heads):
    return launch.grid[1] - heads if launch.spec.kernel == "forward" and launch.spec.queries.query_tiles > 1 else 0


@pytest.mark.parametrize(
    ("Q", "N", "multiprocessors", "heads"),
    [(22223, 2, 132, 2), (22223, 2, 1320, 16), (22223, 1, 1, 1), (2000, 9, 132, 25), (500_000, 1, 132, 1)],
)
def test_the_last_heads_are_about_a_wave_of_blocks_of_one_query_tile(Q, N, multiprocessors, heads):
    launch = plan.forward(problem(Q=Q, S=Q, N=N), 16, with_multiprocessors(multiprocessors))
    assert launch.spec.queries.query_tiles == 2
    assert rows_of_the_last_wave(launch, heads=N * 8) == heads


def test_a_gpu_that_holds_fewer_blocks_has_a_shorter_last_wave():
    sizes = {"Q": 5000, "S": 5000, "N": 16}
    t4 = replace(gpu.ARCHITECTURES[75], multiprocessors=132)
    held, hopper = (plan.forward(problem(**sizes), 16, on) for on in (t4, H100))
    assert (held.spec.block.min_blocks, hopper.spec.block.min_blocks) == (2, 3)
    assert (rows_of_the_last_wave(held, 128), rows_of_the_last_wave(hopper, 128)) == (7, 10)


@pytest.mark.parametrize(("N", "heads"), [(8191, [65528, 1]), (8192, [65535, 2]), (100_000, [65535, 13])])
def test_a_grid_has_room_for_the_heads_of_any_batch(N, heads):
    for launch in both(problem(N=N)):
        assert [*launch.grid[1:]] == heads


@pytest.mark.parametrize(("N", "tiles", "rows"), [(8191, 2, [65530, 1]), (8192, 1, [65535, 2])])
def test_a_warp_takes_two_query_tiles_while_the_second_axis_holds_all_rows(N, tiles, rows):
    launch = plan.forward(problem(Q=22223, N=N), 16, H100)
    assert (launch.spec.queries.query_tiles, [*launch.grid[1:]]) == (tiles, rows)


# ---- queries that are pixels -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", ["float32", "float16"])
def test_pixels_that_fill_the_gpu_are_taken_in_two_query_tiles_with_few_levels_in_registers(value):
    def of(**sizes):
        spec = forward(problem(value, **sizes))
        tiles, chunk = spec.queries.query_tiles, spec.queries.chunk
        assert tiles == 1 or (spec.masked_neighbours and spec.block.unroll == chunk == spec.samples.K)
        return tiles, spec.levels_in_registers

    assert of(Q=22223) == (2, True)
    assert of(Q=22223, levels=((1, 1, 0),) * 5) == of(Q=22223, P=8) == (2, True)
    assert of(Q=22223, levels=((1, 1, 0),) * 6) == (2, False)
    assert of(Q=22223, D=64) == ((2, True) if value == "float32" else (1, False))
    assert of(Q=22222) == of(Q=22223, P=9) == of(Q=22223, D=33) == of(Q=22223, D=4) == (1, False)


@pytest.mark.parametrize(("pixels", "tiles"), [(2**21, 2), (2**21 + 1, 1)])
def test_only_queries_in_tiles_of_pixels_come_as_several_per_warp(pixels, tiles):
    spec = forward(problem(Q=pixels, S=pixels))
    assert (spec.queries.query_tiles, bool(spec.queries.tile_rows)) == (tiles, tiles == 2)


@pytest.mark.parametrize(("pixels", "tiled"), [(2**21, True), (2**21 + 1, False)])
def test_queries_are_taken_in_tiles_where_the_division_of_the_kernels_is_exact(pixels, tiled):
    assert [bool(launch.spec.queries.tile_rows) for launch in both(problem(S=pixels, Q=pixels))] == [tiled, tiled]


def test_queries_are_taken_in_tiles_only_where_they_are_pixels():
    assert forward(problem(Q=22223)).queries.tile_rows
    assert not forward(problem(Q=22222)).queries.tile_rows


def test_neighbours_are_masked_where_pixels_fill_the_gpu_and_loops_are_not_nested():
    assert forward(problem(Q=22223)).masked_neighbours
    assert not forward(problem(Q=22222)).masked_neighbours
    assert not forward(problem(Q=22223, N=1, M=1), on=with_multiprocessors(100_000)).masked_neighbours
    chunked = forward(problem(Q=22223, P=9))
    assert (chunked.queries.chunk < chunked.samples.K, chunked.masked_neighbours) == (True, False)
    assert not forward(problem(Q=22223, D=33)).masked_neighbours
    border = replace(problem(Q=22223), variant=Variant(None, "bilinear", "border", False))
    assert not forward(border).masked_neighbours


# ---- samples and levels ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("S", "wide"), [(2**26 - 1, False), (2**26, True)])
def test_offsets_are_wide_where_16_times_a_pixel_needs_it(S, wide):
    """32 bits hold 16 times each pixel of an image, with room for a row outside it."""
    assert [launch.spec.wide_index for launch in both(problem(S=S))] == [wide, wide]


def test_offsets_are_wide_where_samples_need_it():
    assert not forward(problem(Q=2**22)).wide_index
    assert forward(problem(Q=2**23)).wide_index


def test_the_samples_of_all_levels_decide_between_32_and_64_bits():
    # 2 * Q * M * K offsets into the locations: 16 samples fit into 31 bits here, 17 do not.
    fits = problem(Q=8388607, M=8, S=50, levels=((1, 1, 0),) * 4)
    over = replace(fits, P=0, variant=Variant((5, 4, 4, 4)))
    assert not forward(fits).wide_index
    assert forward(over).wide_index


def test_warps_are_independent_while_a_warp_has_a_lane_for_each_level():
    assert forward(problem()).warp_independent
    many = tuple((1, 1, 0) for _ in range(33))
    assert not forward(problem(levels=many, P=1)).warp_independent


def test_metadata_on_the_host_and_on_the_device_runs_the_same_kernels():
    for known, unknown in zip(both(problem()), both(problem(levels=None)), strict=True):
        assert known == unknown


def test_variants_are_axes():
    form = Variant((3, 6, 3, 1), "nearest")
    for launch in both(replace(problem(P=0), variant=form)):
        samples = launch.spec.samples
        assert (samples.points, samples.P, samples.K) == ((3, 6, 3, 1), 0, 13)
        assert (samples.nearest, samples.border) == (True, False)
        assert launch.spec.queries.chunk <= 13
    clamped = replace(problem(), variant=Variant(None, "bilinear", "border", True))
    for launch in both(clamped):
        samples = launch.spec.samples
        assert (samples.points, samples.P, samples.K) == ((), 4, 16)
        assert (samples.border, samples.align_corners) == (True, True)


# ---- which kernels a backward runs -----------------------------------------------------------------------------------


def backward_plan(**sizes):
    return plan_backward.backward(problem(**{"N": 2, "Q": 300} | sizes), 16, H100)


def test_pixel_queries_are_aggregated():
    encoder = backward_plan(Q=22223, S=22223)
    assert encoder.atomics.spec.aggregation_bits
    assert encoder.samples is encoder.summation is None


def test_few_samples_in_a_large_16_bit_value_are_sorted():
    planned = backward_plan(N=8, Q=300, value="float16")
    assert planned.summation.reduce.spec.chunk == 32
    assert planned.samples
    assert planned.atomics is None


def test_small_calls_use_atomics():
    assert not backward_plan(N=1, Q=10, S=80, value="float16").atomics.spec.aggregation_bits


def test_a_fixed_order_has_no_atomics():
    for Q, batch in ((300, 32), (22223, 128)):
        found = replace(problem(Q=Q), deterministic=True)
        planned = plan_backward.backward(found, 16, H100)
        assert planned.atomics is planned.cast is None
        assert planned.summation.reduce.spec.chunk == batch
        assert not planned.samples.spec.gradients.grad_value


@pytest.mark.parametrize("grown", ["N", "S", "Q", "P"])
def test_every_estimate_grows_with_the_problem(grown):
    small = problem()
    large = replace(small, **{grown: 2 * getattr(small, grown)})
    before, after = cost_model.estimates(small), cost_model.estimates(large)
    assert all(after[way] > before[way] for way in before)


def test_what_cannot_be_counted_is_not_sorted_for_its_speed():
    found = problem(Q=2**27, P=4)
    assert "sorted" not in cost_model.estimates(found)
    assert "sorted" in cost_model.estimates(replace(found, Q=2**25))


def test_only_what_is_wanted_is_planned():
    ordered = replace(problem(), deterministic=True)
    assert plan_backward.backward(ordered, 16, H100, Wanted(value=False)).summation is None
    assert plan_backward.backward(ordered, 16, H100, VALUE).samples is None
    gradients = plan_backward.backward(problem(N=1), 16, H100, VALUE).atomics.spec.gradients
    assert gradients.grad_value
    assert not gradients.grad_locations
    assert not gradients.grad_weights


def test_the_gradient_in_16_bits_is_cast_unless_it_is_sorted():
    assert backward_plan(value="float16", Q=22223, S=22223).cast
    assert not backward_plan(value="float16", N=8).cast


@pytest.mark.parametrize("value", ["float16", "float32", "float64"])
@pytest.mark.parametrize(("D", "S", "Q", "P"), [(32, 22223, 22223, 4), (1025, 40000, 300, 4), (32, 10**6, 900, 100)])
def test_a_sorted_sum_fits_everywhere(value, D, S, Q, P):
    """sm_75 has 64 KiB of shared memory. Positions in a sorted run are 16-bit numbers."""
    planned = plan_backward.summation(problem(value, D=D, S=S, Q=Q, P=P), 16, H100)
    assert planned.sort.shared_bytes <= 64 * 1024
    assert planned.reduce.shared_bytes <= 48 * 1024
    assert planned.capacity < 2**16
    assert planned.runs * planned.capacity >= 2 * Q * 4 * P
    assert planned.queue <= plan_backward.WORKSPACE or planned.heads == 1
    assert planned.nbytes - planned.queue <= planned.queue


# ---- the planner as a whole ------------------------------------------------------------------------------------------


def test_a_specialisation_does_not_know_how_many_queries_pixels_or_images():
    """No recompilation from image to image."""
    one, other = problem(Q=1000, S=22223, N=4), problem(Q=900, S=30000, N=8)
    assert [launch.spec for launch in both(one)] == [launch.spec for launch in both(other)]


def test_planning_is_pure():
    assert both(problem()) == both(problem())
    assert len({str(forward(problem(D=case.D))) for case in CASES}) > 5


def test_the_gradients_that_are_wanted_are_axes():
    spec = plan.backward(problem(N=1), 16, H100, ALL).spec
    assert spec.gradients.axes() == {
        "grad_value": True,
        "grad_locations": True,
        "grad_weights": True,
        "grad_references": False,
    }
