// The configuration of one compiled kernel: every choice and size that is fixed at compile time, as one struct.
//
// The planner passes each as a macro; this file is the only one that reads them. What follows from these members is a
// `constexpr` in the header of its subject.
#pragma once
#include "common/dtypes.cuh"

namespace msda {

template <int is_float16, int is_bfloat16, int is_float64>
using dtype_of =
    select<is_float16 != 0, float16, select<is_bfloat16 != 0, bfloat16, select<is_float64 != 0, double, float>>>;

struct config {
    // ---- dtypes: float16, bfloat16, float or double
    using value_t = dtype_of<MSDA_VALUE_F16, MSDA_VALUE_BF16, MSDA_VALUE_F64>;    // of output and grad_output, too
    using location_t = dtype_of<MSDA_LOCATION_F16, MSDA_LOCATION_BF16, MSDA_LOCATION_F64>;    // of weights, too
    using reference_t = dtype_of<MSDA_REFERENCE_F16, MSDA_REFERENCE_BF16, MSDA_REFERENCE_F64>;
    static constexpr bool wide_index = MSDA_INDEX_64;   // offsets and counts inside one image need 64 bits

    // ---- sizes of the problem
    static constexpr int L = MSDA_L;    // levels
    static constexpr int P = MSDA_P;    // points per level; 0 where they differ
    static constexpr int M = MSDA_M;    // heads
    static constexpr int D = MSDA_D;    // channels per head
#ifdef MSDA_POINTS
    static constexpr int points[L] = {MSDA_POINTS};     // points of each level; used where P is 0
#else
    static constexpr int points[L] = {};
#endif
    static constexpr auto pixel_stride = MSDA_STRIDE;   // elements from a value vector to that of the next pixel
    static constexpr bool levels_on_device = MSDA_LEVELS_ON_DEVICE;     // shapes and starts are device arrays, unchecked

    // ---- variant of the operator
    static constexpr bool nearest = MSDA_NEAREST;       // one pixel per sample, its index clamped to the level, not four
    static constexpr bool border = MSDA_BORDER;         // padding_mode of grid_sample
    static constexpr bool align_corners = MSDA_ALIGN_CORNERS;   // of grid_sample
    static constexpr bool ragged = MSDA_PADDED;         // only the first `lengths[n]` queries are valid; the rest get zeros
    static constexpr bool pixel_locations = MSDA_PIXELS;    // locations are in pixels of their level, not normalised

    // ---- fused front end: samples come as offsets from a reference point, and as logits
    static constexpr int reference_coordinates = MSDA_FRONT;    // 0: not fused; 2: points (x, y); 4: boxes (x, y, w, h)
    static constexpr int reference_levels = MSDA_REFERENCES;    // reference points per query: one per level, or one
    static constexpr bool packed = MSDA_PACKED;         // offsets and logits of a query and head follow each other in one array

    // ---- how a warp is divided
    static constexpr int vec = MSDA_VEC;                // channels that a lane moves at once
    static constexpr int lanes = MSDA_LANES;            // lanes that share the channels of one (n, q, m)
    static constexpr int lane_groups = MSDA_SPLIT;      // groups of `lanes` lanes that share the samples of one (n, q, m)
    static constexpr int heads_per_warp = MSDA_HEADS;   // neighbouring heads that a warp works on at a time
    static constexpr int chunk = MSDA_CHUNK;            // samples of a query in shared memory at a time
    static constexpr int unroll = MSDA_UNROLL;          // samples whose value vectors are loaded before the first is used

    // ---- how a block is divided
    static constexpr int warps = MSDA_WARPS;
    static constexpr int query_tiles = MSDA_ROUNDS;     // tiles of queries that a warp takes one after the other
    static constexpr int min_blocks = MSDA_MIN_BLOCKS;  // blocks that should fit on a multiprocessor: caps the registers
    static constexpr int tile_rows = MSDA_BAND;         // rows of a patch of pixels that is a tile; 0: queries in order
    static constexpr int shared_bytes = MSDA_SHARED_BYTES;  // of dynamic shared memory, as the planner computes it

    // ---- forward
    static constexpr bool warp_independent = MSDA_ALONE;    // the warps of a block never wait for each other
    static constexpr bool levels_in_registers = MSDA_LEVELS_IN_REGISTERS;   // else a copy per warp in shared memory
    static constexpr int samples_per_load = MSDA_TOGETHER;  // samples that a lane loads at once, with vectorised loads
    // Neighbours outside the level get a weight of zero, not zeros as their values. Only with `warp_independent`, all
    // samples of a query in one chunk, and locations that are not clamped.
    static constexpr bool masked_neighbours = MSDA_SCREENED;

    // ---- backward
    static constexpr bool grad_value = MSDA_GRAD_VALUE;
    static constexpr bool grad_locations = MSDA_GRAD_LOCATIONS;
    static constexpr bool grad_weights = MSDA_GRAD_WEIGHTS;
    static constexpr bool grad_references = MSDA_GRAD_REFERENCES;
    static constexpr int aggregation_bits = MSDA_MERGE;     // bits of the sort key; 0: no block-level aggregation
    static constexpr int paired_tiles = MSDA_JOINED;        // query tiles whose dot products are made together, by lanes
                                                            // with so many times `vec` channels; 1 or 2

    // ---- sorted backward
    static constexpr int bucket_size = MSDA_ROWS;       // value vectors of a bucket: a power of two
};

}  // namespace msda
