// After a backward that sums with atomics: casts the float32 gradient of value to value's 16-bit dtype.
#include "common/types.cuh"
#include "common/vectors.cuh"

namespace msda {

// Four elements per thread and step; the first threads cast the last `count % 4` one by one.
extern "C" __global__ void msda_cast(
        const float* __restrict__ source, value_t* __restrict__ target, long long count) {
    const long long stride = (long long)gridDim.x * blockDim.x;
    for (long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x; i < count / 4; i += stride) {
        const float4 x = __ldg(reinterpret_cast<const float4*>(source) + i);
        vector<value_t, 4> y;
        narrow(x.x, y.element[0]);
        narrow(x.y, y.element[1]);
        narrow(x.z, y.element[2]);
        narrow(x.w, y.element[3]);
        reinterpret_cast<uint2*>(target)[i] = y.word;
    }
    if (blockIdx.x == 0 && threadIdx.x < count % 4) {
        const long long i = count - 1 - threadIdx.x;
        narrow(source[i], target[i]);
    }
}

}  // namespace msda
