// What a block works on: a head, or neighbouring heads, of one image, and some of its queries.
#pragma once
#include "common/index.cuh"

namespace msda {

struct assignment {
    long long image;    // n
    int m;              // the first head
    index_t first;      // position of the block's first query in the order of queries
};

// Index of element 0 of this image's query 0 in an array of `pitch` elements per query and head.
__device__ __forceinline__ long long first_element(const assignment& work, long long Q, int pitch) {
    return work.image * Q * (config::M * pitch) + work.m * pitch;
}

// The index of element `e` of query q is larger by this.
__device__ __forceinline__ index_t element_in_image(index_t q, int e, int pitch) { return q * (config::M * pitch) + e; }

// Valid queries of an image.
__device__ __forceinline__ index_t valid_queries(
        [[maybe_unused]] const long long* __restrict__ lengths, [[maybe_unused]] long long image, index_t Q) {
    if constexpr (config::ragged) {
        const long long length = __ldg(lengths + image);
        return length < 0 ? 0 : length < Q ? (index_t)length : Q;
    } else {
        return Q;
    }
}

}  // namespace msda
