// Levels, order of queries, bilinear cells and the work of a warp: what the forward and the backward share.

// ---- sums over threads ------------------------------------------------------------------------------------

// Inclusive sum over the lanes of a warp.
__device__ __forceinline__ unsigned msda_sum_below(unsigned x) {
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
        const unsigned lower = __shfl_up_sync(0xffffffffu, x, step);
        if ((int)(threadIdx.x % 32) >= step) x += lower;
    }
    return x;
}

// The same over the threads of a block, all of which call it; `of_warps` has MSDA_WARPS elements. `all` is the sum.
__device__ __forceinline__ unsigned msda_sum_below(unsigned x, unsigned* of_warps, unsigned& all) {
    const int warp = threadIdx.x / 32;
    unsigned end = msda_sum_below(x);
    if (threadIdx.x % 32 == 31) of_warps[warp] = end;
    __syncthreads();
    all = 0;
#pragma unroll
    for (int w = 0; w < MSDA_WARPS; ++w) {
        const unsigned of_warp = of_warps[w];
        end += w < warp ? of_warp : 0;
        all += of_warp;
    }
    return end;
}

// ---- levels ------------------------------------------------------------------------------------------------

// In 16 bytes, so that it is read and written as one.
struct alignas(16) msda_level {
    msda_index start;
    int h, w;       // 0 for a level that does not fit into the S rows of value
};

union msda_level_word {
    uint4 word;
    msda_level level;
};

__device__ __forceinline__ msda_level msda_level_at(const msda_level* place) {
    msda_level_word whole;
    whole.word = *reinterpret_cast<const uint4*>(place);
    return whole.level;
}

#if MSDA_LEVELS_ON_DEVICE
struct msda_metadata {
    const long long* shapes;    // [L, 2]
    const long long* starts;    // [L], or null: levels are packed
};
#else
struct msda_metadata {
    long long level[MSDA_L][3];  // h, w, start; by value, so that a call needs no copy to the device
};
#endif

// Pixels of a level: none where it does not fit.
struct msda_extent {
    long long start, size;
    bool fits;
};

// Level `l` into its place.
__device__ __forceinline__ msda_extent msda_read_level(
        const msda_metadata& metadata, long long S, int l, msda_level& level) {
#if MSDA_LEVELS_ON_DEVICE
    const long long h = metadata.shapes[2 * l], w = metadata.shapes[2 * l + 1];
    long long start = 0;
    if (metadata.starts) {
        start = metadata.starts[l];
    } else {
        // Unsigned, because garbage may wrap around; what then seems to fit is still inside the array.
#pragma unroll 1
        for (int k = 0; k < l; ++k)
            start = (long long)((msda_address)start +
                                (msda_address)metadata.shapes[2 * k] * (msda_address)metadata.shapes[2 * k + 1]);
    }
#else
    const long long h = metadata.level[l][0], w = metadata.level[l][1], start = metadata.level[l][2];
#endif
    // Without arithmetic in 64 bits where it can be: each warp of the forward does this before it can begin.
    const long long size = (long long)((msda_address)(unsigned)h * (unsigned)w);
    const bool fits = h >> 32 == 0 && (int)h > 0 && w >> 32 == 0 && (int)w > 0 && (msda_address)start <= (msda_address)S &&
                      size <= S - start;
    msda_level_word whole;
    whole.word = uint4();
    whole.level.h = fits ? (int)h : 0;
    whole.level.w = fits ? (int)w : 0;
    whole.level.start = fits ? (msda_index)start : 0;
    *reinterpret_cast<uint4*>(&level) = whole.word;
    return {fits ? start : 0, fits ? size : 0, fits};
}

// One thread of a block a level. Returns, in the first warp, whether the levels follow each other and together have
// `total` pixels (false where there are more than 32).
__device__ __forceinline__ bool msda_read_levels(
        const msda_metadata& metadata, long long S, long long total, msda_level* levels) {
    [[maybe_unused]] long long size = 0;
    [[maybe_unused]] bool packed = MSDA_L <= 32;
#pragma unroll 1
    for (int l = threadIdx.x; l < MSDA_L; l += MSDA_THREADS) {
        const msda_extent extent = msda_read_level(metadata, S, l, levels[l]);
        size = extent.size;
        packed = packed && extent.fits;
    }
#if MSDA_BAND
    if (threadIdx.x < 32) {
        __syncwarp();
        long long end = size;
        for (int step = 1; step < 32; step *= 2) {
            const long long before = __shfl_up_sync(0xffffffffu, end, step);
            if (threadIdx.x >= step) end += before;
        }
        if (threadIdx.x < MSDA_L) packed = packed && levels[threadIdx.x].start == end - size;
        packed = packed && __shfl_sync(0xffffffffu, end, 31) == total;
        return __all_sync(0xffffffffu, packed);
    }
#endif
    return false;
}

// ---- points of a level ---------------------------------------------------------------------------------------

// MSDA_LEVEL_OF(k) is the level of sample k of a query. Not a function where it is a division: that made ptxas unroll
// differently.
#ifdef MSDA_POINTS
struct msda_point_table { int of[MSDA_L + 1]; };

__device__ constexpr msda_point_table msda_sum_points() {
    const int count[MSDA_L] = {MSDA_POINTS};
    msda_point_table first = {};
    for (int l = 0; l < MSDA_L; ++l) first.of[l + 1] = first.of[l] + count[l];
    return first;
}

// Number of the first sample of each level; the last entry is that of all samples.
__device__ constexpr msda_point_table msda_first_point = msda_sum_points();

__device__ __forceinline__ int msda_level_of(int k) {
    int level = 0;
#pragma unroll
    for (int l = 1; l < MSDA_L; ++l) level += k >= msda_first_point.of[l];
    return level;
}
__device__ __forceinline__ int msda_first_of(int level) { return msda_first_point.of[level]; }
#define MSDA_LEVEL_OF(k) msda_level_of(k)
#else
__device__ __forceinline__ int msda_first_of(int level) { return level * MSDA_P; }
#define MSDA_LEVEL_OF(k) ((k) / MSDA_P)
#endif

// ---- order of queries --------------------------------------------------------------------------------------

// x / y, for 0 <= x < 2**21: (x + 0.5) / y is further from a whole number than its error.
__device__ __forceinline__ unsigned msda_divide(unsigned x, unsigned y) {
    return (unsigned)(((float)x + 0.5f) * msda_reciprocal((float)y));
}

// Query at `position` of the order in which warps take them. Where queries are the pixels of all levels, neighbouring
// warps then hold a patch of MSDA_BAND rows instead of a line, and their samples share more of L1.
__device__ __forceinline__ msda_index msda_query(msda_index position, const msda_level* levels, bool packed) {
#if MSDA_BAND
    if (!packed) return position;
    int l = 0;
#pragma unroll
    for (int next = 1; next < MSDA_L; ++next) l += position >= levels[next].start;
    const msda_level level = msda_level_at(levels + l);
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

// ---- bilinear cells ----------------------------------------------------------------------------------------

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

// Row of value of the neighbour (y0, x0), in 64 bits: what it is multiplied with becomes an address.
__device__ __forceinline__ long long msda_row(const msda_sample& sample) { return sample.place >> 4; }

// ---- the work of a warp ------------------------------------------------------------------------------------

// Samples of a query in shared memory, padded to an odd number: the queries of a warp then lie in different banks.
#define MSDA_PITCH (MSDA_CHUNK | 1)

// Where samples are merged, a block holds those of all its rounds.
#if MSDA_MERGE
#define MSDA_HELD (MSDA_WARPS * MSDA_ROUNDS)
#else
#define MSDA_HELD MSDA_WARPS
#endif

struct msda_shared {
    msda_sample samples[MSDA_HELD][MSDA_SLOTS * MSDA_PITCH];
#if MSDA_ALONE
    msda_level levels[MSDA_WARPS][MSDA_L];   // each warp's own
#else
    msda_level levels[MSDA_L];
    msda_index query[MSDA_ROUNDS * MSDA_WARPS * MSDA_QUERIES];   // by msda_query_at
#endif
#if MSDA_MERGE
    alignas(16) unsigned of_warps[MSDA_WARPS];                      // aligned: read 16 bytes at a time, and no more
    unsigned begin[1 << MSDA_MERGE];                                // of each key in `order`; counts at first
    unsigned short order[MSDA_HELD * MSDA_QUERIES * MSDA_CHUNK];    // places in `samples`
#endif
};

// A block works on MSDA_HEADS heads of one image, on MSDA_WARPS * MSDA_ROUNDS groups of MSDA_QUERIES queries.
struct msda_work {
    long long image;    // n
    int m;              // the first head
    msda_index first;   // position of the block's first query
};

// Its first head among those of all images. They are along grid.y and then grid.z, which together may have room for more of
// them than there are. (No division, which was 35 of the 440 instructions before the forward's first row.)
__device__ __forceinline__ unsigned msda_head_of_block() {
    return (blockIdx.z * gridDim.y + blockIdx.y) * MSDA_HEADS;
}

__device__ __forceinline__ msda_work msda_work_of_block() {
    const unsigned head = msda_head_of_block();
    msda_work work;
    work.image = head / MSDA_M;
    work.m = (int)(head % MSDA_M);
    work.first = (msda_index)blockIdx.x * (MSDA_WARPS * MSDA_ROUNDS * MSDA_QUERIES);
    return work;
}

// Queries of an image that count.
__device__ __forceinline__ msda_index msda_length(const long long* __restrict__ lengths, long long image, msda_index Q) {
#if MSDA_PADDED
    const long long length = __ldg(lengths + image);
    return length < 0 ? 0 : length < Q ? (msda_index)length : Q;
#else
    return Q;
#endif
}

// Query number `at` of a block: -1 past the last one, -2 - q where q does not count.
__device__ __forceinline__ msda_index msda_query_at(
        const msda_work& work, int at, const msda_level* levels, bool packed, const long long* __restrict__ lengths,
        msda_index Q) {
    const msda_index q = work.first + at < Q ? msda_query(work.first + at, levels, packed) : -1;
    return MSDA_PADDED && q >= msda_length(lengths, work.image, Q) ? -2 - q : q;
}

#if !MSDA_ALONE
// What a block shares: its levels and its queries. By the whole block, not by each warp for its own few queries: that
// was a tenth of all instructions.
__device__ __forceinline__ void msda_begin(
        msda_shared& shared, const msda_work& work, const msda_metadata& metadata, const long long* __restrict__ lengths,
        long long S, msda_index Q) {
    bool packed = msda_read_levels(metadata, S, Q, shared.levels);
#if MSDA_BAND
    packed = __syncthreads_or(packed);   // the queries need the levels
#endif
#pragma unroll 1
    for (int i = threadIdx.x; i < MSDA_ROUNDS * MSDA_WARPS * MSDA_QUERIES; i += MSDA_THREADS) {
        shared.query[i] = msda_query_at(work, i, shared.levels, packed, lengths, Q);
    }
    __syncthreads();
}
#endif

#if MSDA_ALONE
// Each lane has a query of its warp, as far as there are some; the others have -1.
struct msda_queries {
    msda_index of_lane;
};

// Query `local` of this warp, which has one round. By all lanes.
__device__ __forceinline__ msda_index msda_query_of(const msda_queries& queries, int, int local) {
    return __shfl_sync(0xffffffffu, queries.of_lane, local);
}
#else
typedef msda_shared msda_queries;

// Query `local` of this warp's `round`; only the lanes beyond the last group of a warp have a `local` that is too high.
// Negative where there is none to work on.
__device__ __forceinline__ msda_index msda_query_of(const msda_queries& shared, int round, int local) {
    return local < MSDA_QUERIES ? shared.query[(round * MSDA_WARPS + threadIdx.x / 32) * MSDA_QUERIES + local] : -1;
}
#endif

// The number of a query that is there, whether it counts or not; -1 past the last one.
__device__ __forceinline__ msda_index msda_number(msda_index q) { return MSDA_PADDED && q < -1 ? -2 - q : q; }
