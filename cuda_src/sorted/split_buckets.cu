// Second kernel of the sorted backward, before the block-level reduction: lists the chunks of buckets that have very many
// contributions (all samples on one pixel, or a coarse level). Several blocks then share such a bucket.
// (docs/performance/decisions.md#sorted-chunks-of-a-bucket)
//
// A lane counts the contributions to one bucket. The warps of a block count in different runs of the same 32 buckets. The
// order of the list depends on which block comes first; what a chunk holds, and the order of their sums, do not.
#include "common/dtypes.cuh"
#include "common/block_size.cuh"
#include "sorted/buckets.cuh"

namespace msda {

extern "C" __global__ void __launch_bounds__(threads_per_block, config::min_blocks) msda_split_buckets(
        const unsigned short* __restrict__ segment_starts, chunk_counts* __restrict__ counts,
        bucket_chunk* __restrict__ list, long long runs, long long pixels, long long contributions_per_chunk) {
    MSDA_SHARED_MEMORY(shared_memory);
    using warp_totals = address_t[config::warps][32];
    static_assert(sizeof(warp_totals) == config::shared_bytes, "the planner and the kernel disagree");
    warp_totals& totals = *reinterpret_cast<warp_totals*>(shared_memory);

    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const unsigned buckets = (unsigned)(pixels / config::bucket_size), blocks = (buckets + 31) / 32;    // per head
    const unsigned head_in_launch = blockIdx.x / blocks, number = blockIdx.x % blocks * 32 + lane;
    const int pitch = segments_pitch((int)buckets);
    segment_starts += head_in_launch * runs * pitch + 2 * number;

    address_t total = 0;
#pragma unroll 4
    for (long long run = warp; run < runs; run += config::warps)
        if (number < buckets) total += load_slice(segment_starts + run * pitch).count();
    totals[warp][lane] = total;
    __syncthreads();
    if (warp != 0 || number >= buckets) return;
#pragma unroll
    for (int w = 1; w < config::warps; ++w) total += totals[w][lane];

    const unsigned bucket = head_in_launch * buckets + number;
    const bool is_split = total > (address_t)contributions_per_chunk;
    const unsigned chunks =
        is_split ? (unsigned)((total + contributions_per_chunk - 1) / contributions_per_chunk) : 1;
    counts->of_bucket[bucket].chunks = chunks;
    counts->of_bucket[bucket].done = 0;
    if (chunks == 1) return;
    const unsigned first = atomicAdd(&counts->listed, chunks);
    for (unsigned i = 0; i < chunks; ++i) {
        bucket_chunk chunk = {bucket, i, chunks, first};
        list[first + i] = chunk;
    }
}

}  // namespace msda
