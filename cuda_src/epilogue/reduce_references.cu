// Gradient of the reference points: what each head's samples add to it, summed over heads, and over levels where those
// share a reference point.
#include "common/types.cuh"

namespace msda {

extern "C" __global__ void msda_reduce_references(
        const acc_t* __restrict__ parts, config::reference_t* __restrict__ grad_references, long long count) {
    const long long stride = (long long)gridDim.x * blockDim.x;
    for (long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x; i < count; i += stride) {
        const long long query = i / (config::reference_levels * config::reference_coordinates);
        const int at = (int)(i - query * (config::reference_levels * config::reference_coordinates));
        const acc_t* of_query = parts + query * (config::M * config::L * config::reference_coordinates) + at;
        acc_t sum = 0;
        for (int m = 0; m < config::M; ++m)
            for (int l = 0; l < config::L / config::reference_levels; ++l) sum += of_query[(m * config::L + l) * config::reference_coordinates];
        narrow(sum, grad_references[i]);
    }
}

}  // namespace msda
