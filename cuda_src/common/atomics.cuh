// Atomic additions to grad_value, in the L2 cache.
#pragma once
#include "common/channels.cuh"

namespace msda {

// Bytes from a value vector of grad_value, in the dtype of its sums, to that of the next pixel.
enum : address_t { grad_value_pitch = config::M * config::D * sizeof(acc_t) };

// What other blocks may change by atomic additions.
__device__ __forceinline__ unsigned atomic_load(unsigned* source) {
#if MSDA_PTX
    unsigned x;
    asm volatile("ld.relaxed.gpu.global.u32 %0, [%1];" : "=r"(x) : "l"(source) : "memory");
    return x;
#else
    return atomicAdd(source, 0u);
#endif
}

// Adds contiguous channels: from sm_90 on by one vector reduction, elsewhere by an atomic addition per channel. (Predicated in
// inline PTX or not, the compiler jumps around it.)
template <typename T, int N>
__device__ __forceinline__ void atomic_add_channels(address_t target, const T (&x)[N]) {
#if MSDA_PTX && __CUDA_ARCH__ >= 900
    if constexpr (is_same<T, float>::value && N == 4) {
        asm volatile("red.global.add.v4.f32 [%0], {%1, %2, %3, %4};"
                     :: "l"(target), "f"(x[0]), "f"(x[1]), "f"(x[2]), "f"(x[3]));
    } else if constexpr (is_same<T, float>::value && N == 2) {
        asm volatile("red.global.add.v2.f32 [%0], {%1, %2};" :: "l"(target), "f"(x[0]), "f"(x[1]));
    } else
#endif
    for (int v = 0; v < N; ++v) atomicAdd((T*)target + v, x[v]);
}

}  // namespace msda
