// The work of a block whose warps do not wait for each other (config::warp_independent): each warp reads the levels and
// finds its queries itself (docs/performance/decisions.md#forward-warp-independent-scheduling).
#pragma once
#include "common/block.cuh"
#include "common/warp_levels.cuh"

namespace msda {

// Shared memory of such a block, with the levels of each warp or without.
struct warp_shared {
    prepared_sample samples[config::warps][pairs_per_tile * sample_pitch];
};
struct warp_shared_with_levels {
    prepared_sample samples[config::warps][pairs_per_tile * sample_pitch];
    level_info levels[config::warps][config::L];
};

// The work of a block, and how many tiles each of its warps takes for it: config::query_tiles, but the last heads have a row
// of the grid for each tile, of blocks whose warps take one, so that multiprocessors end at about the same time
// (docs/performance/decisions.md#forward-last-wave). The rows beyond the number of heads say how many heads these are.
__device__ __forceinline__ assignment assignment_of_warps([[maybe_unused]] long long heads, int& tiles) {
    assignment work = assignment_of_block();
    tiles = config::query_tiles;
    if constexpr (config::query_tiles > 1) {
        constexpr int rows_per_head = config::query_tiles > 1 ? config::query_tiles - 1 : 1;    // beyond the first
        const unsigned all = (unsigned)(heads / config::heads_per_warp), whole = all - (gridDim.y - all) / rows_per_head;
        if (blockIdx.y >= whole) {
            const unsigned row = blockIdx.y - whole;
            const unsigned head = (whole + row / config::query_tiles) * config::heads_per_warp;
            // As in assignment_of, but not by it, which is slower
            // (docs/performance/decisions.md#forward-separate-last-wave-indexing).
            work.image = head / config::M;
            work.m = (int)(head % config::M);
            // Backwards, because blocks of coarse levels take longest
            // (docs/performance/decisions.md#forward-last-wave-reversed).
            const unsigned before = row % config::query_tiles * gridDim.x + blockIdx.x;
            work.first = (index_t)(config::query_tiles * gridDim.x - 1 - before) * (config::warps * queries_per_tile);
            tiles = 1;
        }
    }
    return work;
}

// Query number `local` of a warp's tile number `tile`; -1 for a number that a tile does not have. In registers, not in shared
// memory (docs/performance/decisions.md#forward-queries-in-registers), and in signed numbers, because unsigned ones are
// slower with the fused front end (docs/performance/decisions.md#forward-signed-query-arithmetic).
template <typename Levels>
__device__ __forceinline__ index_t encoded_query_of_tile(
        const Levels& levels, const assignment& work, int tile, int local, const long long* __restrict__ lengths, index_t Q,
        bool queries_are_pixels) {
    const int first = (tile * config::warps + threadIdx.x / 32) * queries_per_tile;
    return local < queries_per_tile ? encoded_query_at(work, first + local, levels, queries_are_pixels, lengths, Q) : -1;
}

// The queries of a tile, one per lane; lanes without a query have -1.
struct lane_queries {
    index_t of_lane;
};

// Query number `local`. By all lanes.
__device__ __forceinline__ index_t encoded_query(const lane_queries& queries, int, int local) {
    return __shfl_sync(0xffffffffu, queries.of_lane, local);
}

}  // namespace msda
