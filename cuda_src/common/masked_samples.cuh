// Prepared samples whose neighbours outside the level have a weight of zero (config::masked_neighbours), so that nothing need
// be loaded in their place (docs/performance/decisions.md#forward-masked-neighbours).
#pragma once
#include "common/bilinear.cuh"

namespace msda {

// Where a sample lies on one axis of a level: between pixels `first` and first + 1, each of which may be outside.
struct axis_neighbours {
    int first;
    acc_t fraction;     // weight of the second
    bool has_first, has_second;
};

__device__ __forceinline__ axis_neighbours axis_neighbours_of(acc_t x, int size) {
    const acc_t unit = pixels_per_unit(size), p = pixel_coordinate(x, unit);
    axis_neighbours axis;
    axis.first = __float2int_rd(p > -1 ? p : (acc_t)-2);    // NaN, like -1, has no neighbour inside
    axis.fraction = fma(x, unit, -pixel_shift() - (acc_t)axis.first);   // rounded once, as in locate()
    axis.has_first = (unsigned)axis.first < (unsigned)size;
    axis.has_second = (unsigned)axis.first + 1 < (unsigned)size;
    return axis;
}

// All weight to the neighbour that is inside, if only one is.
__device__ __forceinline__ void mask_outside(const axis_neighbours& axis, acc_t& fraction, acc_t& attention) {
    fraction = axis.fraction;
    if (!axis.has_first || !axis.has_second) {
        attention *= axis.has_first ? 1 - fraction : fraction;
        fraction = axis.has_first ? (acc_t)0 : (acc_t)1;
    }
}

// As prepare_sample, in fewer instructions.
__device__ __forceinline__ prepared_sample prepare_masked_sample(
        acc_t x, acc_t y, acc_t attention, const level_info& level) {
    const axis_neighbours column = axis_neighbours_of(x, level.w), row = axis_neighbours_of(y, level.h);
    const int columns = (column.has_first ? 5 : 0) | (column.has_second ? 10 : 0);
    const int rows = (row.has_first ? 3 : 0) | (row.has_second ? 12 : 0), mask = columns & rows;
    prepared_sample sample;
    // Unsigned, because it may wrap around where the sample is out of bounds; then nobody uses the pixel.
    sample.pixel_and_mask =
        (index_t)(((address_t)level.start + (address_t)row.first * level.w + column.first) * 16 | mask);
    mask_outside(column, sample.fraction_x, attention);
    mask_outside(row, sample.fraction_y, attention);
    sample.attention = mask ? attention : level.w ? (acc_t)0 : quiet_nan();
    return sample;
}

}  // namespace msda
