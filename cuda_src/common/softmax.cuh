// Softmax over the samples of a query and head, with the fused front end.
//
// The K samples are held by a power of two of lanes, one sample each, or by a whole warp, several samples per lane.
#pragma once
#include "common/samples.cuh"

namespace msda {

// Places for the K samples: a power of two, or a multiple of a warp.
enum : int { softmax_slots = K <= 32 ? next_power_of_two(K) : (K + 31) / 32 * 32 };
enum : int { lanes_per_pair = softmax_slots < 32 ? softmax_slots : 32 };     // that hold a query and head
enum : int { pair_samples_per_lane = (softmax_slots + 31) / 32 };            // of one query and head

// Logits of this magnitude have exponentials that neither overflow nor vanish: their maximum need not be subtracted
// (docs/performance/decisions.md#fused-softmax).
enum : int { max_plain_logit = 60 };

// Sum over the samples of each query and head, to all of its lanes.
__device__ __forceinline__ acc_t pair_sum(acc_t x) {
#pragma unroll
    for (int mask = 1; mask < lanes_per_pair; mask *= 2) x += __shfl_xor_sync(0xffffffffu, x, mask);
    return x;
}

// raw.attention (logits) to raw.weight. By all lanes of a warp.
template <int count>
__device__ __forceinline__ void softmax(raw_samples<count>& raw) {
    const acc_t lowest = -(acc_t)__int_as_float(0x7f800000);
    bool moderate = true;
#pragma unroll
    for (int i = 0; i < count; ++i) {
        const acc_t logit = widen(raw.attention[i]);
        const int k = i % pair_samples_per_lane * 32 + threadIdx.x % lanes_per_pair;
        moderate = moderate && logit > -max_plain_logit && logit < max_plain_logit;
        raw.weight[i] = k < K ? logit : lowest;
    }
    if (!__all_sync(0xffffffffu, moderate)) {
#pragma unroll
        for (int first = 0; first < count; first += pair_samples_per_lane) {
            acc_t largest = lowest;
#pragma unroll
            for (int t = 0; t < pair_samples_per_lane; ++t) largest = fmax(largest, raw.weight[first + t]);
#pragma unroll
            for (int mask = 1; mask < lanes_per_pair; mask *= 2)
                largest = fmax(largest, __shfl_xor_sync(0xffffffffu, largest, mask));
#pragma unroll
            for (int t = 0; t < pair_samples_per_lane; ++t) raw.weight[first + t] -= largest;
        }
    }
#pragma unroll
    for (int first = 0; first < count; first += pair_samples_per_lane) {
        acc_t total = 0;
#pragma unroll
        for (int t = 0; t < pair_samples_per_lane; ++t) {
            raw.weight[first + t] = exponential(raw.weight[first + t]);
            total += raw.weight[first + t];
        }
        const acc_t scale = reciprocal(pair_sum(total));
#pragma unroll
        for (int t = 0; t < pair_samples_per_lane; ++t) raw.weight[first + t] *= scale;
    }
}

}  // namespace msda
