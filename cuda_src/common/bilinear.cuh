// Bilinear interpolation: the cell of a sample, its four neighbours, which of them lie in the level, and their weights.
// With `nearest` a sample has one neighbour, the pixel that it falls on.
#pragma once
#include "common/arithmetic.cuh"
#include "common/levels.cuh"
#include "common/types.cuh"

namespace msda {

enum : int { neighbours = config::nearest ? 1 : 4 };
enum : bool { clamped = config::nearest || config::border };     // pixel coordinates are clamped to the level

__device__ __forceinline__ acc_t quiet_nan() { return (acc_t)__int_as_float(0x7fc00000); }

// ---- one axis of a level of `size` pixels --------------------------------------------------------------------

// Pixels from one end of a level to the other. On a level of one pixel, where every location is clamped to that pixel, any
// number but 0 will do: 0 times infinity is no coordinate to clamp.
__device__ __forceinline__ acc_t pixels_across(int size) {
    if constexpr (config::align_corners && config::border) return (acc_t)(size > 1 ? size - 1 : 1);
    return (acc_t)(config::align_corners ? size - 1 : size);
}
// Pixels per unit of the location.
__device__ __forceinline__ acc_t pixels_per_unit(int size) {
    return config::pixel_locations ? (acc_t)1 : pixels_across(size);
}
// What is subtracted, so that a pixel's index is the coordinate of its centre.
__device__ __forceinline__ acc_t pixel_shift() { return config::align_corners ? (acc_t)0 : (acc_t)0.5; }

// Pixel coordinate of a location, not clamped.
__device__ __forceinline__ acc_t pixel_coordinate(acc_t x, acc_t scale) {
    if constexpr (config::nearest) {
        // Rounded twice, as where a framework multiplies and then adds: the same pixel at every jump.
        return floor(multiply_unfused(x, scale) + (acc_t)0.5);
    } else {
        return fma(x, scale, -pixel_shift());
    }
}

// The last pixel, rounded down: rounded to nearest, its number may be that of a pixel after the level.
__device__ __forceinline__ acc_t last_pixel(int size) {
    acc_t last;
    round_down(size - 1, last);
    return last;
}

__device__ __forceinline__ acc_t clamp_to_level(acc_t p, int size) {
    const acc_t last = last_pixel(size);
    return p > 0 ? p < last ? p : last : (acc_t)0;
}

// Derivative of the pixel coordinate by the location.
__device__ __forceinline__ acc_t pixel_slope([[maybe_unused]] acc_t x, int size) {
    if constexpr (clamped) {
        const acc_t p = pixel_coordinate(x, pixels_per_unit(size));
        return !config::nearest && p > 0 && p < last_pixel(size) ? pixels_per_unit(size) : (acc_t)0;
    } else {
        return pixels_per_unit(size);
    }
}

// ---- cells -------------------------------------------------------------------------------------------------

// The four pixels around a sample. Those at y0 + 1 or x0 + 1 may lie outside the level, and so may (y0, x0) itself.
struct bilinear_cell {
    int x0, y0;
    acc_t fraction_x, fraction_y;   // weight of the right column and of the bottom row
    bool in_bounds;     // -1 < px < W and -1 < py < H, or any number where it is clamped; false for NaN and for a level that
                        // does not fit
};

__device__ __forceinline__ bilinear_cell locate(acc_t x, acc_t y, const level_info& level) {
    const acc_t w = pixels_per_unit(level.w), h = pixels_per_unit(level.h);
    acc_t px = pixel_coordinate(x, w), py = pixel_coordinate(y, h);
    bilinear_cell cell;
    if constexpr (clamped) {
        cell.in_bounds = px == px && py == py && level.w > 0;
        px = clamp_to_level(px, level.w);
        py = clamp_to_level(py, level.h);
    } else {
        cell.in_bounds = px > -1 && py > -1 && px < (acc_t)level.w && py < (acc_t)level.h && level.w > 0;
    }
    const acc_t fx = cell.in_bounds ? floor(px) : 0, fy = cell.in_bounds ? floor(py) : 0;
    cell.x0 = (int)fx;
    cell.y0 = (int)fy;
    if constexpr (config::nearest) {
        cell.fraction_x = cell.fraction_y = 0;
    } else {
        // Not px - fx: px has lost log2(W) bits already. This is rounded once.
        cell.fraction_x = fma(x, w, -pixel_shift() - fx);
        cell.fraction_y = fma(y, h, -pixel_shift() - fy);
    }
    if constexpr (config::border) {
        if (pixel_slope(x, level.w) == 0) cell.fraction_x = 0;
        if (pixel_slope(y, level.h) == 0) cell.fraction_y = 0;
    }
    return cell;
}

// Bits of the neighbours that lie in the level: (y0, x0), (y0, x1), (y1, x0), (y1, x1).
__device__ __forceinline__ int neighbour_mask(const bilinear_cell& cell, const level_info& level) {
    const int columns = (cell.x0 >= 0 ? 5 : 0) | (cell.x0 + 1 < level.w ? 10 : 0);
    const int rows = (cell.y0 >= 0 ? 3 : 0) | (cell.y0 + 1 < level.h ? 12 : 0);
    return cell.in_bounds ? config::nearest ? 1 : columns & rows : 0;
}

// ---- prepared samples ---------------------------------------------------------------------------------------

// What the lanes of a query need of one sample. In 16 bytes for float32, because every lane reads all of it from shared
// memory (docs/performance/decisions.md#forward-sample-in-16-bytes).
struct alignas(16) prepared_sample {
    // 16 * (pixel index of the neighbour (y0, x0)) + neighbour_mask. That pixel may lie outside, even before the image.
    index_t pixel_and_mask;
    acc_t fraction_x, fraction_y;
    // NaN in a level that does not fit; 0 where the sample is out of bounds, so that a NaN weight does not reach the output.
    acc_t attention;
};

__device__ __forceinline__ prepared_sample prepare_sample(acc_t x, acc_t y, acc_t attention, const level_info& level) {
    const bilinear_cell cell = locate(x, y, level);
    const index_t pixel = level.start + (index_t)cell.y0 * level.w + cell.x0;
    prepared_sample sample;
    sample.pixel_and_mask = pixel * 16 + neighbour_mask(cell, level);
    sample.fraction_x = cell.in_bounds ? cell.fraction_x : 0;
    sample.fraction_y = cell.in_bounds ? cell.fraction_y : 0;
    sample.attention = cell.in_bounds ? attention : (acc_t)0;
    if (!cell.in_bounds && level.w == 0) sample.attention = quiet_nan();
    return sample;
}

// Weights of the neighbours, times attention.
__device__ __forceinline__ void neighbour_weights(const prepared_sample& sample, acc_t (&weight)[4]) {
    if constexpr (config::nearest) {
        weight[0] = sample.attention;
    } else {
        const acc_t bottom = sample.attention * sample.fraction_y, top = sample.attention - bottom;
        weight[1] = top * sample.fraction_x;
        weight[0] = top - weight[1];
        weight[3] = bottom * sample.fraction_x;
        weight[2] = bottom - weight[3];
    }
}

// Pixel index of the neighbour (y0, x0).
__device__ __forceinline__ index_t pixel_of(const prepared_sample& sample) { return sample.pixel_and_mask >> 4; }

}  // namespace msda
