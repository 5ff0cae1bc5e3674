// Buckets, segments and sorted runs: how the sorted backward lays out its work between its kernels.
//
// A contribution is what a sample adds to two horizontally neighbouring pixels: its upper neighbours are one contribution,
// its lower neighbours another. At an edge of the level only one of the two pixels may be left.
// A bucket is `config::bucket_size` consecutive pixels of one head and image. All contributions to a bucket are summed
// together, so each value vector of the gradient is written once and nothing is added atomically.
// A sorted run is the contributions of consecutive samples of one head, sorted by segment. A segment per bucket holds what
// stays inside the bucket; between the segments of two buckets lies one of pairs with a pixel in each.
//
//     segment           0            1            2            3            4        ...      2B
//     holds          -1 and 0    bucket 0      0 and 1     bucket 1      1 and 2     ...   B-1 and B
//                  +-----------+------------+-----------+------------+-----------+--     -+-----------+
//     sorted run 0 | c  c      | c  c  c  c | c         | c  c  c    | c  c  c   |  ...   | c         |
//     sorted run 1 |           | c  c       | c  c  c   | c  c  c  c |           |  ...   |           |
//     ...          +-----------+------------+-----------+------------+-----------+--     -+-----------+
//                  \______ slice of bucket 0 __________/
//                                           \______ slice of bucket 1 __________/
//
// Bucket b reads segments 2b, 2b + 1 and 2b + 2 of each run, which follow each other in memory. Of a pair in segment 2b it
// adds the second pixel, of a pair in segment 2b + 2 the first. Buckets -1 and B belong to the slabs before and after.
//
//     contributions  [head][run][capacity]      the end of a run is unused
//     segment_starts [head][run][2B + 2]        16 bits each; the last one is where segment 2B ends
//
// The kernels: bucket_sort.cu writes the runs, and reduce_buckets.cu sums each bucket.
#pragma once
#include "common/config.cuh"

namespace msda {

// Elements of `segment_starts` from one run to the next: a run has 2 * buckets + 1 segments.
__device__ __forceinline__ int segments_pitch(int buckets) { return 2 * buckets + 2; }

// Where the contributions to a bucket lie in a run. Of those in [begin, inside) the first pixel is in the bucket before.
struct bucket_slice {
    unsigned begin, inside, end;
    __device__ __forceinline__ unsigned count() const { return end - begin; }
};

// `segment_starts` points to the start of segment 2b.
__device__ __forceinline__ bucket_slice load_slice(const unsigned short* segment_starts) {
    const unsigned* pairs = reinterpret_cast<const unsigned*>(segment_starts);
    const unsigned starts = __ldg(pairs), ends = __ldg(pairs + 1);
    return {starts & 0xffff, starts >> 16, ends >> 16};
}

// Buckets of a slab come in regions of buckets of one size: where a level has many contributions per pixel, its buckets are
// small, so that all have about as many contributions (docs/performance/decisions.md#sorted-bucket-size).
enum : int { max_regions = 32 };
enum : int { no_bucket = 0x7fffffff };

__device__ constexpr int log2_of(int power_of_two) { return power_of_two > 1 ? 1 + log2_of(power_of_two / 2) : 0; }

struct alignas(16) bucket_region {
    int first_bucket;
    int first_pixel, end_pixel;     // in the slab
    int shift;                      // a bucket has 1 << shift pixels, the last one of a region maybe fewer
};
// One load of 16 bytes.
__device__ __forceinline__ bucket_region as_region(uint4 loaded) {
    union { uint4 word; bucket_region region; } whole;
    whole.word = loaded;
    return whole.region;
}
struct bucket_table {
    bucket_region region[max_regions];      // by their first pixel; unused ones begin after all buckets
    unsigned buckets, padding[3];           // of all regions
};

// A chunk of a bucket of very many contributions. Its sums in global memory have the number that it has in the queue.
struct alignas(16) bucket_chunk {
    unsigned bucket;            // head in the launch * buckets + number of the bucket
    unsigned number, chunks;    // of this chunk in its bucket, and of all chunks of the bucket
    unsigned first;             // place of the bucket's chunk 0 in the queue
    unsigned ready, claimed;    // whether what is above is written; how many warps have asked for the chunk
    unsigned done, padding;     // in chunk 0: chunks of the bucket whose sums are written
};

// Chunks that warps have listed and that other warps may take, in this order.
struct chunk_queue {
    unsigned listed, taken, padding[2];
    bucket_chunk chunk[1];      // as many as there can be
};

static_assert(sizeof(bucket_table) == 528 && sizeof(bucket_chunk) == 32 && sizeof(chunk_queue) == 16 + 32,
              "the planner and the kernels disagree");

}  // namespace msda
