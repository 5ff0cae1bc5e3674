// The order in which queries are taken: as they are, or where they are the pixels of all levels (MSDA_BAND) so that
// neighbouring warps or blocks have neighbours in the image, whose samples share rows of value.

// x / y, for 0 <= x < 2**21: (x + 0.5) / y is further from a whole number than its error.
__device__ __forceinline__ unsigned msda_divide(unsigned x, unsigned y) {
    return (unsigned)(((float)x + 0.5f) * msda_reciprocal((float)y));
}

// ---- bands: one level after the other, in patches of MSDA_BAND rows -------------------------------------------

// The level that pixel `position` is in, where levels follow each other.
__device__ __forceinline__ msda_level msda_level_of_pixel(msda_index position, const msda_level* levels) {
    int l = 0;
#pragma unroll
    for (int next = 1; next < MSDA_L; ++next) l += position >= levels[next].start;
    return msda_level_at(levels + l);
}

// Query at `position` of the order in which warps take them. Where queries are the pixels of all levels, neighbouring
// warps then hold a patch of MSDA_BAND rows instead of a line, and their samples share more of L1.
template <typename Levels>
__device__ __forceinline__ msda_index msda_query(msda_index position, [[maybe_unused]] const Levels& levels, bool packed) {
#if MSDA_BAND
    if (!packed) return position;
    const msda_level level = msda_level_of_pixel(position, levels);
    const unsigned inside = (unsigned)(position - level.start), w = level.w;
    const unsigned first_row = msda_divide(inside, MSDA_BAND * w) * MSDA_BAND;
    const unsigned in_band = inside - first_row * w;
    const unsigned rows = min((unsigned)MSDA_BAND, level.h - first_row);
    const unsigned column = msda_divide(in_band, rows);
    return level.start + (msda_index)((first_row + (in_band - column * rows)) * w + column);
#else
    return position;
#endif
}

// ---- slices: pixels of all levels that lie in the same part of the image -------------------------------------

// Where samples are merged a block takes a slice, because what it merges it adds to grad_value once: 64 queries of
// encoder_800x1333 add to 5.0 rows each, in bands of one level to 7.0. On an H100, float32 and float16: encoder_800x1333
// 348 us instead of 362 and 330 instead of 338, mask2former_1024 162 instead of 168 and 147 instead of 152. The forward takes as
// long with slices as without, whether each of its warps finds the slice or a block once, and 16 bits 1 to 3 % longer.
//
// Each level is cut into the same number of bands, MSDA_BAND rows of the tallest level and fewer of the others, with the
// rest of its rows in a last one. Of the band that it is in, a slice has the same part of each level's pixels, column by
// column.
#define MSDA_SLICED (MSDA_MERGE && MSDA_BAND && MSDA_L <= 8)

#if MSDA_SLICED
// Sum and largest number of the lanes of a warp, to all of them.
__device__ __forceinline__ unsigned msda_sum_of_lanes(unsigned x) {
#if MSDA_PTX && __CUDA_ARCH__ >= 800
    return __reduce_add_sync(0xffffffffu, x);
#else
    for (int mask = 1; mask < 32; mask *= 2) x += __shfl_xor_sync(0xffffffffu, x, mask);
    return x;
#endif
}
__device__ __forceinline__ unsigned msda_most_of_lanes(unsigned x) {
#if MSDA_PTX && __CUDA_ARCH__ >= 800
    return __reduce_max_sync(0xffffffffu, x);
#else
    for (int mask = 1; mask < 32; mask *= 2) x = max(x, __shfl_xor_sync(0xffffffffu, x, mask));
    return x;
#endif
}

struct msda_slice {
    bool cut;                   // else queries are taken as they are
    msda_index first;           // position of the first query
    unsigned bands;             // of each level, without the last
    unsigned before[MSDA_L];    // places in the slice before those of each level
    int shift[MSDA_L];          // from a place in the slice to that in the bands of its level, times 16, plus rows of a band
};

// The slice of a block that begins at query number `first`. By all lanes of a warp; `packed`: levels follow each other and
// are all Q queries.
__device__ __forceinline__ msda_slice msda_slice_at(const msda_level* levels, msda_index first, msda_index Q, bool packed) {
    msda_slice slice = {};
    slice.first = first;
    if (!packed) return slice;
    // Lanes l and 8 + l have level l, one for the beginning of the slice and one for its end.
    const int lane = threadIdx.x % 32, l = lane % 8;
    msda_level own = {};
    if (lane < 16 && l < MSDA_L) own = msda_level_at(levels + l);
    const unsigned h = own.h, w = own.w, tallest = msda_most_of_lanes(h << 3 | (7 - l)), most = tallest >> 3;
    // The last band has a row of the tallest level at least. A quarter, so that of a level half as high, rounded down, a band
    // has half as many rows; of one with less than a row a band it has none.
    slice.bands = (most - 1) / MSDA_BAND;
    unsigned rows = (unsigned)fma((float)h, MSDA_BAND * msda_reciprocal((float)most), 0.25f);
    if (rows * slice.bands > h) --rows;
    const unsigned last = h - rows * slice.bands, band = msda_sum_of_lanes(lane < 8 ? rows * w : 0u);
    const unsigned rest = (unsigned)Q - band * slice.bands;

    // Pixels of each level before place `at` of the order. They are rounded up, the tallest level makes up for that: it
    // must have as many in every slice as there are levels.
    const bool is_tallest = lane < 16 && l == 7 - (int)(tallest & 7);
    const unsigned length = MSDA_WARPS * MSDA_ROUNDS * MSDA_QUERIES, at = (unsigned)first + (lane < 8 ? 0u : length);
    const unsigned bands = min(msda_divide(at, band), slice.bands);
    const bool whole = bands < slice.bands;
    const unsigned pixels = (whole ? rows : last) * w;
    const float part = (float)(at - bands * band) * msda_reciprocal((float)(whole ? band : rest));
    unsigned before = bands * rows * w + min((unsigned)ceilf(part * (float)pixels), pixels);
    const unsigned others = is_tallest ? 0u : before;
    const unsigned at_begin = msda_sum_of_lanes(lane < 8 ? others : 0u), at_end = msda_sum_of_lanes(lane < 8 ? 0u : others);
    if (is_tallest) before = at - (lane < 8 ? at_begin : at_end);
    if (at >= (unsigned)Q) before = h * w;
    const bool enough = (float)length * (float)(rows * w) >= (float)band * MSDA_L &&
                        (float)length * (float)(last * w) >= (float)rest * MSDA_L;
    slice.cut = __all_sync(0xffffffffu, !is_tallest || enough);

    unsigned places = 0;
#pragma unroll
    for (int i = 0; i < MSDA_L; ++i) {
        const int begin = msda_of_lane((int)(before << 4 | rows), i);
        slice.before[i] = places;
        slice.shift[i] = begin - (int)(places << 4);
        places += (unsigned)msda_of_lane((int)before, 8 + i) - ((unsigned)begin >> 4);
    }
    return slice;
}

__device__ __forceinline__ msda_index msda_query(msda_index position, const msda_level* levels, const msda_slice& slice) {
    if (!slice.cut) return position;
    const unsigned place = (unsigned)(position - slice.first);
    int l = 0, shift = slice.shift[0];
#pragma unroll
    for (int i = 1; i < MSDA_L; ++i) {
        const bool here = place >= slice.before[i];
        l = here ? i : l;
        shift = here ? slice.shift[i] : shift;
    }
    const msda_level level = msda_level_at(levels + l);
    const unsigned rows = shift & 15, bands = rows ? slice.bands : 0u, w = level.w, inside = place + (shift >> 4);
    const unsigned band = min(msda_divide(inside, max(rows * w, 1u)), bands), in_band = inside - band * rows * w;
    const unsigned lines = band < bands ? rows : level.h - bands * rows, column = msda_divide(in_band, lines);
    return level.start + (msda_index)((band * rows + in_band - column * lines) * w + column);
}
#endif
