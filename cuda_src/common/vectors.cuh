// Vectors: a few elements that are loaded and stored by one instruction.
#pragma once
#include "common/dtypes.cuh"

namespace msda {

template <int bytes> struct vector_word;
template <> struct vector_word<16> { using type = uint4; };
template <> struct vector_word<8> { using type = uint2; };
template <> struct vector_word<4> { using type = unsigned; };
template <> struct vector_word<2> { using type = unsigned short; };

template <typename T, int N>
union vector {
    typename vector_word<sizeof(T) * N>::type word;
    T element[N];
    unsigned pair[(sizeof(T) * N + 3) / 4];   // two 16-bit elements each
    __device__ __forceinline__ vector() {}
};

template <typename T, int N, typename A>
__device__ __forceinline__ void unpack(const vector<T, N>& v, A (&x)[N]) {
#pragma unroll
    for (int i = 0; i < N; ++i) x[i] = widen(v.element[i]);
}

// Pairs of 16-bit elements straight from their register. Taken one by one, each would cost a shift or a move as well, and
// instructions limit the 16-bit forward (docs/performance/decisions.md#forward-16-bit-pair-conversion).
template <int N>
__device__ __forceinline__ void unpack(const vector<float16, N>& v, float (&x)[N]) {
#pragma unroll
    for (int i = 0; i + 1 < N; i += 2) {
#if MSDA_PTX
        asm("{ .reg .b16 low, high; mov.b32 {low, high}, %2; cvt.f32.f16 %0, low; cvt.f32.f16 %1, high; }"
            : "=f"(x[i]), "=f"(x[i + 1]) : "r"(v.pair[i / 2]));
#else
        x[i] = widen(v.element[i]);
        x[i + 1] = widen(v.element[i + 1]);
#endif
    }
    if (N % 2) x[N - 1] = widen(v.element[N - 1]);
}

template <int N>
__device__ __forceinline__ void unpack(const vector<bfloat16, N>& v, float (&x)[N]) {
#pragma unroll
    for (int i = 0; i + 1 < N; i += 2) {
        x[i] = __uint_as_float(v.pair[i / 2] << 16);
        x[i + 1] = __uint_as_float(v.pair[i / 2] & 0xffff0000u);
    }
    if (N % 2) x[N - 1] = widen(v.element[N - 1]);
}

}  // namespace msda
