// The queue of a reduction: chunks of very large buckets, which warps without work take.
#pragma once
#include "common/atomics.cuh"
#include "common/warp.cuh"
#include "sorted/reduction.cuh"

namespace msda {

// Contributions to a bucket, to all lanes of a warp.
__device__ __forceinline__ count_t count_contributions(
        const reduction_arrays& arrays, const bucket_view& bucket, const bucket_slice& first_slice) {
    count_t count = first_slice.count();
#pragma unroll 4
    for (unsigned run = 32 + threadIdx.x % 32; run < arrays.runs; run += 32) count += bucket.slice(arrays, run).count();
    if constexpr (config::wide_counts) {
#pragma unroll
        for (int mask = 1; mask < 32; mask *= 2) count += __shfl_xor_sync(0xffffffffu, count, mask);
        return count;
    } else {
        return warp_sum(count);
    }
}

// By each lane that reads what other blocks have written before they added to `counter`.
__device__ __forceinline__ void observe(unsigned* counter) {
    atomic_load(counter);
    __threadfence();
}

// Lists the chunks of a bucket. Returns the place of the first one.
__device__ __forceinline__ unsigned list_chunks(chunk_queue* queue, unsigned bucket, unsigned chunks) {
    const unsigned lane = threadIdx.x % 32;
    unsigned first = 0;
    if (lane == 0) first = atomicAdd(&queue->listed, chunks);
    first = __shfl_sync(0xffffffffu, first, 0);
    for (unsigned i = lane; i < chunks; i += 32) {
        bucket_chunk& chunk = queue->chunk[first + i];
        chunk.bucket = bucket;
        chunk.number = i;
        chunk.chunks = chunks;
        chunk.first = first;
        __threadfence();
        atomicAdd(&chunk.ready, 1u);
    }
    __syncwarp();
    return first;
}

// Takes a chunk that no other warp has taken, into `place`: of those that this warp has listed, [next_listed, listed_end), else
// any. Returns whether there is one. A chunk that is not ready is left to the warp that has listed it.
__device__ __forceinline__ bool take_chunk(
        chunk_queue* queue, unsigned& next_listed, unsigned listed_end, unsigned& place) {
    unsigned found = 0;
    if (threadIdx.x % 32 == 0) {
        while (!found && next_listed < listed_end) {
            place = next_listed++;
            found = atomicAdd(&queue->chunk[place].claimed, 1u) == 0;
        }
        while (!found && atomic_load(&queue->taken) < atomic_load(&queue->listed)) {
            place = atomicAdd(&queue->taken, 1u);
            if (place >= atomic_load(&queue->listed)) break;
            found = atomic_load(&queue->chunk[place].ready) && atomicAdd(&queue->chunk[place].claimed, 1u) == 0;
        }
    }
    next_listed = __shfl_sync(0xffffffffu, next_listed, 0);
    place = __shfl_sync(0xffffffffu, place, 0);
    found = __shfl_sync(0xffffffffu, found, 0);
    if (found) observe(&queue->chunk[place].ready);
    return found;
}

}  // namespace msda
