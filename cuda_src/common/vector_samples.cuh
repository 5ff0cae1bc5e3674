// The samples of a query by its own lanes (MSDA_OWN), where levels are in registers and samples come as locations and
// weights: a lane reads and prepares MSDA_TOGETHER samples that follow each other at a time, and no lane asks another for its
// query. Against samples that all lanes of a warp take in turn, float32 on an H100: encoder_800x1333 140.1 us instead of
// 141.1, mask2former_1024 59.0 and 59.7, 212 and 217 with four images. In 16 bits two or four together are the same to 1 %.

#define MSDA_OWN (MSDA_ALONE && MSDA_LEVELS_IN_REGISTERS && !MSDA_FRONT)

// Place of sample k of a query in shared memory: what lanes write at a time lies together, in different banks.
__device__ constexpr int msda_place(int k) {
#if MSDA_OWN
    return k / MSDA_TOGETHER + k % MSDA_TOGETHER * (MSDA_K / MSDA_TOGETHER);
#else
    return k;
#endif
}

#if MSDA_OWN
#define MSDA_PASSES ((MSDA_K / MSDA_TOGETHER + MSDA_LANES - 1) / MSDA_LANES)

struct msda_own {
    msda_vector<msda_location, 2 * MSDA_TOGETHER> xy[MSDA_PASSES];
    msda_vector<msda_location, MSDA_TOGETHER> attention[MSDA_PASSES];
};

// Samples that are not there are NaN, which does not count.
__device__ __forceinline__ void msda_load_own(
        msda_own& own, msda_index q, int head, int lane, const msda_location* __restrict__ locations,
        const msda_location* __restrict__ weights) {
#pragma unroll
    for (int pass = 0; pass < MSDA_PASSES; ++pass) {
        const int part = pass * MSDA_LANES + lane, parts = MSDA_K / MSDA_TOGETHER;
        own.xy[pass].word = msda_ones(own.xy[pass].word);
        own.attention[pass].word = decltype(own.attention[pass].word)();
        if (q >= 0 && part < parts) {
            const msda_index at = msda_in_image(q, head * parts + part, parts);
            own.xy[pass] = msda_stream<2 * MSDA_TOGETHER>(locations, at);
            own.attention[pass] = msda_stream<MSDA_TOGETHER>(weights, at);
        }
    }
}

// Samples to prepared ones, those of the lane's query. Not by lanes beyond the last group.
__device__ __forceinline__ void msda_fill_own(
        msda_sample* samples, int slot, const msda_levels& levels, const msda_own& own, int lane) {
    if (32 % (MSDA_LANES * MSDA_HEADS) != 0 && slot >= MSDA_SLOTS) return;
#pragma unroll
    for (int pass = 0; pass < MSDA_PASSES; ++pass) {
        const int first = (pass * MSDA_LANES + lane) * MSDA_TOGETHER;
        if (first >= MSDA_K) continue;
        msda_acc xy[2 * MSDA_TOGETHER], attention[MSDA_TOGETHER];
        msda_unpack(own.xy[pass], xy);
        msda_unpack(own.attention[pass], attention);
        msda_level level = msda_level_in(levels, MSDA_LEVEL_OF(first));
#pragma unroll
        for (int i = 0; i < MSDA_TOGETHER; ++i) {
            if (i && (MSDA_P == 0 || MSDA_P % MSDA_TOGETHER)) level = msda_level_in(levels, MSDA_LEVEL_OF(first + i));
            samples[slot * MSDA_PITCH + msda_place(first + i)] =
                msda_prepare_screened(xy[2 * i], xy[2 * i + 1], attention[i], level);
        }
    }
}
#endif
