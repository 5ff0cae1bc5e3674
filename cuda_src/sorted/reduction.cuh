// A bucket with all that a sum over it reads and writes.
#pragma once
#include "common/channels.cuh"
#include "sorted/buckets.cuh"
#include "sorted/contribution.cuh"

namespace msda {

constexpr int vector_pitch = config::M * config::D;                 // elements from a pixel or query to the next
using count_t = select<config::wide_counts, address_t, unsigned>;    // of the contributions to a bucket
constexpr int padded_channels = channel_tiles * channel_tile;       // D, rounded up to whole channel tiles

// The region of bucket `number`, to all lanes of a warp.
__device__ __forceinline__ bucket_region region_of_bucket(const bucket_table* __restrict__ table, unsigned number) {
    const bucket_region mine = as_region(__ldg(reinterpret_cast<const uint4*>(table->region + threadIdx.x % 32)));
    // The last one that begins at the bucket or before.
    const int lane = __popc(__ballot_sync(0xffffffffu, mine.first_bucket <= (int)number)) - 1;
    bucket_region found;
    found.first_bucket = __shfl_sync(0xffffffffu, mine.first_bucket, lane);
    found.first_pixel = __shfl_sync(0xffffffffu, mine.first_pixel, lane);
    found.end_pixel = __shfl_sync(0xffffffffu, mine.end_pixel, lane);
    found.shift = __shfl_sync(0xffffffffu, mine.shift, lane);
    return found;
}

// What a reduction reads and writes: the parameters of its kernel. A launch works on some of the `heads` of all images, from
// `first_head` on, and on the slab of pixels from `first_pixel` on, in at most so many `buckets` per head.
struct reduction_arrays {
    const value_t* grad_output;
    const contribution* contributions;
    const unsigned short* segment_starts;
    value_t* grad_value;
    const bucket_table* table;
    long long S, Q, runs, capacity, first_head, heads, first_pixel, buckets;
};

// A bucket of the slab and of head number `head` of the launch. Addresses are computed where they are needed, from the
// parameters: kept, they would take the registers of the sums.
struct bucket_view {
    unsigned head, number;
    int first, shift;       // its first pixel in the slab; 1 << shift pixels
    int pixels;             // that value has; 0 where there is no such bucket

    // The bucket's slice of a run; an empty one past the last run.
    __device__ __forceinline__ bucket_slice slice(const reduction_arrays& arrays, unsigned run) const {
        bucket_slice empty = {0, 0, 0};
        if (run >= arrays.runs) return empty;
        const long long row = head * arrays.runs + run;
        return load_slice(arrays.segment_starts + row * segments_pitch((int)arrays.buckets) + 2 * number);
    }
    __device__ __forceinline__ const contribution* of_run(const reduction_arrays& arrays, unsigned run) const {
        return arrays.contributions + (head * arrays.runs + run) * arrays.capacity;
    }
    // At this head: of query 0, and of the bucket's pixel 0.
    __device__ __forceinline__ const value_t* grad_output(const reduction_arrays& arrays) const {
        const long long of_all = arrays.first_head + head;
        return arrays.grad_output + (of_all / config::M * arrays.Q * config::M + of_all % config::M) * config::D;
    }
    __device__ __forceinline__ value_t* grad_value(const reduction_arrays& arrays) const {
        const long long of_all = arrays.first_head + head, pixel = of_all / config::M * arrays.S + arrays.first_pixel + first;
        return arrays.grad_value + (pixel * config::M + of_all % config::M) * config::D;
    }
};

// By all lanes of a warp.
__device__ __forceinline__ bucket_view bucket_at(const reduction_arrays& arrays, unsigned head, unsigned number) {
    const bucket_region region = region_of_bucket(arrays.table, number);
    const int first = region.first_pixel + ((int)(number - region.first_bucket) << region.shift);
    const bool exists = arrays.first_head + head < arrays.heads && number < arrays.table->buckets;
    return {head, number, first, region.shift, exists ? min(region.end_pixel - first, 1 << region.shift) : 0};
}

// Asks for a vector of grad_output before it is needed (docs/performance/decisions.md#sorted-prefetch-grad-output).
__device__ __forceinline__ void prefetch([[maybe_unused]] const value_t* address) {
#if MSDA_PTX
    asm volatile("prefetch.global.L2 [%0];" :: "l"(address));
#endif
}

// Writes a lane's channels of a value vector. As a streaming store, so that grad_value does not push what is still read out
// of the L2 cache (docs/performance/decisions.md#sorted-streaming-stores).
__device__ __forceinline__ void store_value_vector(value_t* target, const acc_t (&sum)[config::vec]) {
    channel_vector out;
#pragma unroll
    for (int v = 0; v < config::vec; ++v) narrow(sum[v], out.element[v]);
    __stcs(reinterpret_cast<decltype(out.word)*>(target), out.word);
}

}  // namespace msda
