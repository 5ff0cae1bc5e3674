// The configuration of one compiled kernel: every choice and size that is fixed at compile time, as one struct.
//
// cupy_msda/cuda/kernels.py writes this struct for each specialisation, with the members of that kernel and no others, and
// leaves this one out. Here is what each member means, with the values of an example for editors that parse the sources.
// What follows from these members is a constant in the header of its subject. Numbers are enumerators, because NVRTC gives
// every `constexpr` variable memory on the device.
#pragma once
#include "common/dtypes.cuh"

namespace msda {

struct config {
    // ---- dtypes: float16, bfloat16, float or double
    using value_t = float;                      // of output and grad_output, too
    using location_t = float;                   // of weights, too
    using reference_t = float;
    enum : bool { wide_index = false };         // offsets and counts inside one image need 64 bits

    // ---- sizes of the problem
    enum : int { L = 4 };                       // levels
    enum : int { P = 4 };                       // points per level; 0 where they differ
    enum : int { M = 8 };                       // heads
    enum : int { D = 32 };                      // channels per head
    static __device__ constexpr int points(int level) { return P; }    // points of each level; used where P is 0
    enum : long long { pixel_stride = 256 };    // elements from a value vector to that of the next pixel; int where it fits

    // ---- variant of the operator
    enum : bool { nearest = false };            // one pixel per sample, its index clamped to the level, not four
    enum : bool { border = false };             // padding_mode of grid_sample
    enum : bool { align_corners = false };      // of grid_sample
    enum : bool { ragged = false };             // only the first `lengths[n]` queries are valid; the rest get zeros
    enum : bool { pixel_locations = false };    // locations are in pixels of their level, not normalised

    // ---- fused front end: samples come as offsets from a reference point, and as logits
    enum : int { reference_coordinates = 0 };   // 0: not fused; 2: points (x, y); 4: boxes (x, y, w, h)
    enum : int { reference_levels = 0 };        // reference points per query: one per level, or one
    enum : bool { packed = false };             // offsets and logits of a query and head follow each other in one array

    // ---- how a warp is divided
    enum : int { vec = 4 };                     // channels that a lane moves at once
    enum : int { lanes = 8 };                   // lanes that share the channels of one (n, q, m)
    enum : int { lane_groups = 1 };             // groups of `lanes` lanes that share the samples of one (n, q, m)
    enum : int { heads_per_warp = 1 };          // neighbouring heads that a warp works on at a time
    // Samples of a query in shared memory at a time. In bucket_sort, samples that a warp sorts; in reduce_buckets, contributions
    // of a batch.
    enum : int { chunk = 16 };
    enum : int { unroll = 4 };                  // samples whose value vectors are loaded before the first is used

    // ---- how a block is divided
    enum : int { warps = 8 };
    enum : int { query_tiles = 1 };             // tiles of queries that a warp takes one after the other
    enum : int { min_blocks = 3 };              // blocks that should fit on a multiprocessor: caps the registers
    enum : int { tile_rows = 8 };               // pixel queries: in bands of so many rows; 0: queries in order
    enum : int { shared_bytes = 0 };            // of dynamic shared memory, as the planner computes it

    // ---- forward
    enum : bool { warp_independent = true };    // the warps of a block never wait for each other
    enum : bool { levels_in_registers = false }; // else a copy per warp in shared memory
    // Neighbours outside the level get a weight of zero, not zeros as their values. Only with `warp_independent`, all
    // samples of a query in one chunk, and locations that are not clamped.
    enum : bool { masked_neighbours = false };

    // ---- backward
    enum : bool { grad_value = true };
    enum : bool { grad_locations = true };
    enum : bool { grad_weights = true };
    enum : bool { grad_references = false };
    enum : int { aggregation_bits = 0 };        // bits of the sort key; 0: no block-level aggregation
    enum : int { paired_tiles = 1 };            // query tiles whose dot products are made together, by lanes
                                                // with so many times `vec` channels; 1 or 2

    // ---- sorted backward
    enum : int { bucket_size = 32 };            // value vectors of a bucket, at most: a power of two
    enum : int { smallest_bucket = 4 };         // and at least
    enum : bool { wide_counts = false };        // the contributions to a bucket need 64 bits
};

}  // namespace msda
