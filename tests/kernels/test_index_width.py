"""Every planned kernel counts its arrays in a type that holds them, whatever the sizes.

What a kernel counts is written here from the shapes of the contract, and in which type from its CUDA source.
"""

import random
import re
from dataclasses import replace

import pytest

from cupy_msda.call import ALL, FusedFrontEnd, Problem, ValueStrides, Variant, Wanted
from cupy_msda.cuda import plan, plan_backward
from cupy_msda.cuda.gpu import H100
from tests.helpers.cases import DTYPE_PAIRS

INT, UNSIGNED, LONG = 2**31, 2**32, 2**63
WANTED = [Wanted(value, locations, weights) for value in (0, 1) for locations in (0, 1) for weights in (0, 1)][1:]
# The sizes of each array of the contract, by the letters of `Problem`.
ARRAYS = ("NSMD", "SMD", "SM", "S", "NQMD", "QMD", "NQMP", "QMP", "MP", "MD", "NM", "Q", "QP")


def problem(**sizes):
    known = {"N": 1, "S": 85, "M": 8, "D": 32, "L": 4, "P": 8, "Q": 100, "levels": None}
    known |= {"value_dtype": "float16", "location_dtype": "float16", "device": ("cuda", 0)}
    return Problem(**known | sizes)


def draw(generator):
    """A problem of which one or two arrays, of one image or all, have about 2**31 elements or many more."""
    pick = generator.choice
    sizes = {"N": pick((1, 2, 3)), "S": pick((1, 9, 5000)), "M": pick((1, 2, 3, 8)), "D": pick((1, 2, 16, 32, 33, 200))}
    sizes |= {"L": pick((1, 2, 4, 33)), "P": pick((1, 2, 3, 8)), "Q": pick((1, 10, 3000))}
    for array in generator.sample(ARRAYS, pick((1, 1, 2))):
        grown, elements = pick(array), 1
        for letter in array:
            elements *= sizes[letter] * (sizes["L"] if letter == "P" else 1)
        sizes[grown] = max(1, int(sizes[grown] * 2 ** generator.uniform(29, 34) / elements))
    if generator.random() < 0.2:
        sizes["Q"] = sizes["S"]
    L, S, pair = sizes["L"], sizes["S"], pick(DTYPE_PAIRS)
    fused = None
    if generator.random() < 0.6:
        fused = FusedFrontEnd(pick((2, 4)), pick((1, L)), pick(("float32", pair[0])), generator.random() < 0.6)
    points = None
    if generator.random() < 0.2 and L > 1:
        points, sizes["P"] = (sizes["P"],) * (L - 1) + (sizes["P"] + 1,), 0
    pixel = sizes["M"] * sizes["D"] * pick((1, 2, 2**20))
    strides = ValueStrides(S * pixel * pick((1, 2)), pick((pixel, INT - 1, INT - 8, INT)), sizes["D"])
    return Problem(
        **sizes, value_dtype=pair[0], location_dtype=pair[1], device=("cuda", 0),
        levels=pick((None, ((1, S, 0),) * L, ((S, 1, 0),) * L, ((1, 1, 0),) * L)),
        deterministic=generator.random() < 0.5, ragged=generator.random() < 0.3, fused=fused,
        variant=Variant(points, *pick((("bilinear", "zeros", False), ("nearest", "zeros", False)))),
        value_strides=strides if generator.random() < 0.3 else None,
    )  # fmt: skip


def drawn(count, seed):
    generator = random.Random(seed)
    return [(draw(generator), generator.choice(WANTED), generator.choice((2, 16))) for _ in range(count)]


def samples_of(found, as_given=True):
    """Elements of one image in the arrays of the samples: as the caller gives them, or as plain locations."""
    given, fused = found.Q * found.M * found.K, found.fused
    if fused is None or not as_given:
        return {"locations": 2 * given, "weights": given}
    references = {"references": found.Q * fused.levels * fused.coordinates}
    return references | ({"packed": 3 * given} if fused.packed else {"offsets": 2 * given, "logits": given})


def widest_side(found):
    return max((max(h, w) for h, w, _ in found.levels), default=0) if found.levels else found.S


def of_queries(found):
    """What `forward`, `backward` and `materialise` count in `index_t`, whose blocks take the queries of a head."""
    return samples_of(found) | {"Q": found.Q, "S": found.S}


def of_pixels(found):
    """A prepared sample holds 16 times a pixel, which may lie a row and a pixel before the image."""
    return {"16 * pixel": 16 * (found.S + 1)}


def indices(found, planned, sums):
    """What a kernel counts in `index_t`, by name."""
    kernel = planned.spec.kernel
    if kernel in ("forward", "backward"):
        return of_queries(found) | of_pixels(found)
    if kernel == "materialise":
        return of_queries(found) | samples_of(found, as_given=False)
    if kernel == "bucket_sort":
        given = found.fused is None or not sums.materialise
        # A row below the image, counted from the slab; and two segments per bucket.
        pixels = {"pixel": found.S + widest_side(found) + 1}
        return samples_of(found, as_given=given) | pixels | {"Q": found.Q, "Q*K": found.Q * found.K}
    return {}


def limits(found, planned, sums):
    """(count, limit) of what a kernel counts in 32 bits in every specialisation."""
    kernel, x, y, z = planned.spec.kernel, *planned.grid
    held = {"grid.x": (x, INT - 1), "grid.y": (y, 65535), "grid.z": (z, 65535)}
    if kernel in ("forward", "backward", "materialise"):
        held["heads"] = (found.N * found.M, UNSIGNED)
    if kernel in ("backward", "reduce_buckets"):
        held["M*D"] = (found.M * found.D, INT)
    if kernel in ("forward", "backward", "materialise", "bucket_sort"):
        per_query = max(samples_of(found).values()) // found.Q
        held |= {"of a query": (per_query, INT), "H, W": (widest_side(found) if found.levels else 0, INT)}
    if kernel == "reduce_references":
        held["of a query"] = (found.M * found.L * found.fused.coordinates, INT)
    if kernel in ("bucket_sort", "reduce_buckets"):
        held["Q"] = (found.Q, UNSIGNED)
    if kernel == "reduce_buckets":
        summed, reduce = sums.summation, sums.summation.reduce.spec
        contributions = len(found.variant.neighbours) * found.Q * found.K
        # Those of a bucket are those of all samples at most, and the last chunk ends after them.
        held |= {
            "contributions": (contributions + summed.chunk_size, LONG if reduce.wide_counts else UNSIGNED),
        }
        held |= {"queue": (summed.queued, UNSIGNED)}
    return held


def launches_of(found, wanted, alignment):
    """Every launch of a forward and a backward, with the backward that it is part of."""
    if found.fused:
        wanted = wanted._replace(references=True)
    sums = plan_backward.backward(found, alignment, H100, found.computed(wanted))
    return [(plan.forward(found, alignment, H100), sums), *((launch, sums) for launch in sums.launches)]


def beyond_the_limits(found):
    """Whether a size of the contract is beyond what the kernels hold."""
    per_query = max(samples_of(found).values()) // found.Q
    return (
        found.N * found.M > 65535 * 65535
        or max(per_query, found.M * (found.D + 1024), found.Q * max(found.K // 512, 1)) >= INT
        or 32 * found.D >= INT  # sums of a bucket
        or (found.levels and widest_side(found) >= INT)
        or (found.fused and found.M * found.L * found.fused.coordinates >= INT)
    )


def accepted_launches(found, wanted, alignment):
    """The same; none where the planner refuses what is beyond the limits, or a softmax of very many samples."""
    try:
        return launches_of(found, wanted, alignment)
    except NotImplementedError as error:
        if (found.fused and "softmax" in str(error)) or beyond_the_limits(found):
            return []
        raise


@pytest.mark.parametrize("seed", range(4))
def test_each_index_fits_into_its_type(seed):
    checked = set()
    for found, wanted, alignment in drawn(1000, seed):
        launches = accepted_launches(found, wanted, alignment)
        for launch, sums in launches:
            wide = launch.spec.axes().get("wide_index")
            for name, count in indices(found, launch, sums).items():
                assert count <= (LONG if wide else INT), (name, launch.spec, found)
            for name, (count, limit) in limits(found, launch, sums).items():
                assert count <= limit, (name, launch.spec, found)
            checked.add((launch.spec.kernel, wide))
    assert {kernel for kernel, _ in checked} >= {"forward", "backward", "bucket_sort", "reduce_buckets", "materialise"}
    assert {wide for kernel, wide in checked if kernel == "bucket_sort"} == {True, False}


@pytest.mark.parametrize("seed", range(2))
def test_64_bits_are_for_what_32_do_not_hold(seed):
    """Up to a factor of two: a kernel may leave room for a row outside the image."""
    for found, wanted, alignment in drawn(1000, seed):
        launches = accepted_launches(found, wanted, alignment)
        for launch, sums in launches:
            if launch.spec.axes().get("wide_index"):
                counted = indices(found, launch, sums)
                assert 4 * max(counted.values()) > INT, (counted, launch.spec, found)


def test_packed_rows_of_a_sorted_sum_are_counted():
    found = problem(Q=3_000_000, fused=FusedFrontEnd(2, 4, "float16", True), deterministic=True)
    planned = plan_backward.backward(found, 16, H100, ALL)
    assert planned.summation.sort.spec.wide_index
    assert planned.samples.spec.wide_index


# Queries of each array that are the last to fit into 32 bits, with 8 heads and 32 samples.
FITS = {
    "plain": (None, 2**31 // (2 * 256) - 1),
    "offsets": (FusedFrontEnd(2, 1, "float16", False), 2**31 // (2 * 256) - 1),
    "packed": (FusedFrontEnd(2, 1, "float16", True), 2**31 // (3 * 256)),
}


@pytest.mark.parametrize("name", FITS)
def test_the_last_query_that_fits_takes_32_bits(name):
    fused, Q = FITS[name]
    for queries, wide in ((Q, False), (Q + 1, True)):
        found = problem(Q=queries, fused=fused, deterministic=True)
        for launch, _ in launches_of(found, ALL, 16):
            assert launch.spec.axes().get("wide_index", wide) == wide


def test_boxes_of_one_sample_per_level_decide():
    found = problem(M=1, D=8, L=33, P=1, Q=2**31 // (33 * 4), fused=FusedFrontEnd(4, 33, "float16", False))
    for queries, wide in ((found.Q, False), (found.Q + 1, True)):
        launches = launches_of(replace(found, Q=queries, deterministic=True), ALL, 16)
        # The sort reads the materialised locations, of two numbers per sample.
        wide_of = {launch.spec.kernel: launch.spec.axes().get("wide_index") for launch, _ in launches}
        assert (wide_of["forward"], wide_of["materialise"], wide_of["bucket_sort"]) == (wide, wide, False)


def test_the_stride_of_value_decides_nothing():
    """Pixels are counted in `index_t`, and their bytes in 64 bits."""
    strides = ValueStrides(2**40, 2**31 + 64, 32)
    launches = launches_of(problem(value_strides=strides, deterministic=True), ALL, 16)
    assert not any(launch.spec.axes().get("wide_index") for launch, _ in launches)


LIMITS = {
    "value: expected N*M below 2**32": {"N": 2**32, "M": 1},
    "value: expected N*M / 65535 below 2**16": {"N": 2**32 - 1, "M": 1},
    "value: expected M*D below 2**31": {"M": 2**16, "D": 2**15},
    "sampling_locations: expected 2*M*L*P below 2**31": {"M": 2**25},
    "sampling_offsets: expected 3*M*L*P below 2**31": {"M": 2**25, "fused": FusedFrontEnd(2, 4, "float16", True)},
    "spatial_shapes: expected H and W below 2**31": {"S": 2**31, "levels": ((1, 2**31, 0),) * 4},
    "sampling_locations: expected Q below 2**32": {"Q": 2**32, "deterministic": True},
}


@pytest.mark.parametrize("expected", LIMITS)
def test_what_no_kernel_holds_is_refused(expected):
    with pytest.raises(NotImplementedError, match=re.escape(f"{expected} on a GPU, got ")):
        plan_backward.backward(problem(**LIMITS[expected]), 16, H100)
