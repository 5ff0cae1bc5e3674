// Functions of numbers that CUDA's own headers do not have in this precision or speed.
#pragma once
#include "common/platform.cuh"

namespace msda {

__device__ __forceinline__ float exponential(float x) { return exp2f(x * 1.4426950408889634f); }
__device__ __forceinline__ double exponential(double x) { return exp(x); }

// 1 / x, to the last two bits.
__device__ __forceinline__ float reciprocal(float x) {
#if MSDA_PTX
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
#else
    return 1 / x;
#endif
}
__device__ __forceinline__ double reciprocal(double x) { return 1 / x; }

// The largest number that is not above x.
__device__ __forceinline__ void round_down(int x, float& y) { y = __int2float_rz(x); }
__device__ __forceinline__ void round_down(int x, double& y) { y = x; }

// A product that the compiler does not contract with an addition.
__device__ __forceinline__ float multiply_unfused(float x, float y) { return __fmul_rn(x, y); }
__device__ __forceinline__ double multiply_unfused(double x, double y) { return __dmul_rn(x, y); }

__device__ constexpr int next_power_of_two(int n) { return n <= 1 ? 1 : 2 * next_power_of_two((n + 1) / 2); }
// Bits that the numbers 0 to n - 1 need.
__device__ constexpr int bits_of(int n) { return n <= 1 ? 0 : 1 + bits_of((n + 1) / 2); }

}  // namespace msda
