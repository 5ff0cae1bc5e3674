// The order in which queries are worked on. Where queries are the pixels of all levels (config::tile_rows), neighbouring
// warps hold a patch of pixels instead of a line, so that their samples share value vectors in L1
// (docs/performance/decisions.md#forward-tile-order).
#pragma once
#include "common/arithmetic.cuh"
#include "common/levels.cuh"

namespace msda {

// x / y, for 0 <= x < 2**21: (x + 0.5) / y is further from a whole number than its error.
__device__ __forceinline__ unsigned fast_divide(unsigned x, unsigned y) {
    return (unsigned)(((float)x + 0.5f) * reciprocal((float)y));
}

// Query at `position` of the order: one level after the other, each in bands of config::tile_rows rows, column by column.
// `queries_are_pixels` says that the levels follow each other and that queries are their pixels; else the order is that of the queries.
template <typename Levels>
__device__ __forceinline__ index_t query_in_order(
        index_t position, [[maybe_unused]] const Levels& levels, [[maybe_unused]] bool queries_are_pixels) {
    if constexpr (config::tile_rows != 0) {
        if (!queries_are_pixels) return position;
        const level_info level = levels.of_pixel(position);
        const unsigned inside = (unsigned)(position - level.start), w = level.w;
        const unsigned first_row = fast_divide(inside, config::tile_rows * w) * config::tile_rows;
        const unsigned in_band = inside - first_row * w;
        const unsigned rows = min((unsigned)config::tile_rows, level.h - first_row);
        const unsigned column = fast_divide(in_band, rows);
        return level.start + (index_t)((first_row + (in_band - column * rows)) * w + column);
    } else {
        return position;
    }
}

}  // namespace msda
