// Tiles of queries across levels: with block-level aggregation, a block takes the pixels of all levels that lie in the same
// part of the image, because it adds each value vector that its samples share to grad_value once
// (docs/performance/decisions.md#backward-cross-level-tiles).
//
// Each level is cut into the same number of bands: config::tile_rows rows of the tallest level, fewer rows of the others,
// and the rest of its rows in a last band. Of the band that it is in, a tile has the same part of each level's pixels, column
// by column.
#pragma once
#include "common/query_order.cuh"
#include "common/warp.cuh"

namespace msda {

struct cross_level_tile {
    bool cut;                           // else queries keep their order
    index_t first;                      // position of the first query
    unsigned bands;                     // of each level, without the last
    unsigned before[config::L];         // queries of the tile before those of each level
    int shift[config::L];               // 16 * (pixel in the bands of its level - query of the tile) + rows of a band
};

// The tile of a block that begins at query number `first` and has `length` queries. By all lanes of a warp. `queries_are_pixels`: levels
// follow each other and are all Q queries.
template <int tile_rows = config::tile_rows>
__device__ __forceinline__ cross_level_tile cross_level_tile_at(
        shared_levels levels, index_t first, unsigned length, index_t Q, bool queries_are_pixels) {
    cross_level_tile tile = {};
    tile.first = first;
    if (!queries_are_pixels) return tile;
    // Lanes l and 8 + l have level l: one for the beginning of the tile, one for its end.
    const int lane = threadIdx.x % 32, l = lane % 8;
    level_info of_lane = {};
    if (lane < 16 && l < config::L) of_lane = levels.at(l);
    const unsigned h = of_lane.h, w = of_lane.w, tallest = warp_max(h << 3 | (7 - l)), most = tallest >> 3;
    // The last band has at least one row of the tallest level. The 0.25 gives a level half as high, rounded down, a band of
    // half as many rows. A level with less than one row per band has no rows in a band.
    tile.bands = (most - 1) / tile_rows;
    unsigned rows = (unsigned)fma((float)h, tile_rows * reciprocal((float)most), 0.25f);
    if (rows * tile.bands > h) --rows;
    const unsigned last = h - rows * tile.bands, band = warp_sum(lane < 8 ? rows * w : 0u);
    const unsigned rest = (unsigned)Q - band * tile.bands;

    // Pixels of each level before place `at` of the order. They are rounded up, and the tallest level makes up for that: it
    // must have as many pixels in every tile as there are levels.
    const bool is_tallest = lane < 16 && l == 7 - (int)(tallest & 7);
    const unsigned at = (unsigned)first + (lane < 8 ? 0u : length);
    const unsigned bands = min(fast_divide(at, band), tile.bands);
    const bool whole = bands < tile.bands;
    const unsigned pixels = (whole ? rows : last) * w;
    const float part = (float)(at - bands * band) * reciprocal((float)(whole ? band : rest));
    unsigned before = bands * rows * w + min((unsigned)ceilf(part * (float)pixels), pixels);
    const unsigned others = is_tallest ? 0u : before;
    const unsigned at_begin = warp_sum(lane < 8 ? others : 0u), at_end = warp_sum(lane < 8 ? 0u : others);
    if (is_tallest) before = at - (lane < 8 ? at_begin : at_end);
    if (at >= (unsigned)Q) before = h * w;
    const bool enough = (float)length * (float)(rows * w) >= (float)band * config::L &&
                        (float)length * (float)(last * w) >= (float)rest * config::L;
    tile.cut = __all_sync(0xffffffffu, !is_tallest || enough);

    unsigned queries = 0;
#pragma unroll
    for (int i = 0; i < config::L; ++i) {
        const int begin = broadcast((int)(before << 4 | rows), i);
        tile.before[i] = queries;
        tile.shift[i] = begin - (int)(queries << 4);
        queries += (unsigned)broadcast((int)before, 8 + i) - ((unsigned)begin >> 4);
    }
    return tile;
}

// Query at `position` of the order.
__device__ __forceinline__ index_t query_in_order(
        index_t position, shared_levels levels, const cross_level_tile& tile) {
    if (!tile.cut) return position;
    const unsigned in_tile = (unsigned)(position - tile.first);
    int l = 0, shift = tile.shift[0];
#pragma unroll
    for (int i = 1; i < config::L; ++i) {
        const bool here = in_tile >= tile.before[i];
        l = here ? i : l;
        shift = here ? tile.shift[i] : shift;
    }
    const level_info level = levels.at(l);
    const unsigned rows = shift & 15, bands = rows ? tile.bands : 0u, w = level.w, inside = in_tile + (shift >> 4);
    const unsigned band = min(fast_divide(inside, max(rows * w, 1u)), bands), in_band = inside - band * rows * w;
    const unsigned lines = band < bands ? rows : level.h - bands * rows, column = fast_divide(in_band, lines);
    return level.start + (index_t)((band * rows + in_band - column * lines) * w + column);
}

}  // namespace msda
