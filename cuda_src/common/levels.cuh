// The levels of the feature pyramid: from the arguments of a call, through a check, to a table that the kernels use.
#pragma once
#include "common/index.cuh"
#include "common/block_size.cuh"

namespace msda {

// In 16 bytes, so that it is read and written at once (docs/performance/decisions.md#forward-level-in-16-bytes).
struct alignas(16) level_info {
    index_t start;      // its first pixel
    int h, w;           // 0 for a level that does not fit into the S pixels of value
};

union level_word {
    uint4 word;
    level_info level;
};

__device__ __forceinline__ level_info load_level(const level_info* source) {
    level_word whole;
    whole.word = *reinterpret_cast<const uint4*>(source);
    return whole.level;
}

// A table of levels in shared memory.
struct shared_levels {
    const level_info* of;

    __device__ __forceinline__ level_info at(int l) const { return load_level(of + l); }
    __device__ __forceinline__ int width(int l) const { return of[l].w; }

    // The level of pixel `position`, where levels follow each other.
    __device__ __forceinline__ level_info of_pixel(index_t position) const {
        int l = 0;
#pragma unroll
        for (int next = 1; next < config::L; ++next) l += position >= of[next].start;
        return at(l);
    }
};

// ---- as the caller gives them ------------------------------------------------------------------------------

struct level_claim {
    long long h, w, start;
};

// In arrays on the device, unchecked.
struct level_metadata {
    const long long* shapes;    // [L, 2]
    const long long* starts;    // [L], or null: each level follows the one before it

    __device__ __forceinline__ level_claim at(int l) const {
        const long long h = shapes[2 * l], w = shapes[2 * l + 1];
        long long start = 0;
        if (starts) {
            start = starts[l];
        } else {
            // Unsigned, because garbage may wrap around; what then seems to fit is still inside the array.
#pragma unroll 1
            for (int k = 0; k < l; ++k)
                start = (long long)((address_t)start + (address_t)shapes[2 * k] * (address_t)shapes[2 * k + 1]);
        }
        return {h, w, start};
    }
};

// ---- checked ----------------------------------------------------------------------------------------------

// Pixels of a level: none where it does not fit.
struct level_extent {
    long long start, size;
    bool fits;
};

// Level `l`, checked, to `level`.
__device__ __forceinline__ level_extent read_level(const level_metadata& metadata, long long S, int l, level_info& level) {
    const level_claim claim = metadata.at(l);
    const long long h = claim.h, w = claim.w, start = claim.start;
    // Without arithmetic in 64 bits where it can be: each warp of the forward does this before it can begin.
    const long long size = (long long)((address_t)(unsigned)h * (unsigned)w);
    const bool fits = h >> 32 == 0 && (int)h > 0 && w >> 32 == 0 && (int)w > 0 && (address_t)start <= (address_t)S &&
                      size <= S - start;
    level_word whole;
    whole.word = uint4();
    whole.level.h = fits ? (int)h : 0;
    whole.level.w = fits ? (int)w : 0;
    whole.level.start = fits ? (index_t)start : 0;
    *reinterpret_cast<uint4*>(&level) = whole.word;
    return {fits ? start : 0, fits ? size : 0, fits};
}

// All levels, by a block: a thread per level. Returns, in the first warp, whether the levels follow each other and together
// have `total` pixels, where queries are pixels (config::tile_rows); false elsewhere, and with more than 32 levels.
__device__ __forceinline__ bool read_levels(
        const level_metadata& metadata, long long S, [[maybe_unused]] long long total, level_info* levels) {
    [[maybe_unused]] long long size = 0;
    [[maybe_unused]] bool queries_are_pixels = config::L <= 32;
#pragma unroll 1
    for (int l = threadIdx.x; l < config::L; l += threads_per_block) {
        const level_extent extent = read_level(metadata, S, l, levels[l]);
        size = extent.size;
        queries_are_pixels = queries_are_pixels && extent.fits;
    }
    if constexpr (config::tile_rows != 0) {
        if (threadIdx.x < 32) {
            __syncwarp();
            long long end = size;
            for (int step = 1; step < 32; step *= 2) {
                const long long before = __shfl_up_sync(0xffffffffu, end, step);
                if (threadIdx.x >= step) end += before;
            }
            if (threadIdx.x < config::L) queries_are_pixels = queries_are_pixels && levels[threadIdx.x].start == end - size;
            const long long all = __shfl_sync(0xffffffffu, end, 31);   // by every lane, so not behind &&
            queries_are_pixels = queries_are_pixels && all == total;
            return __all_sync(0xffffffffu, queries_are_pixels);
        }
    }
    return false;
}

}  // namespace msda
