// Rounds the float32 gradient of a 16-bit value to its dtype.

extern "C" __global__ void msda_round(const float* __restrict__ source, msda_value* __restrict__ target, long long count) {
    const long long stride = (long long)gridDim.x * blockDim.x;
    for (long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x; i < count / 4; i += stride) {
        const float4 x = __ldg(reinterpret_cast<const float4*>(source) + i);
        msda_vector<msda_value, 4> y;
        msda_store(x.x, y.element[0]);
        msda_store(x.y, y.element[1]);
        msda_store(x.z, y.element[2]);
        msda_store(x.w, y.element[3]);
        reinterpret_cast<uint2*>(target)[i] = y.word;
    }
    if (blockIdx.x == 0 && threadIdx.x < count % 4) {
        const long long i = count - 1 - threadIdx.x;
        msda_store(source[i], target[i]);
    }
}
