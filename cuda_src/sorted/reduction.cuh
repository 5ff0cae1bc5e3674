// What both reductions need: a bucket with all that a sum over it reads and writes.
#pragma once
#include "common/channels.cuh"
#include "sorted/buckets.cuh"
#include "sorted/contribution.cuh"

namespace msda {

constexpr int vector_pitch = config::M * config::D;                 // elements from a pixel or query to the next
constexpr int padded_channels = channel_tiles * channel_tile;       // D, rounded up to whole channel tiles

using sum_vector = vector<acc_t, config::vec>;

struct bucket_view {
    const contribution* contributions;      // of run 0
    const unsigned short* segment_starts;   // of run 0, at the bucket's first segment
    int pitch;                              // of segment_starts
    long long runs, capacity;               // sorted runs of the head; contributions from one run to the next
    const value_t* grad_output;             // of query 0, of this image and head
    value_t* grad_value;                    // of the bucket's pixel 0, at this head
    int pixels;                             // that value has; 0 where there is no such bucket
};

// Bucket `number` of the slab and of head `head_in_launch`, from the parameters of a kernel. A launch works on some of the
// `heads` of all images, from `first_head` on, and on the slab of `pixels` from `first_pixel` on: a multiple of
// config::bucket_size, which may go beyond S.
__device__ __forceinline__ bucket_view bucket_at(
        const value_t* grad_output, const contribution* contributions, const unsigned short* segment_starts,
        value_t* grad_value, long long S, long long Q, long long runs, long long capacity, long long first_head,
        long long heads, long long first_pixel, long long pixels, unsigned head_in_launch, unsigned number) {
    const unsigned buckets = (unsigned)(pixels / config::bucket_size);
    const long long head = first_head + head_in_launch;
    const long long first = first_pixel + (long long)number * config::bucket_size;
    const long long image = head / config::M, m = head % config::M;
    bucket_view bucket;
    bucket.pitch = segments_pitch((int)buckets);
    bucket.contributions = contributions + head_in_launch * runs * capacity;
    bucket.segment_starts = segment_starts + head_in_launch * runs * bucket.pitch + 2 * number;
    bucket.runs = runs;
    bucket.capacity = capacity;
    bucket.grad_output = grad_output + (image * Q * config::M + m) * config::D;
    bucket.grad_value = grad_value + ((image * S + first) * config::M + m) * config::D;
    bucket.pixels = head < heads && number < buckets && first < S
                        ? (int)min(S - first, (long long)config::bucket_size)
                        : 0;
    return bucket;
}

// The bucket's slice of a run; an empty one past the last run.
__device__ __forceinline__ bucket_slice slice_of(const bucket_view& bucket, long long run) {
    bucket_slice empty = {0, 0, 0};
    return run < bucket.runs ? load_slice(bucket.segment_starts + run * bucket.pitch) : empty;
}

// Asks for a vector of grad_output before it is needed (docs/performance/decisions.md#sorted-prefetch-grad-output).
__device__ __forceinline__ void prefetch([[maybe_unused]] const value_t* address) {
#if MSDA_PTX
    asm volatile("prefetch.global.L2 [%0];" :: "l"(address));
#endif
}

// Writes a lane's channels of a pixel. As a streaming store, so that grad_value does not push what is still read out of the
// L2 cache (docs/performance/decisions.md#sorted-streaming-stores).
__device__ __forceinline__ void store_value_vector(
        const bucket_view& bucket, int pixel, int channel, const acc_t (&sum)[config::vec]) {
    channel_vector out;
#pragma unroll
    for (int v = 0; v < config::vec; ++v) narrow(sum[v], out.element[v]);
    value_t* target = bucket.grad_value + (long long)pixel * vector_pitch + channel;
    __stcs(reinterpret_cast<decltype(out.word)*>(target), out.word);
}

}  // namespace msda
