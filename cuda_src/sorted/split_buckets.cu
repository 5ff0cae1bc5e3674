// Between the passes of the sum without atomics by a block a bin: finds the bins of very many parts, and lists their
// pieces, so that no block is left with a bin alone (all samples on one pixel, or a coarse level).
//
// A lane a bin; the warps of a block share the runs. The order of the list depends on which block comes first; what
// each piece holds, and the order in which pieces are added up, do not.
#include "common/launch.cuh"
#include "sorted/buckets.cuh"

namespace msda {

extern "C" __global__ void __launch_bounds__(threads_per_block, resident_blocks) msda_split_buckets(
        const unsigned short* __restrict__ starts, chunk_counts* __restrict__ counts, bucket_chunk* __restrict__ pieces,
        long long runs, long long rows, long long piece) {
    MSDA_SHARED_MEMORY(shared_memory);
    address_t(*warp_sums)[32] = reinterpret_cast<address_t(*)[32]>(shared_memory);
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const unsigned bins = (unsigned)(rows / config::bucket_size), blocks = (bins + 31) / 32;
    const unsigned head_here = blockIdx.x / blocks, number = blockIdx.x % blocks * 32 + lane;
    const int pitch = segments_pitch((int)bins);
    starts += head_here * runs * pitch + 2 * number;
    address_t total = 0;
#pragma unroll 4
    for (long long run = warp; run < runs; run += config::warps)
        if (number < bins) total += load_segment(starts + run * pitch).count();
    warp_sums[warp][lane] = total;
    __syncthreads();
    if (warp != 0 || number >= bins) return;
#pragma unroll
    for (int w = 1; w < config::warps; ++w) total += warp_sums[w][lane];

    const unsigned bin = head_here * bins + number;
    const unsigned of_bin = total > (address_t)piece ? (unsigned)((total + piece - 1) / piece) : 1;
    counts->of_bin[bin].pieces = of_bin;
    counts->of_bin[bin].done = 0;
    if (of_bin == 1) return;
    const unsigned first = atomicAdd(&counts->pieces, of_bin);
    for (unsigned i = 0; i < of_bin; ++i) {
        bucket_chunk one = {bin, i, of_bin, first};
        pieces[first + i] = one;
    }
}

}  // namespace msda
