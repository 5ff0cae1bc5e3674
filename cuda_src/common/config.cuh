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
    enum : bool { wide_index = MSDA_INDEX_64 };   // offsets and counts inside one image need 64 bits

    // ---- sizes of the problem
    enum : int { L = MSDA_L };    // levels
    enum : int { P = MSDA_P };    // points per level; 0 where they differ
    enum : int { M = MSDA_M };    // heads
    enum : int { D = MSDA_D };    // channels per head
    static __device__ constexpr int points(int level) {     // points of each level; used where P is 0
#ifdef MSDA_POINTS
        constexpr int of[L] = {MSDA_POINTS};
        return of[level];
#else
        return P;
#endif
    }
    enum : decltype(MSDA_STRIDE) { pixel_stride = MSDA_STRIDE };   // elements from a value vector to that of the next pixel
    enum : bool { levels_on_device = MSDA_LEVELS_ON_DEVICE };     // shapes and starts are device arrays, unchecked

    // ---- variant of the operator
    enum : bool { nearest = MSDA_NEAREST };       // one pixel per sample, its index clamped to the level, not four
    enum : bool { border = MSDA_BORDER };         // padding_mode of grid_sample
    enum : bool { align_corners = MSDA_ALIGN_CORNERS };   // of grid_sample
    enum : bool { ragged = MSDA_PADDED };         // only the first `lengths[n]` queries are valid; the rest get zeros
    enum : bool { pixel_locations = MSDA_PIXELS };    // locations are in pixels of their level, not normalised

    // ---- fused front end: samples come as offsets from a reference point, and as logits
    enum : int { reference_coordinates = MSDA_FRONT };    // 0: not fused; 2: points (x, y); 4: boxes (x, y, w, h)
    enum : int { reference_levels = MSDA_REFERENCES };    // reference points per query: one per level, or one
    enum : bool { packed = MSDA_PACKED };         // offsets and logits of a query and head follow each other in one array

    // ---- how a warp is divided
    enum : int { vec = MSDA_VEC };                // channels that a lane moves at once
    enum : int { lanes = MSDA_LANES };            // lanes that share the channels of one (n, q, m)
    enum : int { lane_groups = MSDA_SPLIT };      // groups of `lanes` lanes that share the samples of one (n, q, m)
    enum : int { heads_per_warp = MSDA_HEADS };   // neighbouring heads that a warp works on at a time
    enum : int { chunk = MSDA_CHUNK };            // samples of a query in shared memory at a time
    enum : int { unroll = MSDA_UNROLL };          // samples whose value vectors are loaded before the first is used

    // ---- how a block is divided
    enum : int { warps = MSDA_WARPS };
    enum : int { query_tiles = MSDA_ROUNDS };     // tiles of queries that a warp takes one after the other
    enum : int { min_blocks = MSDA_MIN_BLOCKS };  // blocks that should fit on a multiprocessor: caps the registers
    enum : int { tile_rows = MSDA_BAND };         // rows of a patch of pixels that is a tile; 0: queries in order
    enum : int { shared_bytes = MSDA_SHARED_BYTES };  // of dynamic shared memory, as the planner computes it

    // ---- forward
    enum : bool { warp_independent = MSDA_ALONE };    // the warps of a block never wait for each other
    enum : bool { levels_in_registers = MSDA_LEVELS_IN_REGISTERS };   // else a copy per warp in shared memory
    enum : int { samples_per_load = MSDA_TOGETHER };  // samples that a lane loads at once, with vectorised loads
    // Neighbours outside the level get a weight of zero, not zeros as their values. Only with `warp_independent`, all
    // samples of a query in one chunk, and locations that are not clamped.
    enum : bool { masked_neighbours = MSDA_SCREENED };

    // ---- backward
    enum : bool { grad_value = MSDA_GRAD_VALUE };
    enum : bool { grad_locations = MSDA_GRAD_LOCATIONS };
    enum : bool { grad_weights = MSDA_GRAD_WEIGHTS };
    enum : bool { grad_references = MSDA_GRAD_REFERENCES };
    enum : int { aggregation_bits = MSDA_MERGE };     // bits of the sort key; 0: no block-level aggregation
    enum : int { paired_tiles = MSDA_JOINED };        // query tiles whose dot products are made together, by lanes
                                                            // with so many times `vec` channels; 1 or 2

    // ---- sorted backward
    enum : int { bucket_size = MSDA_ROWS };       // value vectors of a bucket: a power of two
};

}  // namespace msda
