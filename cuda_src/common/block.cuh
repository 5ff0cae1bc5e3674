// The work of a block whose warps share the levels and the queries, behind barriers. (The warps of most forward kernels do
// not: common/warp_block.cuh.)
#pragma once
#include "common/assignment.cuh"
#include "common/bilinear.cuh"
#include "common/cross_level_tiles.cuh"
#include "common/block_size.cuh"
#include "common/warp_layout.cuh"

namespace msda {

// Shared memory of such a block, with the samples of `tiles` tiles.
template <int tiles>
struct block_shared {
    prepared_sample samples[tiles][pairs_per_tile * sample_pitch];
    level_info levels[config::L];
    index_t query[queries_per_block];   // by encoded_query_at
};

// First head of a block among the heads of all images. They lie along grid.y and then grid.z, which together may have room
// for more of them than there are (docs/performance/decisions.md#forward-heads-along-the-grid).
__device__ __forceinline__ unsigned first_head_of_block() {
    return (blockIdx.z * gridDim.y + blockIdx.y) * config::heads_per_warp;
}

// `block`: number of the block among those of the same heads.
__device__ __forceinline__ assignment assignment_of(unsigned head, unsigned block) {
    assignment work;
    work.image = head / config::M;
    work.m = (int)(head % config::M);
    work.first = (index_t)block * queries_per_block;
    return work;
}
__device__ __forceinline__ assignment assignment_of_block() { return assignment_of(first_head_of_block(), blockIdx.x); }

// Query number `at` of a block: -1 past the last one, -2 - q where query q is not valid.
template <typename Levels, typename Order>
__device__ __forceinline__ index_t encoded_query_at(
        const assignment& work, int at, const Levels& levels, const Order& order, const long long* __restrict__ lengths,
        index_t Q) {
    const index_t q = work.first + at < Q ? query_in_order(work.first + at, levels, order) : -1;
    return config::ragged && q >= valid_queries(lengths, work.image, Q) ? -2 - q : q;
}

// The number of a query that exists, valid or not; -1 past the last one.
__device__ __forceinline__ index_t decoded_query(index_t q) { return config::ragged && q < -1 ? -2 - q : q; }

// Query `local` of this warp's tile number `tile`; only the lanes beyond the last group of a warp have a `local` that is too
// high. Negative where there is none to work on.
template <typename Shared>
__device__ __forceinline__ index_t encoded_query(const Shared& shared, int tile, int local) {
    return local < queries_per_tile ? shared.query[(tile * config::warps + threadIdx.x / 32) * queries_per_tile + local]
                                    : -1;
}

template <typename Shared, typename Order>
__device__ __forceinline__ void write_queries(
        Shared& shared, const assignment& work, const Order& order, const long long* __restrict__ lengths, index_t Q) {
#pragma unroll 1
    for (int i = threadIdx.x; i < queries_per_block; i += threads_per_block)
        shared.query[i] = encoded_query_at(work, i, shared_levels{shared.levels}, order, lengths, Q);
    __syncthreads();
}

// Fills shared.levels and shared.query. By the whole block, because a warp has few queries.
template <bool cross_level, typename Shared>
__device__ __forceinline__ void load_block(
        Shared& shared, const assignment& work, const level_metadata& metadata, const long long* __restrict__ lengths,
        long long S, index_t Q) {
    bool queries_are_pixels = read_levels(metadata, S, Q, shared.levels);
    if constexpr (config::tile_rows != 0) queries_are_pixels = __syncthreads_or(queries_are_pixels);    // the queries need the levels
    if constexpr (cross_level) {
        // By every warp: by the first alone, float16 spills.
        const cross_level_tile order = cross_level_tile_at({shared.levels}, work.first, queries_per_block, Q, queries_are_pixels);
        write_queries(shared, work, order, lengths, Q);
    } else {
        write_queries(shared, work, queries_are_pixels, lengths, Q);
    }
}

}  // namespace msda
