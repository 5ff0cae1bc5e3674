// Samples as they lie in global memory: locations and weights, or with the fused front end offsets and logits, with the
// reference points that the offsets start from.
#pragma once
#include "common/assignment.cuh"
#include "common/bilinear.cuh"
#include "common/sample_levels.cuh"
#include "common/vectors.cuh"

namespace msda {

enum : bool { fused = config::reference_coordinates != 0 };
enum : int { reference_pairs = config::reference_coordinates / 2 };      // (x, y), and (width, height) of a box

using location_t = config::location_t;
using reference_t = config::reference_t;

// Elements from a query and head to the next, of locations and of weights, and of their gradients.
enum : int { locations_pitch = (config::packed ? 3 : 2) * K };
enum : int { weights_pitch = (config::packed ? 3 : 1) * K };
// (x, y) may be read at once: not where their pitch is odd.
enum : bool { aligned_pairs = locations_pitch % 2 == 0 };

// Samples that a lane has loaded, `count` of them.
template <int count>
struct raw_samples {
    vector<location_t, 2> xy[count];    // location or offset
    location_t attention[count];        // weight or logit
    // Only with the fused front end:
    vector<reference_t, 2> reference[count][fused ? reference_pairs : 1];
    acc_t weight[count];                // by softmax()
};

// A sample in numbers of the arithmetic.
struct sampling_point {
    acc_t x, y;         // location
    acc_t attention;    // weight
};

// ---- loads -------------------------------------------------------------------------------------------------

// N numbers that are read once: first out of the caches.
template <int N>
__device__ __forceinline__ vector<location_t, N> load_streaming(const location_t* __restrict__ source, index_t index) {
    vector<location_t, N> v;
    v.word = __ldcs(reinterpret_cast<const decltype(v.word)*>(source) + index);
    return v;
}

__device__ __forceinline__ vector<location_t, 2> load_xy(
        const location_t* __restrict__ locations, index_t q, int head, int k) {
    if constexpr (aligned_pairs) {
        const int pitch = locations_pitch / 2;
        return load_streaming<2>(locations, element_in_image(q, head * pitch + k, pitch));
    } else {
        vector<location_t, 2> v;
        const int first = head * locations_pitch + 2 * k;
        for (int i = 0; i < 2; ++i)
            v.element[i] = load_streaming<1>(locations, element_in_image(q, first + i, locations_pitch)).element[0];
        return v;
    }
}

// Location, or offset and reference point, of sample k of query q and of the block's head number `head`, to number `i`.
template <int count>
__device__ __forceinline__ void load_location(
        raw_samples<count>& raw, int i, index_t q, int head, int k, const location_t* __restrict__ locations,
        [[maybe_unused]] const reference_t* __restrict__ references) {
    raw.xy[i] = load_xy(locations, q, head, k);
    if constexpr (fused) {
        const index_t point = q * config::reference_levels + (config::reference_levels > 1 ? MSDA_LEVEL_OF(k) : 0);
#pragma unroll
        for (int half = 0; half < reference_pairs; ++half) {
            vector<reference_t, 2>& pair = raw.reference[i][half];
            const index_t at = point * reference_pairs + half;
            pair.word = __ldg(reinterpret_cast<const decltype(pair.word)*>(references) + at);
        }
    }
}

// Weight or logit of that sample.
__device__ __forceinline__ location_t load_attention(
        const location_t* __restrict__ weights, index_t q, int head, int k) {
    return load_streaming<1>(weights, element_in_image(q, head * weights_pitch + k, weights_pitch)).element[0];
}

// ---- to locations and weights --------------------------------------------------------------------------------

// Pixels of a level of `size` pixels that an offset of 1 is; `extent` is the width or height of the reference box.
__device__ __forceinline__ acc_t pixels_per_offset(
        [[maybe_unused]] acc_t extent, int size, [[maybe_unused]] int level) {
    if constexpr (config::reference_coordinates == 4)
        return extent * pixels_across(size) * ((acc_t)0.5 / (acc_t)(first_sample_of(level + 1) - first_sample_of(level)));
    else
        return config::align_corners ? pixels_across(size) / (acc_t)size : (acc_t)1;
}

// The same for both coordinates of an offset.
struct offset_scale { acc_t x, y; };

template <int count>
__device__ __forceinline__ offset_scale offset_scale_of(
        const raw_samples<count>& raw, int i, int level, const level_info& size) {
    const vector<reference_t, 2>& box = raw.reference[i][fused ? reference_pairs - 1 : 0];
    return {pixels_per_offset(widen(box.element[0]), size.w, level),
            pixels_per_offset(widen(box.element[1]), size.h, level)};
}

// Sample number `i` of a lane, which is one of level `level`.
template <int count>
__device__ __forceinline__ sampling_point sampling_point_of(
        const raw_samples<count>& raw, int i, [[maybe_unused]] int level, [[maybe_unused]] const level_info& size) {
    acc_t xy[2];
    unpack(raw.xy[i], xy);
    if constexpr (fused) {
        const offset_scale scale = offset_scale_of(raw, i, level, size);
        const vector<reference_t, 2>& reference = raw.reference[i][0];
        return {fma((acc_t)widen(reference.element[0]), pixels_across(size.w), xy[0] * scale.x),
                fma((acc_t)widen(reference.element[1]), pixels_across(size.h), xy[1] * scale.y), raw.weight[i]};
    } else {
        return {xy[0], xy[1], widen(raw.attention[i])};
    }
}

}  // namespace msda
