// The levels as a warp of the forward holds them: in the registers of every lane, or in shared memory.
//
// Each warp reads the levels itself, where the warps of a block do not wait for each other (config::warp_independent).
#pragma once
#include "common/levels.cuh"
#include "common/warp.cuh"

namespace msda {

// All levels, the same in all lanes (docs/performance/decisions.md#forward-levels-in-registers).
struct register_levels {
    level_info of[config::L];

    // Member by member, by selections: as a whole it would be a branch, or go through memory.
    static __device__ __forceinline__ void take_if(bool condition, const level_info& other, level_info& level) {
        level.start = condition ? other.start : level.start;
        level.h = condition ? other.h : level.h;
        level.w = condition ? other.w : level.w;
    }

    __device__ __forceinline__ level_info at(int l) const {
        level_info level = of[0];
#pragma unroll
        for (int i = 1; i < config::L; ++i) take_if(l == i, of[i], level);
        return level;
    }

    __device__ __forceinline__ int width(int l) const { return at(l).w; }

    __device__ __forceinline__ level_info of_pixel(index_t position) const {
        level_info level = of[0];
#pragma unroll
        for (int i = 1; i < config::L; ++i) take_if(position >= of[i].start, of[i], level);
        return level;
    }
};

// Reads the levels, a lane each. Returns whether queries may be taken in tiles of pixels: whether the levels follow each
// other and are all of the Q pixels.
template <typename Shared>
__device__ __forceinline__ bool load_levels(
        register_levels& levels, Shared&, const level_metadata& metadata, long long S, index_t Q) {
    const int lane = threadIdx.x % 32;
    level_info of_lane = {0, 0, 0};
    if (lane < config::L) read_level(metadata, S, lane, of_lane);
    bool queries_are_pixels = true;
    index_t end = 0;
#pragma unroll
    for (int l = 0; l < config::L; ++l) {
        level_info& level = levels.of[l];
        level.start = broadcast(of_lane.start, l);
        level.h = broadcast(of_lane.h, l);
        level.w = broadcast(of_lane.w, l);
        // A level that does not fit has start 0 and no pixels: then `end` never becomes Q, or there is no pixel to take.
        queries_are_pixels = queries_are_pixels && level.start == end;
        end = level.start + (index_t)level.h * level.w;
    }
    return queries_are_pixels && end == Q;
}

template <typename Shared>
__device__ __forceinline__ bool load_levels(
        shared_levels& levels, Shared& shared, const level_metadata& metadata, long long S, [[maybe_unused]] index_t Q) {
    const int lane = threadIdx.x % 32;
    level_info* copy = shared.levels[threadIdx.x / 32];
    levels.of = copy;
    [[maybe_unused]] level_extent extent = {0, 0, false};
    if (lane < config::L) extent = read_level(metadata, S, lane, copy[lane]);
    bool queries_are_pixels = false;
    if constexpr (config::tile_rows != 0) {
        // Each begins where the one before ends; 31 bits hold Q, and so every end. (In read_levels, instead of its sum over
        // lanes, this is slower: docs/performance/decisions.md#backward-packed-levels-check.)
        const int end = (int)(extent.start + extent.size), before = __shfl_up_sync(0xffffffffu, end, 1);
        queries_are_pixels = lane >= config::L || (extent.fits && (int)extent.start == (lane ? before : 0) &&
                                       (lane < config::L - 1 || end == Q));
        queries_are_pixels = __all_sync(0xffffffffu, queries_are_pixels);
    }
    __syncwarp();
    return queries_are_pixels;
}

}  // namespace msda
