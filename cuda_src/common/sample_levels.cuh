// Which level each sample of a query is in. The K samples of a query and head are numbered level by level.
#pragma once
#include "common/config.cuh"

namespace msda {

enum : bool { equal_points = config::P != 0 };   // every level has P points

// Number of the first sample of each level; the last entry is the number of all samples.
struct first_sample_table { int of[config::L + 1]; };

__device__ constexpr first_sample_table sum_points() {
    first_sample_table first = {};
    for (int l = 0; l < config::L; ++l) first.of[l + 1] = first.of[l] + config::points(l);
    return first;
}

__device__ constexpr first_sample_table first_samples = sum_points();

enum : int { K = first_samples.of[config::L] };  // samples per query and head

__device__ __forceinline__ int first_sample_of(int level) {
    if constexpr (equal_points) return level * config::P;
    else return first_samples.of[level];
}

// Where levels have different numbers of points.
__device__ __forceinline__ int search_level(int k) {
    int level = 0;
#pragma unroll
    for (int l = 1; l < config::L; ++l) level += k >= first_samples.of[l];
    return level;
}

// The level of sample k. As a macro in the loops of forward and backward: there a function that divides makes the compiler
// unroll and address differently.
enum : int { points_or_1 = equal_points ? config::P : 1 };
#define MSDA_LEVEL_OF(k) (equal_points ? (k) / points_or_1 : search_level(k))
__device__ __forceinline__ int level_of(int k) { return MSDA_LEVEL_OF(k); }

}  // namespace msda
