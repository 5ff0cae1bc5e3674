// The cell of a sample: its four neighbours, which of them are inside the level, and their weights.

struct msda_cell {
    int x0, y0;
    msda_acc ax, ay;    // fractions: weight of the right column and of the bottom row
    bool counts;        // -1 < px < W and -1 < py < H, or any number where it is clamped; false for NaN and for a
                        // level that does not fit
};

// Pixels from one end of a level to the other, pixels a unit of the location, and what is taken off.
__device__ __forceinline__ msda_acc msda_scale(int size) {
    return (msda_acc)(MSDA_ALIGN_CORNERS ? size - 1 : size);
}
__device__ __forceinline__ msda_acc msda_unit(int size) { return MSDA_PIXELS ? (msda_acc)1 : msda_scale(size); }
__device__ __forceinline__ msda_acc msda_shift() { return MSDA_ALIGN_CORNERS ? (msda_acc)0 : (msda_acc)0.5; }

#define MSDA_CLAMPED (MSDA_NEAREST || MSDA_BORDER)

// Pixel coordinate of a location, not clamped.
__device__ __forceinline__ msda_acc msda_pixel(msda_acc x, msda_acc scale) {
#if MSDA_NEAREST
    // Two roundings, as where a framework multiplies and then adds: the same pixel at every jump.
    return floor(msda_multiply(x, scale) + (msda_acc)0.5);
#else
    return fma(x, scale, -msda_shift());
#endif
}

__device__ __forceinline__ msda_acc msda_clamp(msda_acc p, int size) {
    const msda_acc last = (msda_acc)(size - 1);
    return p > 0 ? p < last ? p : last : (msda_acc)0;
}

// How far the pixel moves when the location does.
__device__ __forceinline__ msda_acc msda_slope(msda_acc x, int size) {
#if MSDA_CLAMPED
    const msda_acc p = msda_pixel(x, msda_unit(size));
    return !MSDA_NEAREST && p > 0 && p < (msda_acc)(size - 1) ? msda_unit(size) : (msda_acc)0;
#else
    return msda_unit(size);
#endif
}

__device__ __forceinline__ msda_cell msda_locate(msda_acc x, msda_acc y, const msda_level& level) {
    const msda_acc w = msda_unit(level.w), h = msda_unit(level.h);
    msda_acc px = msda_pixel(x, w), py = msda_pixel(y, h);
    msda_cell cell;
#if MSDA_CLAMPED
    cell.counts = px == px && py == py && level.w > 0;
    px = msda_clamp(px, level.w);
    py = msda_clamp(py, level.h);
#else
    cell.counts = px > -1 && py > -1 && px < (msda_acc)level.w && py < (msda_acc)level.h && level.w > 0;
#endif
    const msda_acc fx = cell.counts ? floor(px) : 0, fy = cell.counts ? floor(py) : 0;
    cell.x0 = (int)fx;
    cell.y0 = (int)fy;
#if MSDA_NEAREST
    cell.ax = cell.ay = 0;
#else
    // Not px - fx: that has lost log2(W) bits already, this is rounded once.
    cell.ax = fma(x, w, -msda_shift() - fx);
    cell.ay = fma(y, h, -msda_shift() - fy);
#endif
#if MSDA_BORDER
    if (msda_slope(x, level.w) == 0) cell.ax = 0;
    if (msda_slope(y, level.h) == 0) cell.ay = 0;
#endif
    return cell;
}

// Neighbours of a cell that lie inside the level, as bits: (y0, x0), (y0, x1), (y1, x0), (y1, x1).
__device__ __forceinline__ int msda_inside(const msda_cell& cell, const msda_level& level) {
    const int columns = (cell.x0 >= 0 ? 5 : 0) | (cell.x0 + 1 < level.w ? 10 : 0);
    const int rows = (cell.y0 >= 0 ? 3 : 0) | (cell.y0 + 1 < level.h ? 12 : 0);
    return cell.counts ? MSDA_NEAREST ? 1 : columns & rows : 0;
}

__device__ __forceinline__ msda_acc msda_nan() { return (msda_acc)__int_as_float(0x7fc00000); }

// What the lanes of a query need of one sample, in 16 bytes for float32: every lane reads all of it, and shared memory
// hands out 4 bytes a lane and clock. `place` is 16 * (row of value of the neighbour (y0, x0)) + bits of msda_inside; that
// neighbour may lie outside, even before the image. `attention` is NaN in a level that does not fit, and 0 where the
// sample does not count, so that a NaN weight does not leak; a weight from a softmax is kept there, for its gradient.
struct alignas(16) msda_sample {
    msda_index place;
    msda_acc ax, ay, attention;
};

__device__ __forceinline__ msda_sample msda_prepare(
        msda_acc x, msda_acc y, msda_acc attention, const msda_level& level) {
    const msda_cell cell = msda_locate(x, y, level);
    const msda_index pixel = level.start + (msda_index)cell.y0 * level.w + cell.x0;
    msda_sample sample;
    sample.place = pixel * 16 + msda_inside(cell, level);
    sample.ax = cell.counts ? cell.ax : 0;
    sample.ay = cell.counts ? cell.ay : 0;
    sample.attention = cell.counts || (MSDA_FRONT && attention == attention) ? attention : (msda_acc)0;
    if (!cell.counts && level.w == 0) sample.attention = msda_nan();
    return sample;
}

// Bilinear weights times attention, of the four neighbours.
__device__ __forceinline__ void msda_weights(const msda_sample& sample, msda_acc (&weight)[4]) {
#if MSDA_NEAREST
    weight[0] = sample.attention;
#else
    const msda_acc bottom = sample.attention * sample.ay, top = sample.attention - bottom;
    weight[1] = top * sample.ax;
    weight[0] = top - weight[1];
    weight[3] = bottom * sample.ax;
    weight[2] = bottom - weight[3];
#endif
}

// Row of value of the neighbour (y0, x0).
__device__ __forceinline__ msda_index msda_row(const msda_sample& sample) { return sample.place >> 4; }
