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
// The kernels: bucket_sort.cu writes the runs, split_buckets.cu lists the chunks of very large buckets, and warp_reduce.cu
// or block_reduce.cu sums each bucket.
#pragma once
#include "common/config.cuh"

namespace msda {

// Segments of a run, and elements from one run to the next in `segment_starts`.
__device__ __forceinline__ int segments_of(int buckets) { return 2 * buckets + 1; }
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

// A bucket of many contributions is summed in chunks, by a block each. The block that ends last adds up their sums.
struct alignas(16) bucket_chunk {
    unsigned bucket;            // head_in_launch * buckets + number of the bucket
    unsigned number, chunks;    // of this chunk in its bucket, and of all chunks of the bucket
    unsigned first;             // position of the bucket's chunk 0 in the list, and of its sums
};

// What the list of chunks says of all buckets of a launch.
struct chunk_counts {
    unsigned listed, padding[3];    // chunks in the list
    struct {
        unsigned chunks, done;
    } of_bucket[1];                 // as many as the launch has buckets
};

static_assert(sizeof(bucket_chunk) == 16 && sizeof(chunk_counts) == 16 + 8, "the planner and the kernels disagree");

}  // namespace msda
