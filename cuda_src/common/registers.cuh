// Keeps numbers in registers where the compiler would compute them again.
#pragma once
#include "common/platform.cuh"

namespace msda {

// A 64-bit address, pointer or number: the compiler may not compute it again at each use.
template <typename T>
__device__ __forceinline__ void keep_in_register([[maybe_unused]] T& address) {
#if MSDA_PTX
    asm volatile("" : "+l"(address));
#endif
}
__device__ __forceinline__ void keep_in_register([[maybe_unused]] int& number) {
#if MSDA_PTX
    asm volatile("" : "+r"(number));
#endif
}

}  // namespace msda
