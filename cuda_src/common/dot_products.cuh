// Dot products of grad_output with the value vectors of the neighbours of a sample, over the channels of a head: what the
// gradients of locations and weights are made of. Here by fused multiply-adds; common/mma_dot_products.cuh has those by the
// tensor cores.
#pragma once
#include "common/bilinear.cuh"
#include "common/channels.cuh"

namespace msda {

enum : bool { grad_samples = config::grad_locations || config::grad_weights };

// Lanes that share a dot product, and the channels of each: where tiles are paired, half the lanes with twice the channels.
enum : int { dot_lanes = config::lanes / config::paired_tiles };
enum : int { dot_vec = config::vec * config::paired_tiles };
using dot_vector = vector<value_t, dot_vec>;

// grad_output of a query stays in registers, unless a head has very many channels.
enum : bool { grad_output_in_registers = channel_tiles <= 4 };

__device__ __forceinline__ acc_t shuffle_xor(acc_t x, int mask) { return __shfl_xor_sync(0xffffffffu, x, mask); }

// The dot products of the neighbours, interpolated between them.
__device__ __forceinline__ acc_t interpolate(const prepared_sample& sample, const acc_t (&dot)[4]) {
    prepared_sample unweighted = sample;
    unweighted.attention = 1;
    acc_t share[4], interpolated = 0;
    neighbour_weights(unweighted, share);
#pragma unroll
    for (int c = 0; c < neighbours; ++c) interpolated = fma(share[c], dot[c], interpolated);
    return interpolated;
}

// grad_output of one query at the channels of a lane.
struct fma_grad_output {
    acc_t tile[grad_output_in_registers ? channel_tiles : 1][dot_vec];

    static __device__ __forceinline__ void load_tile(const value_t* source, int tile, int lane, acc_t (&grad)[dot_vec]) {
        const int channel = tile * channel_tile + lane * dot_vec;
        if (config::D % channel_tile != 0 && channel >= config::D) return;
        unpack(load_channels<dot_vec>((address_t)(source + channel)), grad);
    }

    static __device__ __forceinline__ fma_grad_output load(const value_t* source, int lane) {
        fma_grad_output held;
        if constexpr (grad_output_in_registers) {
#pragma unroll
            for (int t = 0; t < channel_tiles; ++t) load_tile(source, t, lane, held.tile[t]);
        } else {
#pragma unroll
            for (int v = 0; v < dot_vec; ++v) held.tile[0][v] = 0;
        }
        return held;
    }
};

struct fma_dot_products {
    acc_t sum[4];   // of each neighbour

    __device__ __forceinline__ void add(const acc_t (&grad)[dot_vec], int neighbour, const dot_vector& value) {
        acc_t x[dot_vec];
        unpack(value, x);
#pragma unroll
        for (int v = 0; v < dot_vec; ++v) sum[neighbour] = fma(grad[v], x[v], sum[neighbour]);
    }

    // Sum over the lanes of a query, to all of them.
    static __device__ __forceinline__ acc_t reduce(acc_t dot) {
#pragma unroll
        for (int mask = 1; mask < dot_lanes; mask *= 2) dot += shuffle_xor(dot, mask);
        return dot;
    }

    // Sums over the lanes of a query. Lanes 0 to 3 end with the sum of neighbour number `lane`, in dot[0] (of 1 lane, lane 0
    // has all four; of 2, each has two, in dot[0] and dot[2]). Halves are exchanged: 4 shuffles for 8 lanes instead of 12
    // (docs/performance/decisions.md#backward-four-sums-by-exchange).
    static __device__ __forceinline__ void reduce(acc_t (&dot)[4], int lane) {
        if constexpr (dot_lanes >= 2) {
            const bool odd = lane & 1;
            dot[0] = (odd ? dot[1] : dot[0]) + shuffle_xor(odd ? dot[0] : dot[1], 1);
            dot[2] = (odd ? dot[3] : dot[2]) + shuffle_xor(odd ? dot[2] : dot[3], 1);
        }
        if constexpr (dot_lanes >= 4) {
            const bool high = lane & 2;
            dot[0] = (high ? dot[2] : dot[0]) + shuffle_xor(high ? dot[0] : dot[2], 2);
#pragma unroll
            for (int mask = 4; mask < dot_lanes; mask *= 2) dot[0] += shuffle_xor(dot[0], mask);
        }
    }

    // Sums over the lanes of a query, to `target`, which is the place of the sample: one per neighbour, or where locations
    // need no gradient what is interpolated between them. By all lanes.
    __device__ __forceinline__ void write(acc_t* target, const prepared_sample& sample) {
        const int lane = threadIdx.x % 32 % dot_lanes;
        if constexpr (!config::grad_locations) {
            const acc_t interpolated = reduce(interpolate(sample, sum));
            __syncwarp();   // every lane has read the sample
            if (lane == 0) target[0] = interpolated;
        } else {
            reduce(sum, lane);
            __syncwarp();
            if constexpr (dot_lanes == 1) {
                for (int c = 0; c < 4; ++c) target[c] = sum[c];
            } else if constexpr (dot_lanes == 2) {
                target[lane] = sum[0];
                target[lane + 2] = sum[2];
            } else {
                if (lane < 4) target[lane] = sum[0];
            }
        }
    }
};

}  // namespace msda
