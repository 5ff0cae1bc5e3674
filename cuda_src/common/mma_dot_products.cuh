// Dot products of 16-bit vectors by the tensor cores: exact products, summed in float32
// (docs/performance/decisions.md#backward-mma-products).
//
// A group is 4 lanes here. A group's part of a value vector is a row of one matrix, and its part of grad_output is a column of
// the other, both as the lanes have loaded them. What the matrices have of one group's row and another's column is dropped.
#pragma once
#include "common/dot_products.cuh"

namespace msda {

#if MSDA_PTX && __CUDA_ARCH__ < 800
enum : bool { has_mma = false };
#else
enum : bool { has_mma = true };
#endif

enum : bool { tensor_cores = has_mma && grad_samples && sizeof(value_t) == 2 && (dot_vec == 4 || dot_vec == 8) && dot_lanes % 4 == 0 &&
    config::D % channel_tile == 0 && grad_output_in_registers && (config::aggregation_bits || !config::grad_value) };

// sum[i][j] += the sum over k of a[i][k] * b[k][j], i < 16, j < 8, k < 16. Lane 4 * g + t has rows g and g + 8 of `a` at
// k = 2t, 2t + 1 (words 0 and 1) and 2t + 8, 2t + 9 (words 2 and 3), column g of `b` at the same k, and of the sum rows
// g and g + 8 in columns 2t and 2t + 1. (PTX ISA, mma.m16n8k16. The order of k is the lanes' own: that of channels.)
template <typename T>
__device__ __forceinline__ void mma_m16n8k16(
        float (&sum)[4], unsigned a0, unsigned a1, unsigned a2, unsigned a3, unsigned b0, unsigned b1) {
#if MSDA_PTX
    if constexpr (is_same<T, float16>::value)
        asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
                     "{%0, %1, %2, %3};"
                     : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
                     : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
    else
        asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
                     "{%0, %1, %2, %3};"
                     : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
                     : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
#else
    const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    for (int source = 0; source < 4; ++source) {
        vector<T, 4> row[2], column[2];
        for (int half = 0; half < 2; ++half) {
            row[half].pair[0] = __shfl_sync(0xffffffffu, half ? a1 : a0, 4 * g + source);
            row[half].pair[1] = __shfl_sync(0xffffffffu, half ? a3 : a2, 4 * g + source);
            column[half].pair[0] = __shfl_sync(0xffffffffu, b0, 4 * (2 * t + half) + source);
            column[half].pair[1] = __shfl_sync(0xffffffffu, b1, 4 * (2 * t + half) + source);
        }
        for (int i = 0; i < 4; ++i)
            for (int k = 0; k < 4; ++k)
                sum[i] += widen(row[i / 2].element[k]) * widen(column[i % 2].element[k]);
    }
#endif
}

// grad_output of one query at the channels of a lane, in value's dtype.
struct mma_grad_output {
    dot_vector tile[channel_tiles];

    static __device__ __forceinline__ mma_grad_output load(const value_t* source, int lane) {
        mma_grad_output held;
#pragma unroll
        for (int t = 0; t < channel_tiles; ++t)
            held.tile[t] = load_channels<dot_vec>((address_t)(source + t * channel_tile + lane * dot_vec));
        return held;
    }
};

template <typename T>
struct mma_dot_products {
    float sum[(neighbours + 1) / 2][4];     // of two neighbours each

    // `x`: what a lane has loaded of the neighbours' value vectors, in one channel tile.
    __device__ __forceinline__ void add(const dot_vector& grad, const dot_vector (&x)[neighbours]) {
#pragma unroll
        for (int c = 0; c < neighbours; c += 2)
#pragma unroll
            for (int i = 0; i < dot_vec / 2; i += 2) {
                const bool both = c + 1 < neighbours;
                const dot_vector& right = x[both ? c + 1 : c];
                mma_m16n8k16<T>(sum[c / 2], x[c].pair[i], both ? right.pair[i] : 0u, x[c].pair[i + 1],
                                both ? right.pair[i + 1] : 0u, grad.pair[i], grad.pair[i + 1]);
            }
    }

    // As fma_dot_products::write.
    __device__ __forceinline__ void write(acc_t* target, const prepared_sample& sample) const {
        // A group's own row and column meet in one of its lanes. In a query's other groups that is the lane whose number
        // differs by as many bits as the group's, so that halves are exchanged in turn: two sums left, then one.
        const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
        __syncwarp();   // every lane has read the sample
        const bool odd = g & 1, on_diagonal = t == g >> 1;
        acc_t dot[4];
#pragma unroll
        for (int c = 0; c < 4; ++c) {
            const float* of_two = sum[c / 2 < (neighbours + 1) / 2 ? c / 2 : 0] + c % 2 * 2;
            dot[c] = c < neighbours ? (odd ? of_two[1] : of_two[0]) : 0.0f;
        }
        if constexpr (!config::grad_locations) {
            acc_t interpolated = interpolate(sample, dot);
#pragma unroll
            for (int groups = 1; groups < dot_lanes / 4; groups *= 2)
                interpolated += shuffle_xor(interpolated, 4 * groups + groups / 2);
            if (on_diagonal) target[0] = interpolated;
        } else if constexpr (dot_lanes == 4) {
            if (on_diagonal)
#pragma unroll
                for (int c = 0; c < 4; ++c) target[c] = dot[c];
        } else {
            dot[0] = (odd ? dot[2] : dot[0]) + shuffle_xor(odd ? dot[0] : dot[2], 4);
            dot[1] = (odd ? dot[3] : dot[1]) + shuffle_xor(odd ? dot[1] : dot[3], 4);
            if constexpr (dot_lanes == 8) {
                if (on_diagonal)
#pragma unroll
                    for (int c = 0; c < 2; ++c) target[2 * odd + c] = dot[c];
            } else {
                const bool high = g & 2;
                dot[0] = (high ? dot[1] : dot[0]) + shuffle_xor(high ? dot[0] : dot[1], 9);
                if (dot_lanes == 32) dot[0] += shuffle_xor(dot[0], 18);
                if (on_diagonal) target[2 * odd + high] = dot[0];
            }
        }
    }
};

}  // namespace msda
