// Gradient of the reference points: what each head's samples add to it, summed over heads, and over levels where those
// share a reference point.

extern "C" __global__ void msda_references(
        const msda_acc* __restrict__ parts, msda_reference* __restrict__ grad_references, long long count) {
    const long long stride = (long long)gridDim.x * blockDim.x;
    for (long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x; i < count; i += stride) {
        const long long query = i / (MSDA_REFERENCES * MSDA_FRONT);
        const int at = (int)(i - query * (MSDA_REFERENCES * MSDA_FRONT));
        const msda_acc* of_query = parts + query * (MSDA_M * MSDA_L * MSDA_FRONT) + at;
        msda_acc sum = 0;
        for (int m = 0; m < MSDA_M; ++m)
            for (int l = 0; l < MSDA_L / MSDA_REFERENCES; ++l) sum += of_query[(m * MSDA_L + l) * MSDA_FRONT];
        msda_store(sum, grad_references[i]);
    }
}
