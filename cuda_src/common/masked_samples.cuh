// Prepared samples of the forward, into shared memory.

#if MSDA_SCREENED
// Where a sample lies on one axis of a level: between pixels `first` and the next, each of which may be outside.
struct msda_pair {
    int first;
    msda_acc fraction;      // weight of the next
    bool has_first, has_next;
};

__device__ __forceinline__ msda_pair msda_pair_of(msda_acc x, int size) {
    const msda_acc unit = msda_unit(size), p = msda_pixel(x, unit);
    msda_pair pair;
    pair.first = __float2int_rd(p > -1 ? p : (msda_acc)-2);     // NaN, like -1, has no neighbour inside
    pair.fraction = fma(x, unit, -msda_shift() - (msda_acc)pair.first);     // rounded once, as in msda_locate
    pair.has_first = (unsigned)pair.first < (unsigned)size;
    pair.has_next = (unsigned)pair.first + 1 < (unsigned)size;
    return pair;
}

// All weight to the neighbour that is inside, if only one is.
__device__ __forceinline__ void msda_screen(const msda_pair& pair, msda_acc& fraction, msda_acc& attention) {
    fraction = pair.fraction;
    if (!pair.has_first || !pair.has_next) {
        attention *= pair.has_first ? 1 - fraction : fraction;
        fraction = pair.has_first ? (msda_acc)0 : (msda_acc)1;
    }
}

// As msda_prepare, with weights of zero for the neighbours that lie outside, in two thirds of the instructions.
__device__ __forceinline__ msda_sample msda_prepare_screened(
        msda_acc x, msda_acc y, msda_acc attention, const msda_level& level) {
    const msda_pair column = msda_pair_of(x, level.w), row = msda_pair_of(y, level.h);
    const int columns = (column.has_first ? 5 : 0) | (column.has_next ? 10 : 0);
    const int rows = (row.has_first ? 3 : 0) | (row.has_next ? 12 : 0), inside = columns & rows;
    msda_sample sample;
    // Unsigned, because nobody uses the place of a sample that does not count, wherever it is.
    sample.place = (msda_index)(((msda_address)level.start + (msda_address)row.first * level.w + column.first) * 16 | inside);
    msda_screen(column, sample.ax, attention);
    msda_screen(row, sample.ay, attention);
    sample.attention = inside ? attention : level.w ? (msda_acc)0 : msda_nan();
    return sample;
}
#endif

// Raw samples to prepared ones in shared memory. Where warps are alone and there is none, its mark makes one that does not
// count.
__device__ __forceinline__ void msda_fill_marked(
        msda_sample* samples, const msda_levels& levels, [[maybe_unused]] const msda_queries& queries, msda_raw& raw, int k0) {
#if MSDA_ALONE
#if MSDA_FRONT
    msda_softmax(raw);
#endif
    // Where the lanes of a warp are whole queries, all samples of a lane are of one level.
    msda_level level = msda_level_in(levels, min(MSDA_LEVEL_OF(k0 + (int)(threadIdx.x % MSDA_SPAN)), MSDA_L - 1));
#pragma unroll
    for (int fill = 0; fill < MSDA_FILLS; ++fill) {
        const int i = fill * 32 + threadIdx.x % 32;
        const int slot = i / MSDA_SPAN, place = i % MSDA_SPAN;
        if (slot < MSDA_SLOTS && place < MSDA_CHUNK) {
            const int l = min(MSDA_LEVEL_OF(k0 + place), MSDA_L - 1);
            if (32 % MSDA_SPAN) level = msda_level_in(levels, l);
            const msda_point point = msda_point_of(raw, fill, l, level);
#if MSDA_SCREENED
            samples[slot * MSDA_PITCH + place] = msda_prepare_screened(point.x, point.y, point.attention, level);
#else
            samples[slot * MSDA_PITCH + place] = msda_prepare(point.x, point.y, point.attention, level);
#endif
        }
    }
#else
    msda_fill(samples, queries, raw, 0, k0);
#endif
}
