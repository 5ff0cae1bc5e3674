// Where the warps of a block do not wait for each other (MSDA_ALONE): each reads the levels and finds its queries itself.
// On an H100 all warps together spent a seventh of their time at the barriers behind which the block shared them, and
// encoder_800x1333 takes 157 us instead of 161 in float32, 120 instead of 123 in float16.

// ---- levels -------------------------------------------------------------------------------------------------

#if MSDA_LEVELS_IN_REGISTERS
// All levels, the same in all lanes. Against levels in shared memory encoder_800x1333 takes 144 us instead of 147 in float32,
// mask2former_1024 61.5 instead of 63.2, 43.2 instead of 44.0 in bfloat16; decoders, which then have fewer warps, 0 to 4 %
// more.
struct msda_levels {
    msda_level of[MSDA_L];
};

// Number by number, by selections: as a whole it would be a branch or go through memory.
__device__ __forceinline__ void msda_take_if(bool condition, const msda_level& other, msda_level& level) {
    level.start = condition ? other.start : level.start;
    level.h = condition ? other.h : level.h;
    level.w = condition ? other.w : level.w;
}

__device__ __forceinline__ msda_level msda_level_in(const msda_levels& levels, int l) {
    msda_level level = levels.of[0];
#pragma unroll
    for (int i = 1; i < MSDA_L; ++i) msda_take_if(l == i, levels.of[i], level);
    return level;
}

__device__ __forceinline__ int msda_width_in(const msda_levels& levels, int l) { return msda_level_in(levels, l).w; }

__device__ __forceinline__ msda_level msda_level_of_pixel(msda_index position, const msda_levels& levels) {
    msda_level level = levels.of[0];
#pragma unroll
    for (int i = 1; i < MSDA_L; ++i) msda_take_if(position >= levels.of[i].start, levels.of[i], level);
    return level;
}

#else
// In shared memory, a copy a warp.
typedef const msda_level* msda_levels;

__device__ __forceinline__ msda_level msda_level_in(msda_levels levels, int l) { return msda_level_at(levels + l); }
__device__ __forceinline__ int msda_width_in(msda_levels levels, int l) { return levels[l].w; }
#endif

#if MSDA_ALONE
#if MSDA_LEVELS_IN_REGISTERS
// Returns whether queries may be taken in bands: whether the levels follow each other and are all of the Q pixels.
__device__ __forceinline__ bool msda_begin_levels(
        msda_levels& levels, msda_shared&, const msda_metadata& metadata, long long S, msda_index Q) {
    const int lane = threadIdx.x % 32;
    msda_level own = {0, 0, 0};
    if (lane < MSDA_L) msda_read_level(metadata, S, lane, own);
    bool packed = true;
    msda_index end = 0;
#pragma unroll
    for (int l = 0; l < MSDA_L; ++l) {
        msda_level& level = levels.of[l];
        level.start = msda_of_lane(own.start, l);
        level.h = msda_of_lane(own.h, l);
        level.w = msda_of_lane(own.w, l);
        packed = packed && level.start == end;   // so does one that does not fit, of which no pixel is
        end = level.start + (msda_index)level.h * level.w;
    }
    return packed && end == Q;
}
#else
// The levels of a warp, a lane each. Returns whether queries may be taken in bands: whether the levels follow each other
// and are all of the Q pixels.
__device__ __forceinline__ bool msda_begin_levels(
        msda_levels& levels, msda_shared& shared, const msda_metadata& metadata, long long S,
        [[maybe_unused]] msda_index Q) {
    const int lane = threadIdx.x % 32;
    levels = shared.levels[threadIdx.x / 32];
    [[maybe_unused]] msda_extent extent = {0, 0, false};
    if (lane < MSDA_L) extent = msda_read_level(metadata, S, lane, shared.levels[threadIdx.x / 32][lane]);
    bool packed = false;
#if MSDA_BAND
    // Each begins where the one before ends; 31 bits hold Q, and so every end. (In msda_read_levels, instead of its sum
    // over lanes, this made the merged backward 4 % slower in float32.)
    const int end = (int)(extent.start + extent.size), before = __shfl_up_sync(0xffffffffu, end, 1);
    packed = lane >= MSDA_L || (extent.fits && (int)extent.start == (lane ? before : 0) &&
                                (lane < MSDA_L - 1 || end == Q));
    packed = __all_sync(0xffffffffu, packed);
#endif
    __syncwarp();
    return packed;
}
#endif

// ---- work ---------------------------------------------------------------------------------------------------

// The work of a block, and how many rounds its warps take for it: MSDA_ROUNDS, but the heads at the end have a row of the
// grid for each round, of blocks that take one, so that multiprocessors end at about the same time. The rows that are
// more than heads tell how many of them do (`plan.launch_of`).
__device__ __forceinline__ msda_work msda_work_alone([[maybe_unused]] long long heads, int& rounds) {
    msda_work work = msda_work_of_block();
    rounds = MSDA_ROUNDS;
#if MSDA_ROUNDS > 1
    const unsigned all = (unsigned)(heads / MSDA_HEADS), whole = all - (gridDim.y - all) / (MSDA_ROUNDS - 1);
    if (blockIdx.y >= whole) {
        const unsigned row = blockIdx.y - whole, head = (whole + row / MSDA_ROUNDS) * MSDA_HEADS;
        // As in msda_work_of_block; as a function of both, bfloat16 took 1.8 % longer.
        work.image = head / MSDA_M;
        work.m = (int)(head % MSDA_M);
        // Backwards, because blocks of coarse levels take longest: encoder_800x1333 140.2 us instead of 141.6 in float32,
        // mask2former_1024 58.8 instead of 59.7.
        const unsigned before = row % MSDA_ROUNDS * gridDim.x + blockIdx.x;
        work.first = (msda_index)(MSDA_ROUNDS * gridDim.x - 1 - before) * (MSDA_WARPS * MSDA_QUERIES);
        rounds = 1;
    }
#endif
    return work;
}

// ---- queries ------------------------------------------------------------------------------------------------

// Query `place` of a warp's `round`; -1 for a place that a warp does not have. (From shared memory, as those of a block, they
// took 20 of the 396 instructions before the first row.) In signed numbers: with unsigned ones the fused front end had 155 us
// instead of 143 in float32 and, with boxes, 112 instead of 104 in float16 on encoder_800x1333, in two records in which
// torch's sequence took the same.
__device__ __forceinline__ msda_index msda_query_of_round(
        const msda_levels& levels, const msda_work& work, int round, int place, const long long* __restrict__ lengths,
        msda_index Q, bool packed) {
    const int group = round * MSDA_WARPS + threadIdx.x / 32;
    return place < MSDA_QUERIES ? msda_query_at(work, group * MSDA_QUERIES + place, levels, packed, lengths, Q) : -1;
}
#endif
