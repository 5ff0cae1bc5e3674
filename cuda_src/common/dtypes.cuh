// The dtypes of arrays, and the conversions between them and the dtype of the arithmetic (float, or double for double).
//
// 16-bit numbers travel as bits. NVRTC has no cuda_fp16.h without a toolkit, and the arithmetic is never in 16 bits.
#pragma once
#include "common/platform.cuh"

namespace msda {

using address_t = unsigned long long;

struct float16 { unsigned short bits; };
struct bfloat16 { unsigned short bits; };

template <bool condition, typename A, typename B> struct select_type { using type = A; };
template <typename A, typename B> struct select_type<false, A, B> { using type = B; };
template <bool condition, typename A, typename B> using select = typename select_type<condition, A, B>::type;

template <typename A, typename B> struct is_same { enum : bool { value = false }; };
template <typename A> struct is_same<A, A> { enum : bool { value = true }; };

// ---- to the dtype of the arithmetic ------------------------------------------------------------------------

__device__ __forceinline__ float widen(float x) { return x; }
__device__ __forceinline__ double widen(double x) { return x; }
__device__ __forceinline__ float widen(float16 x) {
#if MSDA_PTX
    float y;
    asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits));
    return y;
#else
    const unsigned sign = (unsigned)(x.bits & 0x8000) << 16, magnitude = x.bits & 0x7fff;
    if (magnitude >= 0x7c00) return __uint_as_float(sign | 0x7f800000u | magnitude << 13);
    return __uint_as_float(sign | __float_as_uint(__uint_as_float(magnitude << 13) * 5.192296858534828e33f));  // 2**112
#endif
}
__device__ __forceinline__ float widen(bfloat16 x) { return __uint_as_float((unsigned)x.bits << 16); }

// ---- to the dtype of an array: round to nearest, ties to even -----------------------------------------------

__device__ __forceinline__ void narrow(float x, float& y) { y = x; }
__device__ __forceinline__ void narrow(double x, double& y) { y = x; }
__device__ __forceinline__ void narrow(float x, float16& y) {
#if MSDA_PTX
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
#else
    const unsigned bits = __float_as_uint(x), sign = bits >> 16 & 0x8000, magnitude = bits & 0x7fffffff;
    unsigned result;
    if (magnitude > 0x7f800000u) result = 0x7fff;                              // NaN
    else if (magnitude >= 0x477ff000u) result = 0x7c00;                        // 65520 and more: infinity
    else if (magnitude < 0x38800000u)                                           // subnormal: units of 2**-24
        result = (unsigned)rint(__uint_as_float(magnitude) * 16777216.0f);
    else result = (magnitude - 0x38000000u + 0xfffu + (magnitude >> 13 & 1u)) >> 13;
    y.bits = (unsigned short)(sign | result);
#endif
}
__device__ __forceinline__ void narrow(float x, bfloat16& y) {
#if MSDA_PTX && __CUDA_ARCH__ >= 800
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
#else
    const unsigned bits = __float_as_uint(x);
    y.bits = x != x ? 0x7fff : (unsigned short)((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
#endif
}

}  // namespace msda
