// Samples by the lanes of their own query: a lane loads and prepares one at a time, and no lane asks another for its query.
// docs/performance/decisions.md#forward-vectorised-sample-loads
#pragma once
#include "common/masked_samples.cuh"
#include "common/tile_samples.cuh"

namespace msda {

// Where levels are in registers and samples come as locations and weights.
enum : bool { loads_by_query = config::warp_independent && config::levels_in_registers && !fused };
enum : int { loads_per_lane = (K + config::lanes - 1) / config::lanes };

struct query_samples {
    vector<location_t, 2> xy[loads_per_lane];
    vector<location_t, 1> attention[loads_per_lane];
};

// Of query q, by its lanes. A sample that does not exist is NaN, which is out of bounds.
__device__ __forceinline__ void load_query_samples(
        query_samples& raw, index_t q, int head, int lane, const location_t* __restrict__ locations,
        const location_t* __restrict__ weights) {
#pragma unroll
    for (int i = 0; i < loads_per_lane; ++i) {
        const int k = i * config::lanes + lane;
        raw.xy[i].word = all_ones(raw.xy[i].word);
        raw.attention[i].word = decltype(raw.attention[i].word)();
        if (q >= 0 && k < K) {
            const index_t at = element_in_image(q, head * K + k, K);
            raw.xy[i] = load_streaming<2>(locations, at);
            raw.attention[i] = load_streaming<1>(weights, at);
        }
    }
}

// To the prepared samples of pair number `pair`. Lanes beyond the last pair do nothing.
template <typename Levels>
__device__ __forceinline__ void prepare_query_samples(
        prepared_sample* samples, int pair, const Levels& levels, const query_samples& raw, int lane) {
    if (32 % (config::lanes * config::heads_per_warp) != 0 && pair >= pairs_per_tile) return;
#pragma unroll
    for (int i = 0; i < loads_per_lane; ++i) {
        const int k = i * config::lanes + lane;
        if (k >= K) continue;
        acc_t xy[2], attention[1];
        unpack(raw.xy[i], xy);
        unpack(raw.attention[i], attention);
        samples[pair * sample_pitch + k] =
            prepare_masked_sample(xy[0], xy[1], attention[0], levels.at(MSDA_LEVEL_OF(k)));
    }
}

}  // namespace msda
