// The samples of a warp, from global memory to prepared ones in shared memory: locations and weights, or with a front end
// offsets from reference points and logits.

// One sample a lane and turn, from global memory. The loads of the next chunk or round are issued before the current
// one is worked on, so that their latency is hidden.

// Samples of a query that lanes have a place for: with a softmax over them a power of two, or a multiple of a warp.
#if MSDA_FRONT
__device__ constexpr int msda_power(int n) { return n <= 1 ? 1 : 2 * msda_power((n + 1) / 2); }
#define MSDA_SPAN (MSDA_K <= 32 ? msda_power(MSDA_K) : (MSDA_K + 31) / 32 * 32)
#else
#define MSDA_SPAN MSDA_CHUNK
#endif
#define MSDA_FILLS ((MSDA_SLOTS * MSDA_SPAN + 31) / 32)

// The samples of a lane.
template <int FILLS>
struct msda_raw_of {
    msda_vector<msda_location, 2> xy[FILLS];    // location or offset
    msda_location attention[FILLS];             // weight or logit
#if MSDA_FRONT
    msda_vector<msda_reference, 2> reference[FILLS][MSDA_FRONT / 2];
    msda_acc weight[FILLS];                     // by msda_softmax
#endif
};

typedef msda_raw_of<MSDA_FILLS> msda_raw;

// Where samples come from and their gradients go to: elements from a query and head to the next. Pairs may be read as
// such unless their number a query is odd.
#define MSDA_LOCATIONS_PITCH ((MSDA_PACKED ? 3 : 2) * MSDA_K)
#define MSDA_WEIGHTS_PITCH ((MSDA_PACKED ? 3 : 1) * MSDA_K)
#define MSDA_IN_PAIRS (MSDA_LOCATIONS_PITCH % 2 == 0)

// Index of element 0 of this image's query 0 in an array of `pitch` elements a query and head.
__device__ __forceinline__ long long msda_first_element(const msda_work& work, long long Q, int pitch) {
    return work.image * Q * (MSDA_M * pitch) + work.m * pitch;
}

// That of element k of query q is so much more.
__device__ __forceinline__ msda_index msda_in_image(msda_index q, int k, int pitch) { return q * (MSDA_M * pitch) + k; }

// N numbers that are read once: first out of the caches.
template <int N>
__device__ __forceinline__ msda_vector<msda_location, N> msda_stream(
        const msda_location* __restrict__ source, msda_index index) {
    msda_vector<msda_location, N> v;
    v.word = __ldcs(reinterpret_cast<const decltype(v.word)*>(source) + index);
    return v;
}

__device__ __forceinline__ msda_vector<msda_location, 2> msda_stream_pair(
        const msda_location* __restrict__ locations, msda_index q, int head, int k) {
#if MSDA_PACKED
    if (!MSDA_IN_PAIRS) {
        msda_vector<msda_location, 2> v;
        const int first = head * MSDA_LOCATIONS_PITCH + 2 * k;
        for (int i = 0; i < 2; ++i)
            v.element[i] = msda_stream<1>(locations, msda_in_image(q, first + i, MSDA_LOCATIONS_PITCH)).element[0];
        return v;
    }
#endif
    const int pitch = MSDA_LOCATIONS_PITCH / 2;
    return msda_stream<2>(locations, msda_in_image(q, head * pitch + k, pitch));
}

// Where sample number `fill` of a lane is: sample k of query q and of the block's head number `head`.
template <int FILLS>
__device__ __forceinline__ void msda_load_place(
        msda_raw_of<FILLS>& raw, int fill, msda_index q, int head, int k, const msda_location* __restrict__ locations,
        [[maybe_unused]] const msda_reference* __restrict__ references) {
    raw.xy[fill] = msda_stream_pair(locations, q, head, k);
#if MSDA_FRONT
    const msda_index point = q * MSDA_REFERENCES + (MSDA_REFERENCES > 1 ? MSDA_LEVEL_OF(k) : 0);
#pragma unroll
    for (int half = 0; half < MSDA_FRONT / 2; ++half) {
        msda_vector<msda_reference, 2>& pair = raw.reference[fill][half];
        const msda_index at = point * (MSDA_FRONT / 2) + half;
        pair.word = __ldg(reinterpret_cast<const decltype(pair.word)*>(references) + at);
    }
#endif
}

__device__ __forceinline__ msda_location msda_load_attention(
        const msda_location* __restrict__ weights, msda_index q, int head, int k) {
    const int pitch = MSDA_WEIGHTS_PITCH;
    return msda_stream<1>(weights, msda_in_image(q, head * pitch + k, pitch)).element[0];
}

#if MSDA_ALONE
__device__ __forceinline__ uint4 msda_ones(uint4) { return {~0u, ~0u, ~0u, ~0u}; }
__device__ __forceinline__ uint2 msda_ones(uint2) { return {~0u, ~0u}; }
__device__ __forceinline__ unsigned msda_ones(unsigned) { return ~0u; }
#endif

// `locations` and `weights` begin at the first sample, `references` at the image. By all lanes of a warp.
__device__ __forceinline__ void msda_load_raw(
        msda_raw& raw, const msda_queries& queries, int round, int k0, const msda_location* __restrict__ locations,
        const msda_location* __restrict__ weights, [[maybe_unused]] const msda_reference* __restrict__ references) {
#pragma unroll
    for (int fill = 0; fill < MSDA_FILLS; ++fill) {
        const int i = fill * 32 + threadIdx.x % 32;
        const int slot = i / MSDA_SPAN, k = k0 + i % MSDA_SPAN;
        const msda_index q = msda_query_of(queries, round, slot / MSDA_HEADS);
#if MSDA_ALONE
        raw.xy[fill].word = msda_ones(raw.xy[fill].word);   // NaN: where there is no sample, none that counts
#endif
#if MSDA_FRONT || MSDA_ALONE
        raw.attention[fill] = msda_location();   // whatever it is, others' softmax may look at it
#endif
        if (q >= 0 && k < MSDA_K) {
            msda_load_place(raw, fill, q, slot % MSDA_HEADS, k, locations, references);
            raw.attention[fill] = msda_load_attention(weights, q, slot % MSDA_HEADS, k);
        }
    }
}

// A sample in numbers of the arithmetic.
struct msda_point {
    msda_acc x, y;      // location
    msda_acc attention;
};

#if MSDA_FRONT
enum {
    msda_lanes_of_query = MSDA_SPAN < 32 ? MSDA_SPAN : 32,
    msda_fills_of_query = (MSDA_SPAN + 31) / 32
};

__device__ __forceinline__ msda_acc msda_sum_of_query(msda_acc x) {
#pragma unroll
    for (int mask = 1; mask < msda_lanes_of_query; mask *= 2) x += __shfl_xor_sync(0xffffffffu, x, mask);
    return x;
}

// Logits whose exponentials neither overflow nor vanish: no need to take their largest off.
#define MSDA_MODERATE 60

// Logits to weights: each query's lanes hold all of its samples. By all lanes of a warp.
template <int FILLS>
__device__ __forceinline__ void msda_softmax(msda_raw_of<FILLS>& raw) {
    const msda_acc lowest = -(msda_acc)__int_as_float(0x7f800000);
    bool moderate = true;
#pragma unroll
    for (int fill = 0; fill < FILLS; ++fill) {
        const msda_acc logit = msda_load(raw.attention[fill]);
        const int k = fill % msda_fills_of_query * 32 + threadIdx.x % msda_lanes_of_query;
        moderate = moderate && logit > -MSDA_MODERATE && logit < MSDA_MODERATE;
        raw.weight[fill] = k < MSDA_K ? logit : lowest;
    }
    if (!__all_sync(0xffffffffu, moderate)) {
#pragma unroll
        for (int fill = 0; fill < FILLS; fill += msda_fills_of_query) {
            msda_acc largest = lowest;
#pragma unroll
            for (int t = 0; t < msda_fills_of_query; ++t) largest = fmax(largest, raw.weight[fill + t]);
#pragma unroll
            for (int mask = 1; mask < msda_lanes_of_query; mask *= 2)
                largest = fmax(largest, __shfl_xor_sync(0xffffffffu, largest, mask));
#pragma unroll
            for (int t = 0; t < msda_fills_of_query; ++t) raw.weight[fill + t] -= largest;
        }
    }
#pragma unroll
    for (int fill = 0; fill < FILLS; fill += msda_fills_of_query) {
        msda_acc total = 0;
#pragma unroll
        for (int t = 0; t < msda_fills_of_query; ++t) {
            raw.weight[fill + t] = msda_exp(raw.weight[fill + t]);
            total += raw.weight[fill + t];
        }
        const msda_acc scale = msda_reciprocal(msda_sum_of_query(total));
#pragma unroll
        for (int t = 0; t < msda_fills_of_query; ++t) raw.weight[fill + t] *= scale;
    }
}

// Pixels of a level of `size` pixels that an offset of 1 is: `extent` is the width or height of the reference box.
__device__ __forceinline__ msda_acc msda_reach([[maybe_unused]] msda_acc extent, int size, [[maybe_unused]] int level) {
#if MSDA_FRONT == 4
    return extent * msda_scale(size) * ((msda_acc)0.5 / (msda_acc)(msda_first_of(level + 1) - msda_first_of(level)));
#else
    return MSDA_ALIGN_CORNERS ? msda_scale(size) / (msda_acc)size : (msda_acc)1;
#endif
}

// The reach of both coordinates of a sample.
struct msda_reaches { msda_acc x, y; };

template <int FILLS>
__device__ __forceinline__ msda_reaches msda_reaches_of(
        const msda_raw_of<FILLS>& raw, int fill, int level, const msda_level& size) {
    const msda_vector<msda_reference, 2>& box = raw.reference[fill][MSDA_FRONT / 2 - 1];
    return {msda_reach(msda_load(box.element[0]), size.w, level), msda_reach(msda_load(box.element[1]), size.h, level)};
}
#endif

// Sample number `fill` of a lane, which is one of level `level`.
template <int FILLS>
__device__ __forceinline__ msda_point msda_point_of(
        const msda_raw_of<FILLS>& raw, int fill, [[maybe_unused]] int level, [[maybe_unused]] const msda_level& size) {
    msda_acc xy[2];
    msda_unpack(raw.xy[fill], xy);
#if MSDA_FRONT
    const msda_reaches reach = msda_reaches_of(raw, fill, level, size);
    const msda_vector<msda_reference, 2>& reference = raw.reference[fill][0];
    return {fma(msda_load(reference.element[0]), msda_scale(size.w), xy[0] * reach.x),
            fma(msda_load(reference.element[1]), msda_scale(size.h), xy[1] * reach.y), raw.weight[fill]};
#else
    return {xy[0], xy[1], msda_load(raw.attention[fill])};
#endif
}

#if !MSDA_ALONE
// Raw samples to prepared ones in shared memory. Where there is none, a sample that does not count.
__device__ __forceinline__ void msda_fill(
        msda_sample* samples, const msda_shared& shared, msda_raw& raw, int round, int k0) {
#if MSDA_FRONT
    msda_softmax(raw);
#endif
#pragma unroll
    for (int fill = 0; fill < MSDA_FILLS; ++fill) {
        const int i = fill * 32 + threadIdx.x % 32;
        const int slot = i / MSDA_SPAN, place = i % MSDA_SPAN, k = k0 + place;
        if (slot < MSDA_SLOTS && place < MSDA_CHUNK) {
            const msda_index q = msda_query_of(shared, round, slot / MSDA_HEADS);
            msda_sample sample = {0, 0, 0, 0};
            if (q >= 0 && k < MSDA_K) {
                const int level = MSDA_LEVEL_OF(k);
                const msda_point point = msda_point_of(raw, fill, level, shared.levels[level]);
                sample = msda_prepare(point.x, point.y, point.attention, shared.levels[level]);
            }
            samples[slot * MSDA_PITCH + place] = sample;
        }
    }
}
#endif
