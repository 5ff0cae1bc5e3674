// Levels, their points, and sums over threads: what most kernels share.

// ---- lanes and threads ------------------------------------------------------------------------------------

// What lane `lane` has, to all lanes: in a uniform register, where there are some. Not by a shuffle, which the L1 cache's data
// pipe makes, and that is what limits the forward.
__device__ __forceinline__ int msda_of_lane(int x, int lane) {
#if MSDA_PTX && __CUDA_ARCH__ >= 800
    return (int)__reduce_or_sync(0xffffffffu, (int)(threadIdx.x % 32) == lane ? (unsigned)x : 0);
#else
    return __shfl_sync(0xffffffffu, x, lane);
#endif
}
__device__ __forceinline__ long long msda_of_lane(long long x, int lane) {
    return (long long)msda_of_lane((int)(x >> 32), lane) << 32 | (unsigned)msda_of_lane((int)x, lane);
}

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
        const long long all = __shfl_sync(0xffffffffu, end, 31);   // by every lane, so not behind &&
        packed = packed && all == total;
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
