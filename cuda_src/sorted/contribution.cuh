// A contribution: what a sample adds to one or two neighbouring pixels (sorted/buckets.cuh has a picture).
#pragma once
#include "common/types.cuh"

namespace msda {

struct alignas(16) contribution {
    unsigned query;
    unsigned pixel_and_pair;    // 2 * number of the first pixel in its bucket + whether there is a second pixel
    acc_t first, second;        // weights of grad_output for the two pixels
};
static_assert(sizeof(contribution) == 4 * sizeof(acc_t), "the planner and the kernels disagree");

// In vectors of 16 bytes.
__device__ __forceinline__ void copy(const contribution& from, contribution& to) {
#pragma unroll
    for (int i = 0; i < (int)(sizeof(contribution) / 16); ++i)
        reinterpret_cast<uint4*>(&to)[i] = reinterpret_cast<const uint4*>(&from)[i];
}

}  // namespace msda
