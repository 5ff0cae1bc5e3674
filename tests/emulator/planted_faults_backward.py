"""Faults of the backward kernel, which each turn a check of test_planted_faults.py red."""

from tests.helpers.faults import Fault, without

PREPARE = "prepare_samples(samples, shared, raw, tile, k0);\n                __syncwarp();"


def backward(text, replacement):
    return Fault("backward", text, replacement)


BACKWARD = {
    "missing barrier after the samples are prepared": without("backward", PREPARE),
    "missing barrier before the gradients of the samples": without(
        "backward", "                __syncwarp();\n                if constexpr (grad_samples) {"
    ),
    "missing barrier after a block has read the levels": backward(
        "queries_are_pixels = __syncthreads_or(queries_are_pixels);", "queries_are_pixels = true;"
    ),
    "each warp decides alone whether pixels are in tiles": backward(
        "__syncthreads_or(queries_are_pixels);", "queries_are_pixels; __syncthreads();"
    ),
    "row beyond the level": backward("cell.y0 + 1 < level.h ? 12", "cell.y0 + 1 <= level.h ? 12"),
    "row of the other neighbour": backward("at = from[c >> 1] + right", "at = from[c & 1] + right"),
    "value of head 0": backward("work.image * image_stride + work.m * head_stride", "work.image * image_stride"),
    "gradient of y for x": backward("narrow(x, xy.element[0]);", "narrow(y, xy.element[0]);"),
    "gradient of x per location, not per pixel": backward("attention * slope_x * across", "attention * across"),
    "dot product without half of the lanes": backward(
        "for (int mask = 4; mask < dot_lanes; mask *= 2)", "for (int mask = 4; mask < dot_lanes / 2; mask *= 2)"
    ),
}

# Where a block aggregates the samples of a cell.
AGGREGATION = {
    "cells of two levels taken for one": backward("|| level[u] != cell.level", ""),
    "column kept for the first cell of the next row": backward("(sample[u].pixel_and_mask & 5) != 0 &&", ""),
    "last cell of a group of lanes left out": backward(
        "if (cell.pixel_and_mask & 15) flush_cell(shared, cell, false, grad_value);", ""
    ),
    "missing barrier before the sorted order is read": without(
        "backward", "(unsigned short)place;\n        }\n    __syncthreads();", "\n    __syncthreads();"
    ),
}

# Where the tiles of a block that aggregates cross the levels: (case of CROSS_LEVEL, fault).
CROSS_LEVEL_TILES = {
    "queries of all levels at the beginning of the tile": (
        "rounded_up", backward("tile.before[i] = queries;", "tile.before[i] = 0;"),
    ),
    "tallest level that does not make up for rounding": (
        "rounded_up", backward("if (is_tallest) before = at", "if (0) before = at"),
    ),
    "last tile without the rest of each level": (
        "rounded_up", backward("if (at >= (unsigned)Q) before = h * w;", ""),
    ),
    "bands beyond the rows of a level": ("a_row_less", backward("if (rows * tile.bands > h) --rows;", "")),
    "bands of a level without a row per band": ("less_than_a_row", backward("rows ? tile.bands : 0u", "tile.bands")),
    "last band with the rows of the others": (
        "rounded_up", backward("band < bands ? rows : level.h - bands * rows", "rows"),
    ),
    "tiles with too few pixels of the tallest level": ("thin_tallest", backward("!is_tallest || enough", "true")),
    "tiles though levels do not follow each other": (
        "overlapping", backward("if (!queries_are_pixels) return tile;", ""),
    ),
}  # fmt: skip

# Where tensor cores make the dot products: (D, aggregated, fault).
TENSOR_CORES = {
    "row of the other neighbour": (32, False, backward("1, from[c >> 1] + right);", "1, from[c & 1] + right);")),
    "product with grad_output of another query": (
        32, False, backward("on_diagonal = t == g >> 1", "on_diagonal = t == (g >> 1 ^ 1)"),
    ),
    "neighbours of the other group of lanes": (64, False, backward("target[2 * odd + c]", "target[2 * !odd + c]")),
    "sum over one of two groups": (
        64, False, backward("(odd ? dot[0] : dot[2], 4)", "(odd ? dot[0] : dot[2], 0)"),
    ),
    "sum over the wrong two of four groups": (
        128, False, backward("(high ? dot[0] : dot[1], 9)", "(high ? dot[0] : dot[1], 8)"),
    ),
    "sum over the wrong four of eight groups": (
        256, False, backward("shuffle_xor(dot[0], 18)", "shuffle_xor(dot[0], 16)"),
    ),
    "queries of the first of two paired tiles": (32, True, backward("tile + group / queries_per_tile", "tile")),
    "samples of the first of two paired tiles": (
        32, True, backward("shared.samples[tile_of_lane * config::warps", "shared.samples[tile * config::warps"),
    ),
}  # fmt: skip
