// Gradients of the samples: from the dot products, which the backward leaves in shared memory in place of the samples, to the
// gradients of locations and weights, or with the fused front end of offsets, logits and reference points.
#pragma once
#include "common/dot_products.cuh"
#include "common/tile_samples.cuh"

namespace msda {

// Of one sample.
struct sample_gradient {
    acc_t x, y;         // of the location
    acc_t attention;    // of the weight
};

// `dot`: its dot products, or what is interpolated between them if locations need no gradient.
__device__ __forceinline__ sample_gradient sample_gradient_of(
        const sampling_point& point, const level_info& level, const acc_t* dot) {
    const acc_t nothing = level.w > 0 ? (acc_t)0 : quiet_nan();
    const bilinear_cell cell = locate(point.x, point.y, level);
    sample_gradient grad = {nothing, nothing, nothing};
    if (cell.in_bounds) {
        if constexpr (config::grad_locations) {
            const acc_t upper = fma(cell.fraction_x, dot[1] - dot[0], dot[0]);
            const acc_t lower = fma(cell.fraction_x, dot[3] - dot[2], dot[2]);
            grad.attention = fma(cell.fraction_y, lower - upper, upper);
            const acc_t slope_y = pixel_slope(point.y, level.h);
            if (!clamped || slope_y != 0) grad.y = point.attention * slope_y * (lower - upper);
            const acc_t across = fma(cell.fraction_y, (dot[3] - dot[2]) - (dot[1] - dot[0]), dot[1] - dot[0]);
            const acc_t slope_x = pixel_slope(point.x, level.w);
            if (!clamped || slope_x != 0) grad.x = point.attention * slope_x * across;
        } else {
            grad.attention = dot[0];
        }
    }
    return grad;
}

// What the gradient of a location is multiplied with: a size of the box or an offset, either of which may be infinite or NaN.
// Then the sample is out of bounds or clamped, its gradient is 0, and so is this.
__device__ __forceinline__ acc_t factor_of([[maybe_unused]] acc_t grad, acc_t factor) {
    if constexpr (config::reference_coordinates == 4) return grad == 0 ? (acc_t)0 : factor;
    else return factor;
}

__device__ __forceinline__ void store_xy(location_t* __restrict__ grad_locations, index_t q, int k, acc_t x, acc_t y) {
    vector<location_t, 2> xy;
    narrow(x, xy.element[0]);
    narrow(y, xy.element[1]);
    if (aligned_pairs)
        reinterpret_cast<decltype(xy.word)*>(grad_locations)[element_in_image(q, k, locations_pitch / 2)] = xy.word;
    else
        for (int i = 0; i < 2; ++i)
            grad_locations[element_in_image(q, 2 * k + i, locations_pitch)] = xy.element[i];
}

// Gradients of the warp's samples [k0, k0 + config::chunk), `raw`, of its tile number `tile`.
template <typename Shared>
__device__ __forceinline__ void write_plain_gradients(
        const prepared_sample* samples, const Shared& shared, const lane_samples& raw,
        int tile, int k0, location_t* __restrict__ grad_locations, location_t* __restrict__ grad_weights) {
#pragma unroll
    for (int step = 0; step < samples_per_lane; ++step) {
        const int i = step * 32 + threadIdx.x % 32;
        const int local = i / sample_slots, k = k0 + i % sample_slots;
        const index_t q = encoded_query(shared, tile, local);
        if (decoded_query(q) < 0 || k >= K) continue;
        sample_gradient grad = {0, 0, 0};
        if (!config::ragged || q >= 0) {
            const int level = MSDA_LEVEL_OF(k);
            const sampling_point point = sampling_point_of(raw, step, level, shared.levels[level]);
            const prepared_sample* sample = samples + local * sample_pitch + i % sample_slots;
            grad = sample_gradient_of(point, shared.levels[level], reinterpret_cast<const acc_t*>(sample));
        }
        if constexpr (config::grad_locations) store_xy(grad_locations, decoded_query(q), k, grad.x, grad.y);
        if constexpr (config::grad_weights)
            narrow(grad.attention, grad_weights[element_in_image(decoded_query(q), k, weights_pitch)]);
    }
}

// The same with the fused front end: gradients of offsets and logits. With s the sum of weight * gradient over the samples of
// a query, the gradient of a logit is weight * (gradient - s). Where reference points need a gradient, what a sample adds to
// it takes the place of the sample.
template <typename Shared>
__device__ __forceinline__ void write_fused_gradients(
        prepared_sample* samples, const Shared& shared, const lane_samples& raw,
        int tile, location_t* __restrict__ grad_locations, location_t* __restrict__ grad_weights) {
#pragma unroll
    for (int first = 0; first < samples_per_lane; first += pair_samples_per_lane) {
        const int local = (first * 32 + threadIdx.x % 32) / sample_slots;
        const index_t q = encoded_query(shared, tile, local);
        sample_gradient grad[pair_samples_per_lane];
        acc_t sum = 0;
#pragma unroll
        for (int t = 0; t < pair_samples_per_lane; ++t) {
            const int k = t * 32 + threadIdx.x % lanes_per_pair, level = min(MSDA_LEVEL_OF(k), config::L - 1);
            grad[t] = {0, 0, 0};
            if (q < 0 || k >= K) continue;
            const sampling_point point = sampling_point_of(raw, first + t, level, shared.levels[level]);
            acc_t* dot = reinterpret_cast<acc_t*>(samples + local * sample_pitch + k);
            grad[t] = sample_gradient_of(point, shared.levels[level], dot);
            sum = fma(point.attention, grad[t].attention, sum);
        }
        sum = pair_sum(sum);
#pragma unroll
        for (int t = 0; t < pair_samples_per_lane; ++t) {
            const int k = t * 32 + threadIdx.x % lanes_per_pair, level = min(MSDA_LEVEL_OF(k), config::L - 1);
            if (decoded_query(q) < 0 || k >= K) continue;
            const bool valid = !config::ragged || q >= 0;
            if constexpr (config::grad_locations) {
                const offset_scale scale = offset_scale_of(raw, first + t, level, shared.levels[level]);
                store_xy(grad_locations, decoded_query(q), k, valid ? grad[t].x * factor_of(grad[t].x, scale.x) : 0,
                         valid ? grad[t].y * factor_of(grad[t].y, scale.y) : 0);
            }
            if constexpr (config::grad_weights)
                narrow(valid ? raw.weight[first + t] * (grad[t].attention - sum) : 0,
                       grad_weights[element_in_image(decoded_query(q), k, weights_pitch)]);
            if constexpr (config::grad_references) {
                acc_t* parts = reinterpret_cast<acc_t*>(samples + local * sample_pitch + k);
                parts[0] = grad[t].x;
                parts[1] = grad[t].y;
                parts[2] = valid ? grad[t].x * factor_of(grad[t].x, widen(raw.xy[first + t].element[0])) : 0;
                parts[3] = valid ? grad[t].y * factor_of(grad[t].y, widen(raw.xy[first + t].element[1])) : 0;
            }
        }
    }
}

// What the samples of a level add to the gradient of the reference point of their query, for each query of the warp:
// [Q, M, L, config::reference_coordinates] of this image and head, summed over heads by epilogue/reduce_references.cu.
template <typename Shared>
__device__ __forceinline__ void write_reference_gradients(
        const prepared_sample* samples, const Shared& shared, int tile,
        acc_t* __restrict__ grad_references) {
    constexpr int coordinates = config::reference_coordinates;
    __syncwarp();
#pragma unroll 1
    for (int i = threadIdx.x % 32; i < queries_per_tile * config::L; i += 32) {
        const int local = i / config::L, l = i % config::L;
        const index_t q = decoded_query(encoded_query(shared, tile, local));
        if (q < 0) continue;
        acc_t sum[4] = {0, 0, 0, 0};
        for (int k = first_sample_of(l); k < first_sample_of(l + 1); ++k) {
            const acc_t* parts = reinterpret_cast<const acc_t*>(samples + local * sample_pitch + k);
            for (int r = 0; r < coordinates; ++r) sum[r] += parts[r];
        }
        const level_info level = shared.levels[l];
        for (int r = 0; r < coordinates; ++r) {
            const int size = r % 2 ? level.h : level.w;
            grad_references[(long long)q * (config::M * config::L * coordinates) + l * coordinates + r] =
                sum[r] * (r < 2 ? pixels_across(size) : pixels_per_offset(1, size, l));
        }
    }
}

// Weights of a warp's samples from shared memory, where prepare_sorted_samples has left them: a second softmax takes longer
// (docs/performance/decisions.md#fused-weights-kept).
__device__ __forceinline__ void restore_weights(lane_samples& raw, const prepared_sample* samples) {
#pragma unroll
    for (int step = 0; step < samples_per_lane; ++step) {
        const int i = step * 32 + threadIdx.x % 32, local = i / sample_slots, k = i % sample_slots;
        raw.weight[step] = local < queries_per_tile && k < K ? samples[local * sample_pitch + k].attention : 0;
    }
    __syncwarp();
}

}  // namespace msda
