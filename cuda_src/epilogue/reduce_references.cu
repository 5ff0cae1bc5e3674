// After the backward of a fused call: the gradient of the reference points. Sums the gradients of each query over its
// heads, and over the levels where these share one reference point.
//
//     per_head         [N * Q][M][L][coordinates]                  from the backward kernel
//     grad_references  [N * Q][reference_levels][coordinates]      reference_levels: 1 or L
#include "common/types.cuh"

namespace msda {

using reference_t = config::reference_t;

// A thread per element of grad_references, `count` of them.
extern "C" __global__ void msda_reduce_references(
        const acc_t* __restrict__ per_head, reference_t* __restrict__ grad_references, long long count) {
    constexpr int coordinates = config::reference_coordinates, elements = config::reference_levels * coordinates;
    const long long stride = (long long)gridDim.x * blockDim.x;
    for (long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x; i < count; i += stride) {
        const long long query = i / elements;
        const int element = (int)(i - query * elements);
        const acc_t* of_query = per_head + query * (config::M * config::L * coordinates) + element;
        acc_t sum = 0;
        for (int m = 0; m < config::M; ++m)
            for (int l = 0; l < config::L / config::reference_levels; ++l)
                sum += of_query[(m * config::L + l) * coordinates];
        narrow(sum, grad_references[i]);
    }
}

}  // namespace msda
