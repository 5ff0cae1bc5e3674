// The work of a block and its warps: their queries, and what is in shared memory.

// Samples of a query in shared memory, padded to an odd number: the queries of a warp then lie in different banks.
#define MSDA_PITCH (MSDA_CHUNK | 1)

// Where samples are merged, a block holds those of all its rounds.
#if MSDA_MERGE
#define MSDA_HELD (MSDA_WARPS * MSDA_ROUNDS)
#else
#define MSDA_HELD MSDA_WARPS
#endif

struct msda_shared {
    msda_sample samples[MSDA_HELD][MSDA_SLOTS * MSDA_PITCH];
#if MSDA_ALONE && !MSDA_LEVELS_IN_REGISTERS
    msda_level levels[MSDA_WARPS][MSDA_L];   // each warp's own
#elif !MSDA_ALONE
    msda_level levels[MSDA_L];
    msda_index query[MSDA_ROUNDS * MSDA_WARPS * MSDA_QUERIES];   // by msda_query_at
#endif
#if MSDA_MERGE
    alignas(16) unsigned of_warps[MSDA_WARPS];                      // aligned: read 16 bytes at a time, and no more
    unsigned begin[1 << MSDA_MERGE];                                // of each key in `order`; counts at first
    unsigned short order[MSDA_HELD * MSDA_QUERIES * MSDA_CHUNK];    // places in `samples`
#endif
};

// A block works on MSDA_HEADS heads of one image, on MSDA_WARPS * MSDA_ROUNDS groups of MSDA_QUERIES queries.
struct msda_work {
    long long image;    // n
    int m;              // the first head
    msda_index first;   // position of the block's first query
};

// Its first head among those of all images. They are along grid.y and then grid.z, which together may have room for more of
// them than there are. (No division, which was 35 of the 440 instructions before the forward's first row.)
__device__ __forceinline__ unsigned msda_head_of_block() {
    return (blockIdx.z * gridDim.y + blockIdx.y) * MSDA_HEADS;
}

__device__ __forceinline__ msda_work msda_work_of_block() {
#if MSDA_JOINED > 1
    // By a branch, so that image and head are in each lane's registers, not in those that all share. Nothing spills then, and
    // encoder_800x1333 takes 340 us instead of 344 in float16, 341 instead of 346 in bfloat16; mask2former_1024 1 % less.
    unsigned head = blockIdx.y * MSDA_HEADS;
    if (blockIdx.z) head = msda_head_of_block();
#else
    const unsigned head = msda_head_of_block();
#endif
    msda_work work;
    work.image = head / MSDA_M;
    work.m = (int)(head % MSDA_M);
    unsigned block = blockIdx.x;
#if MSDA_MERGE && MSDA_BAND && MSDA_VALUE_F32
    // Backwards: encoder_800x1333 348 us instead of 352, mask2former_1024 162.5 instead of 164. 16 bits took 0.3 and 1.5 %
    // longer so, before blocks took slices of the image.
    block = gridDim.x - 1 - block;
#endif
    work.first = (msda_index)block * (MSDA_WARPS * MSDA_ROUNDS * MSDA_QUERIES);
    return work;
}

// Queries of an image that count.
__device__ __forceinline__ msda_index msda_length(const long long* __restrict__ lengths, long long image, msda_index Q) {
#if MSDA_PADDED
    const long long length = __ldg(lengths + image);
    return length < 0 ? 0 : length < Q ? (msda_index)length : Q;
#else
    return Q;
#endif
}

// Query number `at` of a block: -1 past the last one, -2 - q where q does not count.
template <typename Levels, typename Order>
__device__ __forceinline__ msda_index msda_query_at(
        const msda_work& work, int at, const Levels& levels, const Order& order, const long long* __restrict__ lengths,
        msda_index Q) {
    const msda_index q = work.first + at < Q ? msda_query(work.first + at, levels, order) : -1;
    return MSDA_PADDED && q >= msda_length(lengths, work.image, Q) ? -2 - q : q;
}

#if MSDA_ALONE
// Each lane has a query of its warp, as far as there are some; the others have -1.
struct msda_queries {
    msda_index of_lane;
};

// Query `local` of this warp's round. By all lanes.
__device__ __forceinline__ msda_index msda_query_of(const msda_queries& queries, int, int local) {
    return __shfl_sync(0xffffffffu, queries.of_lane, local);
}
#else
// What a block shares: its levels and its queries. By the whole block, not by each warp for its own few queries: that
// was a tenth of all instructions.
__device__ __forceinline__ void msda_begin(
        msda_shared& shared, const msda_work& work, const msda_metadata& metadata, const long long* __restrict__ lengths,
        long long S, msda_index Q) {
    bool packed = msda_read_levels(metadata, S, Q, shared.levels);
#if MSDA_BAND
    packed = __syncthreads_or(packed);   // the queries need the levels
#endif
#if MSDA_SLICED
    // By every warp: by the first alone, float16 spilled 24 bytes and took 336 us instead of 330 on encoder_800x1333.
    const msda_slice order = msda_slice_at(shared.levels, work.first, Q, packed);
#else
    const bool order = packed;
#endif
#pragma unroll 1
    for (int i = threadIdx.x; i < MSDA_ROUNDS * MSDA_WARPS * MSDA_QUERIES; i += MSDA_THREADS) {
        shared.query[i] = msda_query_at(work, i, shared.levels, order, lengths, Q);
    }
    __syncthreads();
}

typedef msda_shared msda_queries;

// Query `local` of this warp's `round`; only the lanes beyond the last group of a warp have a `local` that is too high.
// Negative where there is none to work on.
__device__ __forceinline__ msda_index msda_query_of(const msda_queries& shared, int round, int local) {
    return local < MSDA_QUERIES ? shared.query[(round * MSDA_WARPS + threadIdx.x / 32) * MSDA_QUERIES + local] : -1;
}
#endif

// The number of a query that is there, whether it counts or not; -1 past the last one.
__device__ __forceinline__ msda_index msda_number(msda_index q) { return MSDA_PADDED && q < -1 ? -2 - q : q; }
