"""The net catches: each fault below, planted into a copy of a source, turns a check red."""

import numpy as np
import pytest

from cupy_msda.call import Problem, Wanted
from cupy_msda.cuda import kernels, plan, plan_backward
from tests.helpers import cases, emulator
from tests.helpers.cases import CROSS_LEVEL, Case
from tests.helpers.tolerance import assert_close

pytestmark = pytest.mark.skipif(emulator.COMPILER is None, reason="needs g++")

CHECKED = [
    Case("encoder_order", levels=((9, 11), (4, 5), (2, 2)), N=1, M=2, D=8, queries=None),
    Case("tail_and_chunks", levels=((4, 5), (3, 3), (2, 2)), N=2, M=2, D=32, P=24, queries=5),
]
# Pixels taken in rounds: samples in pairs of two levels, lanes beyond the last query of a warp, levels in shared memory
# and two heads a warp.
ROUNDS = [
    Case("pairs", levels=((13, 15), (4, 5)), N=2, M=4, D=32, P=3, queries=None),
    Case("lanes_left", levels=((9, 11), (4, 5)), N=2, M=4, D=36, P=2, queries=None),
    Case("six_levels", levels=((9, 11), (4, 5), (2, 2), (1, 1), (1, 1), (1, 1)), N=2, M=8, D=16, P=1, queries=None),
]
FILL = "msda_fill_marked(samples, levels, queries, raw, k0);\n            __syncwarp();"
# Whether queries are found by their own lanes (MSDA_OWN, which comes later in the source).
OWN_QUERIES = "(MSDA_LEVELS_IN_REGISTERS && !MSDA_FRONT)"
OWN_FILL = "msda_fill_own(samples, slot, levels, raw, lane);\n            __syncwarp();"
BACKWARD_FILL = "msda_fill(samples, shared, raw, round, k0);\n            __syncwarp();"
SUM = "sum[turn][v] = fma(weight[c], x[v], sum[turn][v]);"
HALF_SUM = "{ msda_f16 half; msda_store(fma(weight[c], x[v], sum[turn][v]), half); sum[turn][v] = msda_load(half); }"

# name: (kernel, text of the source, what it becomes)
FAULTS = {
    "off-by-one bound of a column": ("forward", "cell.x0 + 1 < level.w ? 10", "cell.x0 + 1 <= level.w ? 10"),
    "off-by-one bound of a row": ("backward", "cell.y0 + 1 < level.h ? 12", "cell.y0 + 1 <= level.h ? 12"),
    "bound of a sample that counts": ("forward", "px > -1 && py > -1", "px > -2 && py > -1"),
    "missing barrier after the fill": ("forward", FILL, FILL.replace("__syncwarp();", "")),
    "missing barrier after the fill of the backward": (
        "backward",
        BACKWARD_FILL,
        BACKWARD_FILL.replace("__syncwarp();", ""),
    ),
    "missing barrier before the next chunk": (
        "forward",
        "            __syncwarp();\n        }\n\n        msda_sum_groups(sum);",
        "        }\n\n        msda_sum_groups(sum);",
    ),
    "missing barrier before the gradients": (
        "backward",
        "            __syncwarp();\n#if MSDA_GRAD_SAMPLES\n            msda_w",
        "#if MSDA_GRAD_SAMPLES\n            msda_w",
    ),
    "queries of another warp": ("forward", "group * MSDA_Q", f"({OWN_QUERIES} ? group : 0) * MSDA_Q"),
    "own queries of another warp": ("forward", "group * MSDA_Q", f"({OWN_QUERIES} ? 0 : group) * MSDA_Q"),
    "one query for all lanes": ("forward", "round, (int)(threadIdx.x % 32), lengths", "round, 0, lengths"),
    "own queries of the round before": ("forward", "round + 1, local, lengths", "round, local, lengths"),
    "missing barrier after a lane's own samples": ("forward", OWN_FILL, OWN_FILL.replace("__syncwarp();", "")),
    "missing barrier before the next round": (
        "forward",
        "            __syncwarp();\n        }\n\n        msda_sum_groups(sum);",
        "            if (MSDA_ROUNDS == 1) __syncwarp();\n        }\n\n        msda_sum_groups(sum);",
    ),
    "lanes beyond the last query that write": ("forward", "slot >= MSDA_SLOTS) return;", "slot >= 99) return;"),
    "own samples in another order": ("forward", "return k / MSDA_TOGETHER + k %", "return k % MSDA_TOGETHER + k %"),
    "level of the other sample of a pair": ("forward", "MSDA_LEVEL_OF(first + i))", "MSDA_LEVEL_OF(first))"),
    "own weights of another head": (
        "forward",
        "own.attention[pass] = msda_stream<MSDA_TOGETHER>(weights, at);",
        "own.attention[pass] = msda_stream<MSDA_TOGETHER>(weights, at - head * parts);",
    ),
    "own samples of queries that do not count": ("forward", "if (q >= 0 && part < parts)", "if (part < parts)"),
    "first query of a row of a head at the end": (
        "forward",
        "row % MSDA_ROUNDS * gridDim.x + blockIdx.x",
        "row % MSDA_ROUNDS + blockIdx.x",
    ),
    "head at the end that is another": ("forward", "whole + row / MSDA_ROUNDS", "whole + row % MSDA_ROUNDS"),
    "level in registers that is another": ("forward", "level.w = condition ? other.w", "level.w = 0 ? other.w"),
    "level in registers that is the one before": ("forward", "msda_take_if(l == i,", "msda_take_if(l > i,"),
    "level of a pixel that is the one before": ("forward", "msda_take_if(position >=", "msda_take_if(position >"),
    "levels in registers in another order": ("forward", "packed = packed && level.start == end;", ""),
    "vote of the block that is the warp's own": (
        "backward",
        "__syncthreads_or(packed);",
        "packed; __syncthreads();",
    ),
    "missing barrier after the levels": ("forward", "__syncwarp();\n    return packed;", "return packed;"),
    "missing barrier after the levels of a block": (
        "backward",
        "packed = __syncthreads_or(packed);",
        "packed = true;",
    ),
    "levels in another order": ("forward", "(int)extent.start == (lane ? before : 0)", "true"),
    "neighbour outside with a weight": ("forward", "if (!pair.has_first || !pair.has_next) {", "if (false) {"),
    "wrong side of a screened pair": (
        "forward",
        "fraction = pair.has_first ? (msda_acc)0 : (msda_acc)1;",
        "fraction = pair.has_first ? (msda_acc)1 : (msda_acc)0;",
    ),
    "screened column beyond the level": (
        "forward",
        "(unsigned)pair.first + 1 < (unsigned)size",
        "(unsigned)pair.first < (unsigned)size",
    ),
    "screened sample that does not count with a weight": (
        "forward",
        "sample.attention = inside ? attention",
        "sample.attention = 1 ? attention",
    ),
    "division that rounds up": ("forward", "((float)x + 0.5f)", "((float)x + 1.5f)"),
    "rows of one head for the outputs of two": ("forward", "(work.m + head) * head_stride", "work.m * head_stride"),
    "weights of one head for the outputs of two": (
        "forward",
        "msda_stream<1>(weights, msda_in_image(q, head * pitch + k, pitch))",
        "msda_stream<1>(weights, msda_in_image(q, k, pitch))",
    ),
    "row of another query": (
        "forward",
        "for (int c = 0; c < 4; ++c) row[c].word = decltype(row[c].word)();",
        "for (int c = 0; c < 4; ++c) row[c] = msda_read((msda_address)value + 3 * MSDA_STRIDE * sizeof(msda_value));",
    ),
    "barrier that some lanes do not reach": (
        "forward",
        FILL,
        FILL.replace("__syncwarp();", "if (active) __syncwarp();"),
    ),
    "swapped corners": (
        "forward",
        "weight[1] = top * sample.ax;\n    weight[0] = top - weight[1];",
        "weight[0] = top * sample.ax;\n    weight[1] = top - weight[0];",
    ),
    "swapped corners of the backward": (
        "backward",
        "at = from[c >> 1] + right",
        "at = from[c & 1] + right",
    ),
    "dropped tail guard": ("forward", "work.first + at < Q ? msda_query", "true ? msda_query"),
    "dropped channel guard": (
        "forward",
        "if (MSDA_D % MSDA_STEP != 0 && channel >= MSDA_D) continue;\n        const",
        "const",
    ),
    "dropped NaN of a bad level": (
        "forward",
        "if (!cell.counts && level.w == 0) sample.attention = msda_nan();",
        "",
    ),
    "float16 accumulation": ("forward", SUM, HALF_SUM),
    "overrun of shared memory": (
        "forward",
        "#define MSDA_PITCH (MSDA_CHUNK | 1)",
        "#define MSDA_PITCH (MSDA_CHUNK | 1) + 64",
    ),
    "misaligned vector access": (
        "forward",
        "+ lane * MSDA_VEC) * sizeof(msda_value);",
        "+ lane * MSDA_VEC) * sizeof(msda_value) + sizeof(msda_value);",
    ),
    "forgotten head": ("backward", "work.image * image_stride + work.m * head_stride", "work.image * image_stride"),
    "forgotten head of the forward": ("forward", "(work.m + head) * head_stride", "head * head_stride"),
    "gradient of the other axis": (
        "backward",
        "msda_store(x, xy.element[0]);",
        "msda_store(y, xy.element[0]);",
    ),
    "lost factor of the level's width": ("backward", "attention * slope_x * across", "attention * across"),
    "sum that loses a lane": (
        "backward",
        "for (int mask = 4; mask < MSDA_ROW_LANES; mask *= 2)",
        "for (int mask = 4; mask < MSDA_ROW_LANES / 2; mask *= 2)",
    ),
}
# In a variant: (kernel, variant, text of the source, what it becomes).
VARIANT_FAULTS = {
    "points of a level counted twice": (
        "forward", {"num_points": (2, 5)}, "first.of[l] + count[l]", "first.of[l] + count[0]",
    ),
    "first point of the next level": ("backward", {"num_points": (2, 5)}, "k >= msda_first", "k > msda_first"),
    "nearest from pixel centres": (
        "forward", {"interpolation": "nearest"}, "scale) + (msda_acc)0.5)", "scale))",
    ),
    "nearest with a gradient of locations": (
        "backward", {"interpolation": "nearest"}, "!MSDA_NEAREST && p > 0", "p > 0",
    ),
    "border that is not clamped": ("forward", {"padding_mode": "border"}, "px = msda_clamp(px, level.w);", ""),
    "clamped to the size": (
        "forward", {"padding_mode": "border"}, "last = (msda_acc)(size - 1)", "last = (msda_acc)size",
    ),
    "fraction beyond the border": (
        "forward", {"padding_mode": "border"}, "if (msda_slope(y, level.h) == 0) cell.ay = 0;", "",
    ),
    "gradient beyond the border": (
        "backward", {"padding_mode": "border"}, "p > 0 && p < (msda_acc)(size - 1) ?", "true ?",
    ),
    "edges for centres": ("forward", {"align_corners": True}, "MSDA_ALIGN_CORNERS ? size - 1 : size", "size"),
    "half a pixel": ("backward", {"align_corners": True}, "MSDA_ALIGN_CORNERS ? (msda_acc)0 :", ""),
}  # fmt: skip
# Where only the first queries of each image count: (kernel, text of the source, what it becomes).
PADDED_FAULTS = {
    "padding that counts": ("forward", "q >= msda_length(lengths, work.image, Q) ?", "q > Q ?"),
    "padding of another image": ("forward", "msda_length(lengths, work.image, Q) ?", "msda_length(lengths, 0, Q) ?"),
    "padding without an output": ("forward", "if (msda_number(q) >= 0 && turn", "if (q >= 0 && turn"),
    "padding without gradients": ("backward", "msda_number(q) < 0 || k >= MSDA_K) continue;\n        msda_g",
        "q < 0 || k >= MSDA_K) continue;\n        msda_g",
    ),
    "padding in the lists": (
        "sort", "msda_length(lengths, work.image, (msda_index)Q) * MSDA_K;", "Q * MSDA_K;",
    ),
}  # fmt: skip
# With a front end: (kernel, packed, text of the source, what it becomes).
FRONT_FAULTS = {
    "softmax over some of the lanes": (
        "forward",
        False,
        "mask < msda_lanes_of_query; mask *= 2) x +=",
        "mask < msda_lanes_of_query / 2; mask *= 2) x +=",
    ),
    "softmax without its sum": ("forward", False, "raw.weight[fill + t] *= scale;", ";"),
    "weights of lanes without a sample": ("forward", False, "k < MSDA_K ? logit : lowest", "logit"),
    "reference point of the first level": ("forward", False, "(MSDA_REFERENCES > 1 ? MSDA_LEVEL_OF(k) : 0)", "0"),
    "height for the width": ("forward", False, "msda_load(box.element[0])", "msda_load(box.element[1])"),
    "offsets where logits are": ("forward", True, "MSDA_PACKED ? 3 : 2", "MSDA_PACKED ? 2 : 2"),
    "logit without the sum of the query": ("backward", False, "(grad[t].attention - sum)", "grad[t].attention"),
    "offset that moves whole pixels": ("backward", False, "grad[t].x * reach.x", "grad[t].x"),
    "reference of one point of a level": (
        "backward", False, "k < msda_first_of(l + 1); ++k", "k < msda_first_of(l) + 1; ++k",
    ),
    "box without its offset": ("backward", False, "grad[t].x * msda_load(raw.xy[first + t].element[0])", "grad[t].x"),
    "head that is left out": ("references", False, "m < MSDA_M", "m < MSDA_M - 1"),
    "softmax of the sort left out": ("sort", False, "msda_softmax(raw[take]);", ""),
    "weights of the wrong sample": ("expand", False, "weights[place] =", "weights[place ^ 1] ="),
}  # fmt: skip
# In the kernels that sum without atomics, and where samples are merged.
SUM_FAULTS = {
    "part of the last row of a bin in the bin's own list": (
        "sort", "+ 1 + (part.pair && part.row == MSDA_ROWS - 1)", "+ 1",
    ),
    "pair before the slab": ("sort", "const bool before = row == -1 && part.pair;", "const bool before = false;"),
    "lower part for the upper": ("sort", ">> 2 * lower & 3", ">> 2 * (1 - lower) & 3"),
    "rank by the lane": ("sort", "__popc(peers & ((1u << lane) - 1));", "lane;"),
    "missing barrier before the counts of all warps": (
        "sort", "    __syncthreads();\n\n    // Counts to places", "\n    // Counts to places",
    ),
    "missing barrier before the parts take the place of the counters": (
        "sort",
        "reinterpret_cast<const unsigned*>(begin)[i];\n    __syncthreads();",
        "reinterpret_cast<const unsigned*>(begin)[i];",
    ),
    "missing barrier before the sorted parts are written": (
        "sort", "    __syncthreads();\n    entries +=", "    entries +=",
    ),
    "part of the bin before taken for one of this bin": ("sum", "i < shared.own[of] ? 0 :", "false ? 0 :"),
    "lost second row": ("sum", "msda_collect(shared, row, 1, share, lane, sum[owned]);", ""),
    "missing barrier before the sums are collected": (
        "sum",
        "share, idle);\n                __syncthreads();",
        "share, idle);",
    ),
    "group that forgets its last row": (
        "sum", "if (key >= 0) msda_leave(shared, key + group, lane, here, after);\n}", "}",
    ),
    "row of another bin": ("sum", "row >= bin.rows || idle", "idle"),
    "run that is not found": ("add", "if (__shfl_sync(0xffffffffu, end, of + step - 1) <= i) of += step;", ";"),
    "row of another group": ("add", "at + 1 >= low && at + 1 < high", "at + 1 >= low"),
    "part added by every group": ("add", "if (group == 0) {", "{"),
    "piece that begins at the bin's first part": ("sum", "if (!whole && shared.from > before)", "if (false)"),
    "sums of the first piece alone": ("sum", "piece < pieces; ++piece", "piece < 1; ++piece"),
    "missing barrier before the last piece is known": (
        "sum", "one.pieces - 1;\n        __syncthreads();", "one.pieces - 1;",
    ),
    "last piece that is not full": ("count", "(unsigned)((total + piece - 1) / piece)", "(unsigned)(total / piece)"),
}  # fmt: skip
MERGE_FAULTS = {
    "cells told apart by nothing but their place": ("|| level[u] != run.level", ""),
    "column that stays after the row ends": ("(sample[u].place & 5) != 0 &&", ""),
    "last run of a group forgotten": ("if (run.place & 15) msda_end_run(shared, run, false, grad_value);", ""),
    "missing barrier before the order is read": (
        "(unsigned short)place;\n        }\n    __syncthreads();",
        "(unsigned short)place;\n        }",
    ),
}
# Where merged blocks take slices of the image: (case of CROSS_LEVEL, text of the source, what it becomes).
SLICE_FAULTS = {
    "levels of a slice side by side": ("rounded_up", "slice.before[i] = places;", "slice.before[i] = 0;"),
    "tallest level that makes up for nothing": ("rounded_up", "if (is_tallest) before = at", "if (0) before = at"),
    "last slice without what is left": ("rounded_up", "if (at >= (unsigned)Q) before = h * w;", ""),
    "bands of a level beyond its rows": ("a_row_less", "if (rows * slice.bands > h) --rows;", ""),
    "bands of a level that has none": ("less_than_a_row", "rows ? slice.bands : 0u", "slice.bands"),
    "rows of a band in the last": ("rounded_up", "band < bands ? rows : level.h - bands * rows", "rows"),
    "slices of too few pixels of the tallest level": ("thin_tallest", "!is_tallest || enough", "true"),
    "slices of levels that are not packed": ("overlapping", "if (!packed) return slice;", ""),
}
# Where products are made of matrices: (D, merged or not, text of the source, what it becomes).
MATRIX_FAULTS = {
    "lower row for the upper": (32, False, "1, from[c >> 1] + right);", "1, from[c & 1] + right);"),
    "product with another query": (32, False, "own = t == g >> 1", "own = t == (g >> 1 ^ 1)"),
    "corners of the other group": (64, False, "target[2 * odd + c]", "target[2 * !odd + c]"),
    "half of a row": (64, False, "(odd ? dot[0] : dot[2], 4)", "(odd ? dot[0] : dot[2], 0)"),
    "two groups of four": (128, False, "(high ? dot[0] : dot[1], 9)", "(high ? dot[0] : dot[1], 8)"),
    "four groups of eight": (256, False, "msda_shuffle(dot[0], 18)", "msda_shuffle(dot[0], 16)"),
    "queries of the first round twice": (32, True, "round + joined / MSDA_QUERIES", "round"),
    "samples of the first round twice": (
        32, True, "shared.samples[round_of_mine * MSDA_WARPS", "shared.samples[round * MSDA_WARPS",
    ),
}  # fmt: skip
ODD = Case("odd", levels=((4, 5),), N=1, M=2, D=1058, queries=24)


def planted(kind, old, new):
    """The source of a kernel with a fault."""
    source = kernels.source(kind)
    assert source.count(old) == 1, "the fault no longer fits the source"
    return source.replace(old, new)


def run(kind, text, case, **options):
    inputs = case.inputs(seed=21)
    want_output, want_grads = cases.expected(inputs, **case.variant)
    # In a process of its own: a fault may crash it.
    options |= {"text": text, "sanitize": True, "variant": case.variant}
    if kind == "forward":
        assert_close(emulator.forward(inputs, **options), want_output, "float32")
        return
    for grad, want in zip(emulator.backward(inputs, **options), want_grads, strict=True):
        assert_close(grad, want, "float32")


def run_bad_level(text):
    inputs = CHECKED[1].inputs(seed=22)
    shapes = [[4, 5], [-3, 3], [2, 2]]
    options = {"text": text, "metadata_on_device": True, "shapes": shapes, "sanitize": True}
    assert np.isnan(emulator.forward(inputs, **options)).all()


def run_swapped_levels(text):
    for case, starts in ((CHECKED[0], (20, 0, 119)), (ROUNDS[-1], (20, 0, 119, 123, 124, 125))):
        options = {"text": text, "multiprocessors": 1, "sanitize": True}
        swapped = case.inputs(seed=23)._replace(starts=np.array(starts))
        assert_close(emulator.forward(swapped, **options), cases.expected(swapped)[0], "float32")


def run_infinite(text):
    inputs = CHECKED[0].inputs(seed=24)
    inputs.value[0, 3] = np.inf
    want = cases.expected(inputs)[0]
    got = emulator.forward(inputs, text=text, multiprocessors=1, sanitize=True)
    np.testing.assert_array_equal(np.isfinite(got), np.isfinite(want))


def caught(kind, text):
    """What the first check to fail says, or None."""
    try:
        for case in CHECKED:
            for order in (0, 1):
                run(kind, text, case, order=order, multiprocessors=1)  # the shapes with many warps a block
        run(kind, text, ODD)
        if kind == "forward":
            for case in ROUNDS:
                run(kind, text, case, multiprocessors=1)
            run_bad_level(text)
            run_swapped_levels(text)
            run_infinite(text)
    except AssertionError as error:
        return str(error)
    return None


@pytest.mark.parametrize("kind", ["forward", "backward"])
def test_sound_source_passes(kind):
    assert caught(kind, kernels.source(kind)) is None


@pytest.mark.parametrize("name", FAULTS)
def test_planted_fault_is_caught(name):
    kind, *fault = FAULTS[name]
    assert caught(kind, planted(kind, *fault)) is not None


def in_variant(variant):
    return Case("variant", levels=((5, 6), (2, 3)), N=1, P=3, queries=9, variant=variant)


@pytest.mark.parametrize("name", VARIANT_FAULTS)
def test_fault_planted_into_a_variant_is_caught(name):
    kind, variant, *fault = VARIANT_FAULTS[name]
    faulty = planted(kind, *fault)
    run(kind, kernels.source(kind), in_variant(variant))
    with pytest.raises(AssertionError):
        run(kind, faulty, in_variant(variant))


def run_padded(kind, text):
    case = Case("padded", levels=((9, 11), (4, 5)), N=2, M=2, D=8, queries=None)
    inputs, lengths = case.inputs(seed=24), (50, 119)
    want_output, want_grads = cases.expected_ragged(inputs, lengths)
    for array in (inputs.locations, inputs.weights, inputs.grad_output):
        array[0, 50:] = 0.4  # in the image, so that it would count
    options = {"lengths": lengths, "sanitize": True}
    if kind == "forward":
        assert_close(emulator.forward(inputs, text=text, **options), want_output, "float32")
    elif kind == "backward":
        for grad, want in zip(emulator.backward(inputs, text=text, **options), want_grads, strict=True):
            assert_close(grad, want, "float32")
    else:
        assert_close(emulator.summation(inputs, texts={kind: text}, **options), want_grads[0], "float32")


@pytest.mark.parametrize("name", PADDED_FAULTS)
def test_fault_planted_where_queries_are_padded_is_caught(name):
    kind, *fault = PADDED_FAULTS[name]
    faulty = planted(kind, *fault)
    run_padded(kind, kernels.source(kind))
    with pytest.raises(AssertionError):
        run_padded(kind, faulty)


SUMMED = (
    Case("dense", levels=((9, 11), (4, 5)), N=1, M=2, D=8, queries=None),
    Case("sparse", levels=((20, 26), (13, 13)), N=1, M=2, D=32, queries=320),
    Case("crowded", levels=((20, 26), (13, 13)), N=1, M=1, D=32, queries=60),
    Case("slabs", levels=((9, 11), (4, 5)), N=1, M=1, D=8, queries=20),
    Case("pieces", levels=((9, 11), (4, 5)), N=1, M=2, D=8, queries=800),
)


def run_sum(kind, text):
    for case in SUMMED:
        inputs = case.inputs(seed=31)
        if case.name == "crowded":
            inputs.locations[:] = 0.37
        elif case.name == "pieces":
            inputs.locations[:, :, :, 0] = 0.63
        want = cases.expected(inputs)[1][0]
        with pytest.MonkeyPatch.context() as patch:
            if case.name == "slabs":
                patch.setattr(plan_backward, "MAX_BINS", 1)
            elif case.name == "pieces":
                patch.setattr(plan_backward, "PIECE", 512)
            for order in (0, 1):
                got = emulator.summation(inputs, texts={kind: text} if text else None, sanitize=True, order=order)
                assert_close(got, want, "float32")


def test_sound_sums_pass():
    run_sum("sort", None)


@pytest.mark.parametrize("name", SUM_FAULTS)
def test_fault_planted_into_a_sum_is_caught(name):
    kind, *fault = SUM_FAULTS[name]
    faulty = planted(kind, *fault)
    with pytest.raises(AssertionError):
        run_sum(kind, faulty)


def run_merged(text):
    many = Case("merged", levels=((5, 6), (5, 6), (2, 2)), N=1, M=2, D=32, P=4, queries=64).inputs(seed=32)
    # The same pixels as two levels of different widths, and on both only the first cell.
    overlapping = Case("overlap", levels=((5, 6), (6, 5)), starts=(0, 0), S=30, N=1, M=1, D=32, queries=64).inputs()
    overlapping.locations[..., 0, :, :] = 0.9 / 6, 0.8 / 5
    overlapping.locations[..., 1, :, :] = 0.9 / 5, 0.8 / 6
    overlapping.locations[0, :10, :, 0] = 9
    # Two cells, one at the end of a row, the other left of the next row: their places follow each other.
    two = Case("two", levels=((5, 6),), N=1, M=1, D=32, P=4, queries=64).inputs()
    two.locations[0, :25] = 4.8 / 6, 1.9 / 5
    two.locations[0, 25:] = 0.1 / 6, 2.9 / 5
    for inputs in (many, overlapping, two):
        want = cases.expected(inputs)[1][0]
        for order in (0, 1):
            assert_close(emulator.backward(inputs, text=text, sanitize=True, order=order)[0], want, "float32")


@pytest.mark.parametrize("name", MERGE_FAULTS)
def test_fault_planted_where_samples_are_merged_is_caught(name):
    faulty = planted("backward", *MERGE_FAULTS[name])
    run_merged(kernels.source("backward"))
    with pytest.raises(AssertionError):
        run_merged(faulty)


@pytest.mark.parametrize("name", SLICE_FAULTS)
def test_fault_planted_into_slices_is_caught(name):
    which, *fault = SLICE_FAULTS[name]
    (case,) = [case for case in CROSS_LEVEL if case.name == which]
    with pytest.raises((AssertionError, emulator.EmulatorError)):
        run("backward", planted("backward", *fault), case)


@pytest.mark.parametrize("kind", ["forward", "backward"])
def test_block_beyond_the_last_head_that_works_is_caught(kind, monkeypatch):
    monkeypatch.setattr(plan, "MAX_GRID_Y", 3)
    run(kind, kernels.source(kind), CHECKED[1])
    with pytest.raises((AssertionError, emulator.EmulatorError)):
        run(kind, planted(kind, "msda_head_of_block() >= heads) return;", "false) return;"), CHECKED[1])


def far_level(key_index_64, text=None):
    """One pixel at row 2**27 + 5 and samples beside it: offsets need 64 bits, and nothing is read."""
    start = 2**27 + 5
    problem = Problem(1, start + 1, 1, 1, 1, 1, 3, "float32", "float32", ("cuda", 0), ((1, 1, start),))
    described = plan.forward(problem, 16)
    assert described.key.index_64 == key_index_64
    locations, weights = np.full((1, 3, 1, 1, 1, 2), 9, np.float32), np.ones((1, 3, 1, 1, 1), np.float32)
    output = np.full((1, 3, 1), np.nan, np.float32)
    arrays = [np.zeros(1, np.float32), np.array(problem.levels, np.int64), locations, weights, None, None, output]
    emulator.launch(described, arrays, problem.S, problem.Q, plan.size_words(problem)[2:], text=text, sanitize=True)
    assert not output.any()


def test_product_that_overflows_32_bits_is_caught():
    far_level(True)
    place = "sample.place = pixel * 16"
    source = kernels.source("forward")
    assert source.count(place) == 1
    with pytest.raises(emulator.EmulatorError, match="overflow"):
        far_level(True, source.replace(place, "sample.place = (int)pixel * 16"))


def test_planner_that_forgets_64_bits_is_caught(monkeypatch):
    emulator.force_index_64(monkeypatch, False)
    with pytest.raises(emulator.EmulatorError, match="overflow"):
        far_level(False)


def test_shared_memory_that_is_too_small_is_caught(monkeypatch):
    monkeypatch.setattr(plan, "shared_bytes", lambda key, real=plan.shared_bytes: real(key) - 16)
    with pytest.raises(emulator.EmulatorError, match="heap-buffer-overflow"):
        run("forward", None, CHECKED[1])


def test_half_accumulation_of_float16_is_caught():
    source = kernels.source("forward").replace(SUM, HALF_SUM)
    case = Case("float16", levels=((9, 11), (4, 5)), N=1, M=2, D=32, P=32, queries=20)
    inputs = case.inputs("float16", seed=23)
    want, _ = cases.expected(inputs)
    assert_close(emulator.forward(inputs), want, "float16")
    with pytest.raises(AssertionError, match="exceeds"):
        assert_close(emulator.forward(inputs, text=source), want, "float16")


@pytest.mark.parametrize("name", FRONT_FAULTS)
def test_the_check_catches_a_fault_of_the_front_end(name):
    kernel, packed, old, new = FRONT_FAULTS[name]
    source = kernels.source(kernel)
    assert source.count(old) == 1, "the fault no longer fits the source"
    text = source.replace(old, new)
    P = 4 if kernel == "sort" else 3
    case = Case("front", levels=((6, 7), (3, 4)), N=1, M=2, D=8, P=P)
    inputs = cases.to_fused(case.inputs(), coordinates=4, packed=packed)
    output, grads = cases.expected_fused(inputs)
    if kernel == "forward":
        want, run = [output], lambda: [emulator.forward(inputs, text=text)]
    elif kernel in ("sort", "expand"):
        want, run = grads[:1], lambda: [emulator.summation(inputs, texts={kernel: text})]
    else:
        option = {"text" if kernel == "backward" else "text_of_references": text}
        want, run = grads, lambda: emulator.backward(inputs, wanted=Wanted(references=True), **option)
    with pytest.raises(AssertionError):
        _assert_all_close(run(), want)


def _assert_all_close(got, want):
    for one, other in zip(got, want, strict=True):
        if other is not None:
            assert_close(one, other, "float32")


def run_matrices(D, merged, text, location_dtype="float16"):
    queries = 70 if merged else 9
    case = Case("matrices", levels=((5, 6), (2, 2)), N=1, M=2, D=D, P=4, queries=queries)
    inputs = case.inputs("float16", location_dtype, seed=33)
    wanted = Wanted(value=merged)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plan, "MERGED", 1)
        got = emulator.backward(inputs, text=text, wanted=wanted, sanitize=True)
    for grad, want in zip(got[1:], cases.expected(inputs)[1][1:], strict=True):
        assert_close(grad, want, location_dtype)


@pytest.mark.parametrize("location_dtype", ["float16", "float32"])
@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("D", [32, 64, 128, 256])
def test_products_of_matrices_at_every_number_of_lanes(D, merged, location_dtype):
    run_matrices(D, merged, kernels.source("backward"), location_dtype)


@pytest.mark.parametrize("name", MATRIX_FAULTS)
def test_fault_planted_into_products_of_matrices_is_caught(name):
    D, merged, *fault = MATRIX_FAULTS[name]
    with pytest.raises(AssertionError):
        run_matrices(D, merged, planted("backward", *fault))
