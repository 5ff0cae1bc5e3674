// Block-level aggregation: the samples of a block that lie in the same cell are added up before they go to grad_value
// (docs/performance/decisions.md#backward-block-aggregation).
//
// The samples of all queries of the block are sorted by cell: by the low bits of its row and column, so that no window has to
// be found. Cells that are far apart may share a key. Each group of config::lanes lanes then takes an equal share of the sorted
// samples, and keeps the sums of the four neighbours in registers for as long as the cell stays the same. Where the next cell
// is the right neighbour, only the left column goes to grad_value, and the right one stays.
#pragma once
#include "common/atomics.cuh"
#include "common/registers.cuh"
#include "common/tile_samples.cuh"

namespace msda {

enum : int { sort_keys = 1 << config::aggregation_bits };
enum : int { level_bits = bits_of(config::L) < config::aggregation_bits ? bits_of(config::L) : config::aggregation_bits };
enum : int { cell_bits = config::aggregation_bits - level_bits };
enum : int { y_bits = cell_bits / 2, x_bits = cell_bits - y_bits };
enum : int { groups_per_block = config::warps * queries_per_tile };      // a group of lanes per query

// Shared memory of a block that aggregates: it holds the samples of all its tiles.
struct aggregation_shared : block_shared<config::warps * config::query_tiles> {
    alignas(16) unsigned warp_sums[config::warps];      // aligned: read 16 bytes at a time, and no more
    unsigned key_begin[sort_keys];                      // first place of each key in `order`; counts at first
    unsigned short order[config::warps * config::query_tiles * queries_per_tile * config::chunk];  // places in `samples`
};

__device__ __forceinline__ int key_of_cell(const bilinear_cell& cell, int level) {
    const int x = cell.x0 & ((1 << x_bits) - 1), y = cell.y0 & ((1 << y_bits) - 1);
    return ((level & ((1 << level_bits) - 1)) << cell_bits) | y << x_bits | x;
}

// Prepares the samples of all tiles and sorts them. Returns how many are in bounds.
template <typename Shared>
__device__ __forceinline__ unsigned prepare_sorted_samples(
        Shared& shared, int k0, const location_t* __restrict__ locations, const location_t* __restrict__ weights,
        const reference_t* __restrict__ references) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    for (int key = threadIdx.x; key < sort_keys; key += threads_per_block) shared.key_begin[key] = 0;
    lane_samples raw[config::query_tiles];
#pragma unroll
    for (int tile = 0; tile < config::query_tiles; ++tile)
        load_samples<false>(raw[tile], shared, tile, k0, locations, weights, references);
    __syncthreads();
    unsigned key_and_rank[config::query_tiles][samples_per_lane];
#pragma unroll
    for (int tile = 0; tile < config::query_tiles; ++tile) {
        if constexpr (fused) softmax(raw[tile]);
#pragma unroll
        for (int step = 0; step < samples_per_lane; ++step) {
            const int i = step * 32 + lane, local = i / sample_slots, slot = i % sample_slots, k = k0 + slot;
            key_and_rank[tile][step] = 0xffffffffu;
            if (local >= queries_per_tile || slot >= config::chunk) continue;
            const index_t q = encoded_query(shared, tile, local);
            prepared_sample sample = {0, 0, 0, 0};
            if (q >= 0 && k < K) {
                const int level = MSDA_LEVEL_OF(k);
                const sampling_point point = sampling_point_of(raw[tile], step, level, shared.levels[level]);
                sample = prepare_sample(point.x, point.y, point.attention, shared.levels[level]);
                // Where the sample is out of bounds, too: its weight is read for the gradients of the logits alone.
                if constexpr (fused) sample.attention = point.attention;
                if (sample.pixel_and_mask & 15) {
                    const int key = key_of_cell(locate(point.x, point.y, shared.levels[level]), level);
                    key_and_rank[tile][step] = (unsigned)key << 16 | atomicAdd(shared.key_begin + key, 1u);
                }
            }
            shared.samples[tile * config::warps + warp][local * sample_pitch + slot] = sample;
        }
    }
    __syncthreads();

    // Counts to beginnings: each thread takes some neighbouring keys.
    constexpr int keys_per_thread = (sort_keys + threads_per_block - 1) / threads_per_block;
    unsigned count[keys_per_thread], total = 0;
#pragma unroll
    for (int j = 0; j < keys_per_thread; ++j) {
        const int key = threadIdx.x * keys_per_thread + j;
        count[j] = key < sort_keys ? shared.key_begin[key] : 0;
        total += count[j];
    }
    unsigned all, before = inclusive_sum(total, shared.warp_sums, all) - total;
#pragma unroll
    for (int j = 0; j < keys_per_thread; ++j) {
        const int key = threadIdx.x * keys_per_thread + j;
        if (key < sort_keys) shared.key_begin[key] = before;
        before += count[j];
    }
    __syncthreads();
#pragma unroll
    for (int tile = 0; tile < config::query_tiles; ++tile)
#pragma unroll
        for (int step = 0; step < samples_per_lane; ++step) {
            const unsigned found = key_and_rank[tile][step];
            if (found == 0xffffffffu) continue;
            const int i = step * 32 + lane;
            const int place = (tile * config::warps + warp) * (queries_per_tile * sample_pitch) +
                              i / sample_slots * sample_pitch + i % sample_slots;
            shared.order[shared.key_begin[found >> 16] + (found & 0xffff)] = (unsigned short)place;
        }
    __syncthreads();
    return all;
}

// The cell that a group of lanes is at, and the sums of its neighbours.
struct cell_sums {
    index_t pixel_and_mask;     // of its samples; 0: none
    int level;
    acc_t sum[neighbours][config::vec];
};

// Adds the sums of one column of a cell, where bits 0 and 2 of `mask` say that its neighbours are in the level. Mostly both
// are, and two jumps are saved (docs/performance/decisions.md#backward-one-branch-per-column).
__device__ __forceinline__ void add_column(
        int mask, address_t upper, address_t below, const acc_t (&top)[config::vec], const acc_t (&bottom)[config::vec]) {
    if ((mask & 5) == 5) {
        atomic_add_channels(upper, top);
        atomic_add_channels(upper + below, bottom);
    } else {
        if (mask & 1) atomic_add_channels(upper, top);
        if (mask & 4) atomic_add_channels(upper + below, bottom);
    }
}

// Adds the sums of a cell to grad_value, except the right column where it `stays`.
template <typename Shared>
__device__ __forceinline__ void flush_cell(
        const Shared& shared, const cell_sums& cell, [[maybe_unused]] bool stays, address_t grad_value) {
    address_t upper = grad_value + (long long)(cell.pixel_and_mask >> 4) * grad_value_pitch;
    keep_in_register(upper);
    if constexpr (!config::nearest) {
        const int mask = (int)cell.pixel_and_mask;
        const address_t below = (address_t)shared.levels[cell.level].w * grad_value_pitch;
        add_column(mask, upper, below, cell.sum[0], cell.sum[2]);
        if (!stays) add_column(mask >> 1, upper + grad_value_pitch, below, cell.sum[1], cell.sum[3]);
    } else {
        atomic_add_channels(upper, cell.sum[0]);
    }
}

// Adds `count` sorted samples to grad_value. `grad_output` is that of this image and head at the channels of this lane,
// `grad_value` likewise.
template <typename Shared>
__device__ __forceinline__ void add_sorted_samples(
        const Shared& shared, unsigned count, int k0, address_t grad_output, address_t grad_value) {
    const unsigned share = (count + groups_per_block - 1) / groups_per_block, group = threadIdx.x / config::lanes;
    const unsigned last = min((group + 1) * share, count);
    const prepared_sample* samples = shared.samples[0];
    // Both addresses would be computed again for each sample (docs/performance/decisions.md#backward-aggregation-addresses).
    keep_in_register(grad_output);
    keep_in_register(grad_value);
    cell_sums cell;
    cell.pixel_and_mask = 0;
    cell.level = 0;
#pragma unroll 1
    for (unsigned i = group * share; i < last; i += config::unroll) {
        prepared_sample sample[config::unroll];
        channel_vector loaded[config::unroll];
        int level[config::unroll];
#pragma unroll
        for (int u = 0; u < config::unroll; ++u) {
            const unsigned place = shared.order[min(i + u, last - 1)], query = place / sample_pitch;
            sample[u] = samples[place];
            level[u] = MSDA_LEVEL_OF(k0 + (place - query * sample_pitch));
            loaded[u] =
                load_channels(grad_output + (long long)shared.query[query] * (config::M * config::D * sizeof(value_t)));
        }
#pragma unroll
        for (int u = 0; u < config::unroll; ++u) {
            if (i + u >= last) break;
            if (sample[u].pixel_and_mask != cell.pixel_and_mask || level[u] != cell.level) {
                const bool stays = !config::nearest && level[u] == cell.level && (cell.pixel_and_mask & 10) != 0 &&
                                   (sample[u].pixel_and_mask & 5) != 0 &&
                                   (sample[u].pixel_and_mask >> 4) - (cell.pixel_and_mask >> 4) == 1;
                if (cell.pixel_and_mask & 15) flush_cell(shared, cell, stays, grad_value);
#pragma unroll
                for (int c = 0; c < neighbours; ++c)
#pragma unroll
                    for (int v = 0; v < config::vec; ++v)
                        cell.sum[c][v] = stays && c % 2 == 0 ? cell.sum[config::nearest ? c : c + 1][v] : 0;
                cell.pixel_and_mask = sample[u].pixel_and_mask;
                cell.level = level[u];
            }
            acc_t weight[4], x[config::vec];
            neighbour_weights(sample[u], weight);
            unpack(loaded[u], x);
#pragma unroll
            for (int c = 0; c < neighbours; ++c)
#pragma unroll
                for (int v = 0; v < config::vec; ++v) cell.sum[c][v] = fma(weight[c], x[v], cell.sum[c][v]);
        }
    }
    if (cell.pixel_and_mask & 15) flush_cell(shared, cell, false, grad_value);
}

}  // namespace msda
