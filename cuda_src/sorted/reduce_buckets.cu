// Last kernel of the sorted backward: a warp sums a bucket in shared memory, in a fixed order, and writes the bucket's value
// vectors of the gradient, each once, in value's dtype. Of a bucket with very many contributions it lists chunks, which warps
// without work take; the warp that ends last adds up their sums, in the order of the chunks.
#include "common/block_size.cuh"
#include "sorted/batches.cuh"
#include "sorted/chunk_queue.cuh"

namespace msda {

// Sums contributions [from, to) of a bucket: all of them, to grad_value, or those of a chunk, to `chunk_sums`. `first_slice` is
// that of the lane's run among the first 32.
__device__ __forceinline__ void reduce_bucket(
        warp_bucket& shared, const reduction_arrays& arrays, const bucket_view& bucket, const bucket_slice& first_slice,
        count_t from, count_t to, acc_t* chunk_sums) {
    const int lane_of_warp = threadIdx.x % 32, group = lane_of_warp / config::lanes, lane = lane_of_warp % config::lanes;
    const int keys = (1 << bucket.shift) + 2;
#pragma unroll 1
    for (int tile = 0; tile < channel_tiles; ++tile) {
        const int channel = tile * channel_tile + lane * config::vec;
        const bool idle = config::D % channel_tile != 0 && channel >= config::D;
        const value_t* grad_output = bucket.grad_output(arrays) + channel;
        lane_sum zero;
        set_to_zero(zero);
#pragma unroll 4
        for (int key = group; key < keys; key += groups_per_warp) store_sum(shared.sum[key], lane, zero);

        // 32 runs at a time, and of those a batch at a time.
        count_t before = 0;         // contributions of the runs before
#pragma unroll 1
        for (unsigned first_run = 0; first_run < arrays.runs && before < to; first_run += 32) {
            const bucket_slice slice = first_run == 0 ? first_slice : bucket.slice(arrays, first_run + lane_of_warp);
            lane_run run = {first_run, inclusive_sum(slice.count()), slice.end, slice.inside};
            run.to_run -= run.end;
            const unsigned all = __shfl_sync(0xffffffffu, run.end, 31), last = (unsigned)min(to - before, (count_t)all);
            unsigned i = from > before ? (unsigned)min(from - before, (count_t)last) : 0;
            before += all;
#pragma unroll 1
            for (; i < last; i += batch_size) {
                const unsigned end = min(i + batch_size, last);
                if constexpr (sorts_batches) {
                    sort_batch(shared, arrays, bucket, run, grad_output, i, end, keys);
                    add_batch(shared, grad_output, end - i, idle);
                } else {
                    add_unsorted_batch(shared, arrays, bucket, run, grad_output, i, end, keys, idle);
                }
            }
        }
        __syncwarp();

        value_t* grad_value = bucket.grad_value(arrays) + channel;
#pragma unroll 4
        for (int pixel = group; pixel < bucket.pixels; pixel += groups_per_warp) {
            lane_sum sum;
            load_sum(shared.sum[1 + pixel], lane, sum);
            if (chunk_sums) store_sum(chunk_sums + (long long)pixel * padded_channels + tile * channel_tile, lane, sum);
            else if (!idle) store_value_vector(grad_value + (long long)pixel * vector_pitch, sum);
        }
        __syncwarp();
    }
}

// Adds up the sums of all chunks of a bucket, in their order, and writes grad_value.
__device__ __forceinline__ void add_chunks(
        const reduction_arrays& arrays, const bucket_view& bucket, const acc_t* chunk_sums, unsigned chunks) {
    const int group = threadIdx.x % 32 / config::lanes, lane = threadIdx.x % config::lanes;
#pragma unroll 1
    for (int pixel = group; pixel < bucket.pixels; pixel += groups_per_warp)
#pragma unroll 1
        for (int tile = 0; tile < channel_tiles; ++tile) {
            const int channel = tile * channel_tile + lane * config::vec;
            const acc_t* of_pixel = chunk_sums + (long long)pixel * padded_channels + tile * channel_tile;
            lane_sum sum;
            set_to_zero(sum);
#pragma unroll 4
            for (unsigned chunk = 0; chunk < chunks; ++chunk) {
                lane_sum of_chunk;
                load_sum(of_pixel + chunk * chunk_sum_size, lane, of_chunk);
#pragma unroll
                for (int v = 0; v < config::vec; ++v) sum[v] += of_chunk[v];
            }
            if (config::D % channel_tile == 0 || channel < config::D)
                store_value_vector(bucket.grad_value(arrays) + (long long)pixel * vector_pitch + channel, sum);
        }
}

// `queue` is null where no bucket can be so large that it is split.
extern "C" __global__ void __launch_bounds__(threads_per_block, config::min_blocks) msda_reduce_buckets(
        const value_t* __restrict__ grad_output, const contribution* __restrict__ contributions,
        const unsigned short* __restrict__ segment_starts, value_t* __restrict__ grad_value,
        const bucket_table* __restrict__ table, long long S, long long Q, long long runs, long long capacity,
        long long first_head, long long heads, long long first_pixel, long long buckets, chunk_queue* queue,
        acc_t* chunk_sums, long long chunk_size) {
    MSDA_SHARED_MEMORY(shared_memory);
    warp_bucket& shared = reinterpret_cast<warp_bucket*>(shared_memory)[threadIdx.x / 32];
    const reduction_arrays arrays = {grad_output, contributions, segment_starts, grad_value, table, S, Q, runs, capacity,
                                     first_head, heads, first_pixel, buckets};
    const unsigned of_head = (unsigned)buckets, blocks = (of_head + config::warps - 1) / config::warps;
    const unsigned heads_in_launch = gridDim.x / blocks;
    // All heads of the last buckets first: coarse levels come last and have the most contributions per pixel, and the heads
    // of a pixel are neighbours in memory (docs/performance/decisions.md#sorted-bucket-order).
    const unsigned number = (blocks - 1 - blockIdx.x / heads_in_launch) * config::warps + threadIdx.x / 32;
    unsigned head = blockIdx.x % heads_in_launch, next_listed = 0, listed_end = 0, place = 0;
    bucket_view bucket = bucket_at(arrays, head, number);
    bucket_slice first_slice = {0, 0, 0};
    count_t from = 0, to = ~(count_t)0;
    bool whole = bucket.pixels > 0;
    if (whole) first_slice = bucket.slice(arrays, threadIdx.x % 32);
    if (queue && whole) {
        const count_t count = count_contributions(arrays, bucket, first_slice), size = (count_t)chunk_size;
        if (count > 2 * size) {
            const unsigned chunks = (unsigned)((count + size - 1) / size);
            whole = false;
            next_listed = list_chunks(queue, head * of_head + number, chunks);
            listed_end = next_listed + chunks;
        }
    }
#pragma unroll 1
    for (;;) {
        if (!whole) {
            // One warp of a block looks for the chunks of others: all of them would wait for the queue.
            if (!queue || (threadIdx.x >= 32 && next_listed == listed_end) || !take_chunk(queue, next_listed, listed_end, place)) return;
            const unsigned of_chunk = __ldcg(&queue->chunk[place].bucket);
            bucket = bucket_at(arrays, of_chunk / of_head, of_chunk % of_head);
            first_slice = bucket.slice(arrays, threadIdx.x % 32);
            from = __ldcg(&queue->chunk[place].number) * (count_t)chunk_size;
            to = from + (count_t)chunk_size;
        }
        reduce_bucket(
            shared, arrays, bucket, first_slice, from, to, whole ? nullptr : chunk_sums + place * chunk_sum_size);
        if (!whole) {
            const unsigned first = __ldcg(&queue->chunk[place].first), chunks = __ldcg(&queue->chunk[place].chunks);
            __threadfence();
            __syncwarp();
            unsigned done = 0;
            if (threadIdx.x % 32 == 0) done = atomicAdd(&queue->chunk[first].done, 1u);
            if (__shfl_sync(0xffffffffu, done, 0) == chunks - 1) {
                observe(&queue->chunk[first].done);
                add_chunks(arrays, bucket, chunk_sums + first * chunk_sum_size, chunks);
            }
        }
        whole = false;
    }
}

}  // namespace msda
