// Forward: output[n, q, m] = sum over samples of attention * bilinear(value[n, :, m]).
//
// A warp works on tiles of queries_per_tile queries of config::heads_per_warp neighbouring heads. Its lanes first prepare the
// samples, some each, in shared memory. Then config::lanes lanes per query and head load the four neighbours of each sample,
// and accumulate config::vec channels each in registers. Where queries are not pixels, config::lane_groups groups of lanes
// share the samples of a query, and add up their sums at the end (docs/performance/decisions.md#forward-lane-groups).
//
// Neighbouring lanes belong to different heads, whose value vectors lie in different parts of their cache lines and come in
// one clock (docs/performance/decisions.md#forward-heads-per-warp).
#include "common/channels.cuh"
#include "common/registers.cuh"
#include "common/query_samples.cuh"
#include "common/warp_block.cuh"

namespace msda {

static_assert(config::query_tiles == 1 || (config::warp_independent && config::tile_rows),
              "several tiles per warp only where queries are pixels");

using forward_shared = select<
    !config::warp_independent, block_shared<config::warps>,
    select<config::levels_in_registers, warp_shared, warp_shared_with_levels>>;
using warp_levels = select<config::levels_in_registers, register_levels, shared_levels>;

using channel_sums = acc_t[channel_tiles][config::vec];

static_assert(sizeof(forward_shared) == config::shared_bytes, "the planner and the kernel disagree");

// ---- work --------------------------------------------------------------------------------------------------

// What the warps of a block share, where they are not independent.
template <typename Levels, typename Shared>
__device__ __forceinline__ void load_shared(
        Levels& levels, Shared& shared, const assignment& work, const level_metadata& metadata,
        const long long* __restrict__ lengths, long long S, index_t Q) {
    levels.of = shared.levels;
    load_block<false>(shared, work, metadata, lengths, S, Q);
}

// The queries of a warp's tile: a lane each, or, where the warps of a block share them, in shared memory.
template <typename Shared, typename Levels>
__device__ __forceinline__ decltype(auto) queries_of_tile(
        const Shared& shared, const Levels& levels, const assignment& work, int tile,
        const long long* __restrict__ lengths, index_t Q, bool queries_are_pixels) {
    if constexpr (config::warp_independent)
        return lane_queries{encoded_query_of_tile(levels, work, tile, (int)(threadIdx.x % 32), lengths, Q, queries_are_pixels)};
    else
        return (shared);    // by reference
}

// Raw samples of the lanes to prepared ones, where warps are independent. A sample that does not exist is marked by its NaN.
template <typename Levels>
__device__ __forceinline__ void prepare_marked_samples(
        prepared_sample* samples, const Levels& levels, lane_samples& raw, int k0) {
    if constexpr (fused) softmax(raw);
    // Where the lanes of a warp are whole queries, all samples of a lane are of one level.
    level_info level = levels.at(min(MSDA_LEVEL_OF(k0 + (int)(threadIdx.x % sample_slots)), config::L - 1));
#pragma unroll
    for (int step = 0; step < samples_per_lane; ++step) {
        const int i = step * 32 + threadIdx.x % 32;
        const int pair = i / sample_slots, slot = i % sample_slots;
        if (pair < pairs_per_tile && slot < config::chunk) {
            const int l = min(MSDA_LEVEL_OF(k0 + slot), config::L - 1);
            if (32 % sample_slots) level = levels.at(l);
            const sampling_point point = sampling_point_of(raw, step, l, level);
            if constexpr (config::masked_neighbours)
                samples[pair * sample_pitch + slot] = prepare_masked_sample(point.x, point.y, point.attention, level);
            else
                samples[pair * sample_pitch + slot] = prepare_sample(point.x, point.y, point.attention, level);
        }
    }
}

// ---- sums --------------------------------------------------------------------------------------------------

// Adds a sample. `loaded` becomes zeros for a neighbour outside. With masked neighbours it keeps a value vector that this
// query has read before, which costs nothing, and its weight is zero: infinity may so become NaN, but in no other query.
__device__ __forceinline__ void accumulate_sample(
        channel_sums& sum, channel_vector (&loaded)[4], const prepared_sample& sample, address_t image, address_t below,
        int lane) {
    acc_t weight[4];
    neighbour_weights(sample, weight);
    const address_t upper = image + pixel_of(sample) * (config::pixel_stride * sizeof(value_t)), lower = upper + below;
    const address_t right = config::pixel_stride * sizeof(value_t);
    const int mask = (int)sample.pixel_and_mask;
#pragma unroll
    for (int tile = 0; tile < channel_tiles; ++tile) {
        const int channel = tile * channel_tile + lane * config::vec;
        if (config::D % channel_tile != 0 && channel >= config::D) continue;
        const address_t at = tile * channel_tile * sizeof(value_t);
#pragma unroll
        for (int c = 0; c < neighbours; ++c) {
            const address_t from = (c < 2 ? upper : lower) + (c % 2 ? right : 0) + at;
            if constexpr (config::masked_neighbours) load_or_keep(loaded[c].word, mask & 1 << c, from);
            else loaded[c] = load_channels_or_zeros(mask >> c & 1, from);
        }
#pragma unroll
        for (int c = 0; c < neighbours; ++c) {
            acc_t x[config::vec];
            unpack(loaded[c], x);
#pragma unroll
            for (int v = 0; v < config::vec; ++v) sum[tile][v] = fma(weight[c], x[v], sum[tile][v]);
        }
    }
}

// Adds up the sums of the groups of lanes that share the samples of a query.
__device__ __forceinline__ void sum_over_lane_groups(channel_sums& sum) {
    constexpr int first = config::lanes * config::heads_per_warp;
#pragma unroll
    for (int mask = first; mask < first * config::lane_groups; mask *= 2)
#pragma unroll
        for (int tile = 0; tile < channel_tiles; ++tile)
#pragma unroll
            for (int v = 0; v < config::vec; ++v) sum[tile][v] += __shfl_xor_sync(0xffffffffu, sum[tile][v], mask);
}

extern "C" __global__ void __launch_bounds__(threads_per_block, config::min_blocks) msda_forward(
        const value_t* __restrict__ value, const __grid_constant__ level_metadata metadata,
        const location_t* __restrict__ locations, const location_t* __restrict__ weights,
        const reference_t* __restrict__ references, const long long* __restrict__ lengths,
        value_t* __restrict__ output, long long S, long long Q_,
        long long image_stride, long long head_stride, long long heads) {
    MSDA_SHARED_MEMORY(shared_memory);
    forward_shared& shared = *reinterpret_cast<forward_shared*>(shared_memory);
    const index_t Q = (index_t)Q_;

    if (config::query_tiles == 1 && first_head_of_block() >= heads) return;
    warp_levels levels;
    int tiles;
    const assignment work = assignment_of_warps(heads, tiles);
    [[maybe_unused]] bool queries_are_pixels = false;   // whether queries may be taken in tiles of pixels
    if constexpr (!config::warp_independent) load_shared(levels, shared, work, metadata, lengths, S, Q);
    else if constexpr (config::tile_rows != 0) queries_are_pixels = load_levels(levels, shared, metadata, S, Q);
    locations += first_element(work, Q_, locations_pitch);
    weights += first_element(work, Q_, weights_pitch);
    keep_in_register(locations), keep_in_register(weights);     // else their bases are added again at each load
    if (fused) references += work.image * Q_ * (config::reference_levels * config::reference_coordinates);
    const int group = threadIdx.x % 32 / config::lanes, lane = threadIdx.x % 32 % config::lanes;
    const int head = group % config::heads_per_warp, first_k = group / config::heads_per_warp % config::lane_groups;
    const int local = group / (config::heads_per_warp * config::lane_groups), pair = local * config::heads_per_warp + head;
    prepared_sample* samples = shared.samples[threadIdx.x / 32];
    const address_t image =
        (address_t)value +
        (work.image * image_stride + (work.m + head) * head_stride + lane * config::vec) * sizeof(value_t);

    // Query of the next tile, where its own lanes load the samples.
    [[maybe_unused]] index_t next = -1;
    if constexpr (loads_by_query) next = encoded_query_of_tile(levels, work, 0, local, lengths, Q, queries_are_pixels);
#pragma unroll 1
    for (int tile = 0; tile < tiles; ++tile) {
        [[maybe_unused]] const auto& queries = queries_of_tile(shared, levels, work, tile, lengths, Q, queries_are_pixels);
        index_t q;
        [[maybe_unused]] query_samples raw_of_query;
        [[maybe_unused]] lane_samples raw;
        if constexpr (loads_by_query) {
            q = next;
            load_query_samples(raw_of_query, q, head, lane, locations, weights);
        } else {
            load_samples<config::warp_independent>(raw, queries, 0, 0, locations, weights, references);
            q = encoded_query(queries, 0, local);
        }
        if constexpr (config::warp_independent && !config::tile_rows)
            load_levels(levels, shared, metadata, S, Q);  // while the samples come
        const bool active = q >= 0;
        channel_sums sum;
#pragma unroll
        for (int t = 0; t < channel_tiles; ++t)
#pragma unroll
            for (int v = 0; v < config::vec; ++v) sum[t][v] = 0;
        channel_vector loaded[4];
#pragma unroll
        for (int c = 0; c < 4; ++c) loaded[c].word = decltype(loaded[c].word)();

#pragma unroll 1
        for (int k0 = 0; k0 < K; k0 += config::chunk) {
            if constexpr (loads_by_query) {
                prepare_query_samples(samples, pair, levels, raw_of_query, lane);
                __syncwarp();
                next = tile + 1 < tiles ? encoded_query_of_tile(levels, work, tile + 1, local, lengths, Q, queries_are_pixels) : -1;
            } else {
                if constexpr (config::warp_independent) prepare_marked_samples(samples, levels, raw, k0);
                else prepare_samples(samples, queries, raw, 0, k0);
                __syncwarp();
                // The loads of the next chunk, so that this one hides their latency.
                if (k0 + config::chunk < K)
                    load_samples<config::warp_independent>(
                        raw, queries, 0, k0 + config::chunk, locations, weights, references);
            }
            if (active) {
                const prepared_sample* of_query = samples + pair * sample_pitch;
                // Read early, so that the next loads of value do not wait for it.
                prepared_sample next_sample = of_query[first_k];
#pragma unroll config::unroll
                for (int step = 0; step < config::chunk; step += config::lane_groups) {
                    const int k = step + first_k;
                    if (config::chunk % config::lane_groups != 0 && k >= config::chunk) break;
                    const int level = config::chunk >= K ? MSDA_LEVEL_OF(k) : min(MSDA_LEVEL_OF(k0 + k), config::L - 1);
                    const address_t below = (address_t)levels.width(level) * (config::pixel_stride * sizeof(value_t));
                    const prepared_sample sample = config::masked_neighbours ? next_sample : of_query[k];
                    if (config::masked_neighbours)
                        next_sample = of_query[min(k + config::lane_groups, config::chunk - 1)];
                    accumulate_sample(sum, loaded, sample, image, below, lane);
                }
            }
            __syncwarp();
        }

        sum_over_lane_groups(sum);
        const index_t number = decoded_query(q);
        if (number >= 0 && first_k == 0) {
            value_t* target = output + ((work.image * Q + number) * config::M + work.m + head) * config::D;
#pragma unroll
            for (int t = 0; t < channel_tiles; ++t) {
                const int channel = t * channel_tile + lane * config::vec;
                if (config::D % channel_tile != 0 && channel >= config::D) continue;
                channel_vector out;
#pragma unroll
                for (int v = 0; v < config::vec; ++v) narrow(sum[t][v], out.element[v]);
                __stcs(reinterpret_cast<decltype(out.word)*>(target + channel), out.word);
            }
        }
    }
}

}  // namespace msda
