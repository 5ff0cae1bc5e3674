// Backward: gradients of value, sampling_locations and attention_weights, those that config::grad_value, grad_locations and
// grad_weights ask for.
//
// Warps, lanes and samples are those of the forward. For each sample the lanes compute the dot products of grad_output with
// the value vectors of its four neighbours, or, where locations need no gradient, with what is interpolated between them
// (common/dot_products.cuh). These replace the sample in shared memory. At the end of a chunk, one lane per sample turns them
// into the gradients of location and weight (common/sample_gradients.cuh). Meanwhile weight * grad_output is added to the
// four value vectors of grad_value; with config::aggregation_bits, the chunks of all queries of the block are added up before
// (common/aggregation.cuh).
#include "common/aggregation.cuh"
#include "common/mma_dot_products.cuh"
#include "common/sample_gradients.cuh"

namespace msda {

enum : bool { aggregated = config::aggregation_bits != 0 };
enum : bool { adds_each_sample = config::grad_value && !aggregated };

using backward_shared = select<aggregated, aggregation_shared, block_shared<config::warps>>;
using held_grad_output = select<tensor_cores, mma_grad_output, fma_grad_output>;
using dot_products = select<tensor_cores, mma_dot_products<value_t>, fma_dot_products>;

static_assert(sizeof(backward_shared) == config::shared_bytes, "the planner and the kernel disagree");

// Each array from the first element of the block's image and head on.
struct block_arrays {
    const location_t* locations;
    const location_t* weights;
    const reference_t* references;
    location_t* grad_locations;
    location_t* grad_weights;
    acc_t* grad_references;
    const value_t* grad_output;
    address_t value, grad_value;    // at the channels of a lane: of the dot products, of the sums
};

__device__ __forceinline__ assignment assignment_of_backward_block() {
    unsigned head, block = blockIdx.x;
    if constexpr (config::paired_tiles > 1) {
        // By a branch, so that image and head are in each lane's registers, not in uniform ones: then nothing spills
        // (docs/performance/decisions.md#backward-head-by-branch).
        head = blockIdx.y * config::heads_per_warp;
        if (blockIdx.z) head = first_head_of_block();
    } else {
        head = first_head_of_block();
    }
    // Backwards, so that the coarse levels come first: float32 alone gains (docs/performance/decisions.md#backward-reversed-blocks).
    if constexpr (aggregated && config::tile_rows && is_same<value_t, float>::value) block = gridDim.x - 1 - block;
    return assignment_of(head, block);
}

// The dot products of samples [k0, k0 + config::chunk) of this lane's query, to their places, and what each sample adds to
// grad_value, unless that is aggregated. `value` and `grad_value` begin at pixel 0 of the image, at the channels of this lane.
// By all lanes of a warp.
template <typename Products, typename Held, typename Shared>
__device__ __forceinline__ void multiply_chunk(
        const Shared& shared, prepared_sample* samples, int k0, const value_t* grad_output, Held& held, address_t value,
        address_t grad_value) {
    const int lane = threadIdx.x % 32 % dot_lanes;
#pragma unroll config::unroll
    for (int k = 0; k < config::chunk; ++k) {
        const prepared_sample sample = samples[k];
        const int mask = (int)sample.pixel_and_mask;
        const int level = K % config::chunk ? min(MSDA_LEVEL_OF(k0 + k), config::L - 1) : MSDA_LEVEL_OF(k0 + k);
        // Pixels of the upper and the lower row, added in the index's own bits, and their addresses in registers: else there
        // are more instructions per sample (docs/performance/decisions.md#backward-value-addresses-in-registers).
        const index_t pixel = pixel_of(sample), pixels[2] = {pixel, pixel + shared.levels[level].w};
        [[maybe_unused]] address_t from[2];
        if constexpr (grad_samples) {
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                from[i] = value + (long long)pixels[i] * (config::pixel_stride * sizeof(value_t));
                keep_in_register(from[i]);
            }
        }
        [[maybe_unused]] acc_t weight[4];
        if constexpr (adds_each_sample) neighbour_weights(sample, weight);
        [[maybe_unused]] Products products = {};
#pragma unroll
        for (int tile = 0; tile < channel_tiles; ++tile) {
            const int channel = tile * channel_tile;
            if (config::D % channel_tile != 0 && channel + lane * dot_vec >= config::D) continue;
            if constexpr (tensor_cores) {
                dot_vector x[neighbours];
#pragma unroll
                for (int c = 0; c < neighbours; ++c) {
                    const address_t right = ((address_t)(c & 1) * config::pixel_stride + channel) * sizeof(value_t);
                    x[c] = load_channels_or_zeros<dot_vec>(mask >> c & 1, from[c >> 1] + right);
                }
                products.add(held.tile[tile], x);
            } else {
                acc_t(&grad)[dot_vec] = held.tile[grad_output_in_registers ? tile : 0];
                if constexpr (!grad_output_in_registers) Held::load_tile(grad_output, tile, lane, grad);
#pragma unroll
                for (int c = 0; c < neighbours; ++c) {
                    const bool present = mask >> c & 1;
                    if constexpr (grad_samples) {
                        const address_t right = (address_t)(c & 1) * config::pixel_stride + channel;
                        const address_t at = from[c >> 1] + right * sizeof(value_t);
                        products.add(grad, c, load_channels_or_zeros<dot_vec>(present, at));
                    }
                    if constexpr (adds_each_sample) {
                        acc_t part[dot_vec];
#pragma unroll
                        for (int v = 0; v < dot_vec; ++v) part[v] = weight[c] * grad[v];
                        const address_t right = (c & 1) * grad_value_pitch + channel * sizeof(acc_t);
                        if (present)
                            atomic_add_channels(grad_value + (long long)pixels[c >> 1] * grad_value_pitch + right, part);
                    }
                }
            }
        }
        if constexpr (grad_samples) products.write(reinterpret_cast<acc_t*>(samples + k), sample);
    }
}

extern "C" __global__ void __launch_bounds__(threads_per_block, config::min_blocks) msda_backward(
        const value_t* __restrict__ value, const __grid_constant__ level_metadata metadata,
        const location_t* __restrict__ locations, const location_t* __restrict__ weights,
        const reference_t* __restrict__ references, const long long* __restrict__ lengths,
        const value_t* __restrict__ grad_output, acc_t* __restrict__ grad_value,
        location_t* __restrict__ grad_locations, location_t* __restrict__ grad_weights,
        acc_t* __restrict__ grad_references, long long S, long long Q_, long long image_stride,
        long long head_stride, long long heads) {
    MSDA_SHARED_MEMORY(shared_memory);
    backward_shared& shared = *reinterpret_cast<backward_shared*>(shared_memory);
    const index_t Q = (index_t)Q_;

    // In the first plane of the grid all have a head.
    if ((config::paired_tiles == 1 || blockIdx.z) && first_head_of_block() >= heads) return;
    // In registers: else the addresses are computed again for each sample. Where registers are scarce, not the head, or
    // neither (docs/performance/decisions.md#backward-image-and-head-in-registers).
    assignment work = assignment_of_backward_block();
    if (!(aggregated && fused)) keep_in_register(work.image);
    if (!aggregated) keep_in_register(work.m);
    load_block<aggregated && config::tile_rows != 0 && config::L <= 8>(shared, work, metadata, lengths, S, Q);
    const int local = threadIdx.x % 32 / config::lanes;
    const int lane = threadIdx.x % 32 % config::lanes, dot_lane = threadIdx.x % 32 % dot_lanes;
    block_arrays block;
    block.locations = locations + first_element(work, Q_, locations_pitch);
    block.weights = weights + first_element(work, Q_, weights_pitch);
    block.references =
        fused ? references + work.image * Q_ * (config::reference_levels * config::reference_coordinates) : nullptr;
    block.grad_locations = config::grad_locations ? grad_locations + (block.locations - locations) : nullptr;
    block.grad_weights = config::grad_weights ? grad_weights + (block.weights - weights) : nullptr;
    block.grad_references = config::grad_references
        ? grad_references + first_element(work, Q_, config::L * config::reference_coordinates) : nullptr;
    block.grad_output = grad_output + (work.image * Q_ * config::M + work.m) * config::D;
    block.value = (address_t)value +
                  (work.image * image_stride + work.m * head_stride + dot_lane * dot_vec) * sizeof(value_t);
    block.grad_value =
        (address_t)grad_value +
        (work.image * S * (config::M * config::D) + work.m * config::D + lane * config::vec) * sizeof(acc_t);

    if constexpr (aggregated) {
#pragma unroll 1
        for (int k0 = 0; k0 < K; k0 += config::chunk) {
            const unsigned count = prepare_sorted_samples(shared, k0, block.locations, block.weights, block.references);
#pragma unroll 1
            for (int tile = 0; tile < channel_tiles; ++tile) {
                const int channel = tile * channel_tile + lane * config::vec;
                if (config::D % channel_tile != 0 && channel >= config::D) continue;
                add_sorted_samples(shared, count, k0, (address_t)(block.grad_output + channel),
                                   block.grad_value + tile * channel_tile * sizeof(acc_t));
            }
            __syncthreads();
            if constexpr (grad_samples) {
#pragma unroll 1
                for (int tile = 0; tile < config::query_tiles; tile += config::paired_tiles) {
                    // Of this lane, among the groups of dot_lanes lanes: its query, and the tile of that.
                    const int group = threadIdx.x % 32 / dot_lanes, local = group % queries_per_tile;
                    const int tile_of_lane = tile + group / queries_per_tile;
                    const index_t q = encoded_query(shared, tile_of_lane, local);
                    const value_t* grad_output = block.grad_output + (long long)(q < 0 ? 0 : q) * (config::M * config::D);
                    held_grad_output held = held_grad_output::load(grad_output, dot_lane);
                    // The raw samples of one tile are loaded before the dot products, which hide their latency. Those of two
                    // would take registers from the dot products (docs/performance/decisions.md#backward-samples-before-products).
                    lane_samples raw[config::paired_tiles];
                    prepared_sample* samples[config::paired_tiles];
#pragma unroll
                    for (int j = 0; j < config::paired_tiles; ++j) {
                        if (config::paired_tiles == 1)
                            load_samples<false>(
                                raw[j], shared, tile + j, k0, block.locations, block.weights, block.references);
                        samples[j] = shared.samples[(tile + j) * config::warps + threadIdx.x / 32];
                        if constexpr (fused) restore_weights(raw[j], samples[j]);
                    }
                    prepared_sample* samples_of_lane =
                        shared.samples[tile_of_lane * config::warps + threadIdx.x / 32] + local * sample_pitch;
                    multiply_chunk<dot_products>(
                        shared, samples_of_lane, k0, grad_output, held, block.value, block.grad_value);
                    __syncwarp();
#pragma unroll
                    for (int j = 0; j < config::paired_tiles; ++j)
                        if (config::paired_tiles > 1)
                            load_samples<false>(
                                raw[j], shared, tile + j, k0, block.locations, block.weights, block.references);
#pragma unroll
                    for (int j = 0; j < config::paired_tiles; ++j) {
                        if constexpr (fused)
                            write_fused_gradients(samples[j], shared, raw[j], tile + j, block.grad_locations, block.grad_weights);
                        else
                            write_plain_gradients(samples[j], shared, raw[j], tile + j, k0, block.grad_locations, block.grad_weights);
                        if constexpr (config::grad_references)
                            write_reference_gradients(samples[j], shared, tile + j, block.grad_references);
                    }
                }
                __syncthreads();
            }
        }
    } else {
        prepared_sample* samples = shared.samples[threadIdx.x / 32];
        lane_samples raw;
        load_samples<false>(raw, shared, 0, 0, block.locations, block.weights, block.references);
#pragma unroll 1
        for (int tile = 0; tile < config::query_tiles; ++tile) {
            const index_t q = encoded_query(shared, tile, local);
            // Lanes past the last query take part in the shuffles; query 0 stands in as an address they may read.
            const value_t* grad_output = block.grad_output + (long long)(q < 0 ? 0 : q) * (config::M * config::D);
            held_grad_output held = held_grad_output::load(grad_output, dot_lane);

#pragma unroll 1
            for (int k0 = 0; k0 < K; k0 += config::chunk) {
                prepare_samples(samples, shared, raw, tile, k0);
                __syncwarp();
                multiply_chunk<dot_products>(
                    shared, samples + local * sample_pitch, k0, grad_output, held, block.value, block.grad_value);
                __syncwarp();
                if constexpr (grad_samples) {
                    if constexpr (fused)
                        write_fused_gradients(samples, shared, raw, tile, block.grad_locations, block.grad_weights);
                    else
                        write_plain_gradients(samples, shared, raw, tile, k0, block.grad_locations, block.grad_weights);
                    if constexpr (config::grad_references)
                        write_reference_gradients(samples, shared, tile, block.grad_references);
                    __syncwarp();
                }
                if (k0 + config::chunk < K) {
                    load_samples<false>(
                        raw, shared, tile, k0 + config::chunk, block.locations, block.weights, block.references);
                } else if (tile + 1 < config::query_tiles) {
                    load_samples<false>(raw, shared, tile + 1, 0, block.locations, block.weights, block.references);
                }
            }
        }
    }
}

}  // namespace msda
