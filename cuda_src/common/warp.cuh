// Exchange between the lanes of a warp, and sums over the threads of a warp and of a block.
#pragma once
#include "common/block_size.cuh"
#include "common/platform.cuh"

namespace msda {

// What lane `lane` has, to all lanes: in a uniform register, where there are some. Not by a shuffle, which L1's data pipe
// makes; that pipe limits the forward (docs/performance/decisions.md#forward-l1-data-pipe).
__device__ __forceinline__ int broadcast(int x, int lane) {
#if MSDA_PTX && __CUDA_ARCH__ >= 800
    return (int)__reduce_or_sync(0xffffffffu, (int)(threadIdx.x % 32) == lane ? (unsigned)x : 0);
#else
    return __shfl_sync(0xffffffffu, x, lane);
#endif
}
__device__ __forceinline__ long long broadcast(long long x, int lane) {
    return (long long)broadcast((int)(x >> 32), lane) << 32 | (unsigned)broadcast((int)x, lane);
}

// Sum and maximum over the lanes, to all of them.
__device__ __forceinline__ unsigned warp_sum(unsigned x) {
#if MSDA_PTX && __CUDA_ARCH__ >= 800
    return __reduce_add_sync(0xffffffffu, x);
#else
    for (int mask = 1; mask < 32; mask *= 2) x += __shfl_xor_sync(0xffffffffu, x, mask);
    return x;
#endif
}
__device__ __forceinline__ unsigned warp_max(unsigned x) {
#if MSDA_PTX && __CUDA_ARCH__ >= 800
    return __reduce_max_sync(0xffffffffu, x);
#else
    for (int mask = 1; mask < 32; mask *= 2) x = max(x, __shfl_xor_sync(0xffffffffu, x, mask));
    return x;
#endif
}

// Inclusive prefix sum over the lanes of a warp.
__device__ __forceinline__ unsigned inclusive_sum(unsigned x) {
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
        const unsigned lower = __shfl_up_sync(0xffffffffu, x, step);
        if ((int)(threadIdx.x % 32) >= step) x += lower;
    }
    return x;
}

// The same over the threads of a block, all of which call it; `warp_sums` has config::warps elements. `all` is the sum.
__device__ __forceinline__ unsigned inclusive_sum(unsigned x, unsigned* warp_sums, unsigned& all) {
    const int warp = threadIdx.x / 32;
    unsigned end = inclusive_sum(x);
    if (threadIdx.x % 32 == 31) warp_sums[warp] = end;
    __syncthreads();
    all = 0;
#pragma unroll
    for (int w = 0; w < config::warps; ++w) {
        const unsigned of_warp = warp_sums[w];
        end += w < warp ? of_warp : 0;
        all += of_warp;
    }
    return end;
}

}  // namespace msda
