// The samples of a tile: a lane loads some of them from global memory, prepares them, and writes them to shared memory, where
// the lanes of their query read them.
#pragma once
#include "common/block.cuh"
#include "common/softmax.cuh"

namespace msda {

// Places for the samples of a pair, of a chunk, among the lanes; a softmax needs all samples of the pair.
enum : int { sample_slots = fused ? softmax_slots : config::chunk };
enum : int { samples_per_lane = (pairs_per_tile * sample_slots + 31) / 32 };

using lane_samples = raw_samples<samples_per_lane>;

__device__ __forceinline__ uint4 all_ones(uint4) { return {~0u, ~0u, ~0u, ~0u}; }
__device__ __forceinline__ uint2 all_ones(uint2) { return {~0u, ~0u}; }
__device__ __forceinline__ unsigned all_ones(unsigned) { return ~0u; }

// Samples from k0 on of the pairs of tile number `tile`, a lane each. `locations` and `weights` begin at the first sample of
// the block's head, `references` at the image. By all lanes of a warp. A sample that does not exist is not written, or with
// `mark_missing` it is NaN, which is out of bounds.
template <bool mark_missing, typename Queries>
__device__ __forceinline__ void load_samples(
        lane_samples& raw, const Queries& queries, int tile, int k0, const location_t* __restrict__ locations,
        const location_t* __restrict__ weights, const reference_t* __restrict__ references) {
#pragma unroll
    for (int step = 0; step < samples_per_lane; ++step) {
        const int i = step * 32 + threadIdx.x % 32;
        const int pair = i / sample_slots, k = k0 + i % sample_slots;
        const index_t q = encoded_query(queries, tile, pair / config::heads_per_warp);
        if constexpr (mark_missing) raw.xy[step].word = all_ones(raw.xy[step].word);
        if constexpr (fused || mark_missing) raw.attention[step] = location_t();   // softmax() looks at it
        if (q >= 0 && k < K) {
            load_location(raw, step, q, pair % config::heads_per_warp, k, locations, references);
            raw.attention[step] = load_attention(weights, q, pair % config::heads_per_warp, k);
        }
    }
}

// Raw samples to prepared ones in shared memory. Where there is none, a sample that is out of bounds.
template <typename Shared>
__device__ __forceinline__ void prepare_samples(
        prepared_sample* samples, const Shared& shared, lane_samples& raw, int tile, int k0) {
    if constexpr (fused) softmax(raw);
#pragma unroll
    for (int step = 0; step < samples_per_lane; ++step) {
        const int i = step * 32 + threadIdx.x % 32;
        const int pair = i / sample_slots, place = i % sample_slots, k = k0 + place;
        if (pair < pairs_per_tile && place < config::chunk) {
            const index_t q = encoded_query(shared, tile, pair / config::heads_per_warp);
            prepared_sample sample = {0, 0, 0, 0};
            if (q >= 0 && k < K) {
                const int level = MSDA_LEVEL_OF(k);
                const sampling_point point = sampling_point_of(raw, step, level, shared.levels[level]);
                sample = prepare_sample(point.x, point.y, point.attention, shared.levels[level]);
            }
            samples[pair * sample_pitch + place] = sample;
        }
    }
}

}  // namespace msda
