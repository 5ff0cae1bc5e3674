// Vectorised sample loads: the lanes of a query load and prepare its samples, config::samples_per_load at a time, and no lane
// asks another for its query (docs/performance/decisions.md#forward-vectorised-sample-loads).
#pragma once
#include "common/masked_samples.cuh"
#include "common/tile_samples.cuh"

namespace msda {

// Where levels are in registers and samples come as locations and weights.
enum : bool { vectorised_loads = config::warp_independent && config::levels_in_registers && !fused };
enum : int { loads_per_query = K / config::samples_per_load };
enum : int { loads_per_lane = (loads_per_query + config::lanes - 1) / config::lanes };

// Place of sample k of a query in shared memory: what lanes write at a time lies together, in different banks.
__device__ constexpr int sample_slot(int k) {
    return vectorised_loads ? k / config::samples_per_load + k % config::samples_per_load * loads_per_query : k;
}

struct vector_samples {
    vector<location_t, 2 * config::samples_per_load> xy[loads_per_lane];
    vector<location_t, config::samples_per_load> attention[loads_per_lane];
};

// Of query q, by its lanes. A sample that does not exist is NaN, which is out of bounds.
__device__ __forceinline__ void load_vector_samples(
        vector_samples& raw, index_t q, int head, int lane, const location_t* __restrict__ locations,
        const location_t* __restrict__ weights) {
#pragma unroll
    for (int i = 0; i < loads_per_lane; ++i) {
        const int load = i * config::lanes + lane;
        raw.xy[i].word = all_ones(raw.xy[i].word);
        raw.attention[i].word = decltype(raw.attention[i].word)();
        if (q >= 0 && load < loads_per_query) {
            const index_t at = element_in_image(q, head * loads_per_query + load, loads_per_query);
            raw.xy[i] = load_streaming<2 * config::samples_per_load>(locations, at);
            raw.attention[i] = load_streaming<config::samples_per_load>(weights, at);
        }
    }
}

// To the prepared samples of pair number `pair`. Lanes beyond the last pair do nothing.
template <typename Levels>
__device__ __forceinline__ void prepare_vector_samples(
        prepared_sample* samples, int pair, const Levels& levels, const vector_samples& raw, int lane) {
    if (32 % (config::lanes * config::heads_per_warp) != 0 && pair >= pairs_per_tile) return;
#pragma unroll
    for (int load = 0; load < loads_per_lane; ++load) {
        const int first = (load * config::lanes + lane) * config::samples_per_load;
        if (first >= K) continue;
        acc_t xy[2 * config::samples_per_load], attention[config::samples_per_load];
        unpack(raw.xy[load], xy);
        unpack(raw.attention[load], attention);
        level_info level = levels.at(MSDA_LEVEL_OF(first));
#pragma unroll
        for (int i = 0; i < config::samples_per_load; ++i) {
            if (i && (!equal_points || config::P % config::samples_per_load)) level = levels.at(MSDA_LEVEL_OF(first + i));
            samples[pair * sample_pitch + sample_slot(first + i)] =
                prepare_masked_sample(xy[2 * i], xy[2 * i + 1], attention[i], level);
        }
    }
}

}  // namespace msda
