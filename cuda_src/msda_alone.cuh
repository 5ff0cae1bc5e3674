// Where the warps of a block do not wait for each other (MSDA_ALONE): each reads the levels and finds its queries itself.
// On an H100 all warps together spent a seventh of their time at the barriers behind which the block shared them, and
// encoder_800x1333 takes 157 us instead of 161 in float32, 120 instead of 123 in float16.

#if MSDA_ALONE
// The levels of a warp, a lane each. Returns whether queries may be taken in bands: whether the levels follow each other
// and are all of the Q pixels.
__device__ __forceinline__ bool msda_begin_levels(
        msda_shared& shared, const msda_metadata& metadata, long long S, [[maybe_unused]] msda_index Q) {
    const int lane = threadIdx.x % 32;
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

// The queries of a warp, a lane each. (In shared memory, as those of a block, they took 20 of the 396 instructions before the
// first row.)
__device__ __forceinline__ msda_queries msda_begin_queries(
        const msda_shared& shared, const msda_work& work, const long long* __restrict__ lengths, msda_index Q, bool packed) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    msda_queries queries = {-1};
    if (lane < MSDA_QUERIES)
        queries.of_lane = msda_query_at(work, warp * MSDA_QUERIES + lane, shared.levels[warp], packed, lengths, Q);
    return queries;
}
#endif
