// How the pixels of a slab are divided into buckets: small buckets where a pixel gets many contributions, so that every
// bucket has about as many (docs/performance/decisions.md#sorted-bucket-size). The bucket sort decides, and the kernels after
// it read what it has decided.
#pragma once
#include "common/levels.cuh"
#include "common/sample_levels.cuh"
#include "common/warp.cuh"
#include "sorted/buckets.cuh"

namespace msda {

constexpr int contributions_per_sample = config::nearest ? 1 : 2;

// A region begins at each level. In a warp, lane 1 + l has that of level l, and lane 0 what comes before the first level.
enum : bool { has_regions = config::L < max_regions };
enum : int { max_shift = log2_of(config::bucket_size), min_shift = log2_of(config::smallest_bucket) };

struct bucket_sizes {
    bucket_table table;
    bucket_region of_level[has_regions ? config::L : 1];    // the region that begins with a level
};

__device__ __forceinline__ bucket_region load_region(const bucket_region* source) {
    return as_region(*reinterpret_cast<const uint4*>(source));
}

// The largest buckets of a level that have at most so many contributions each, where these are spread evenly.
__device__ __forceinline__ int shift_of_level(
        const level_info& level, int points, long long Q, long long contributions_per_bucket) {
    const address_t pixels = (address_t)level.h * (address_t)level.w;
    const address_t contributions = (address_t)Q * (address_t)(contributions_per_sample * points);
    int shift = max_shift;
    while (shift > min_shift && contributions << shift > pixels * (address_t)contributions_per_bucket) --shift;
    return shift;
}

// By the first warp of a block, for the slab of `pixels` from `first_pixel` on. There may be `max_buckets`: enough for the largest
// ones, and one more per region.
__device__ __forceinline__ void choose_bucket_sizes(
        bucket_sizes& sizes, const level_info* levels, long long S, long long Q, long long first_pixel, long long pixels,
        int max_buckets, long long contributions_per_bucket) {
    const int lane = threadIdx.x % 32, slab = (int)min(S - first_pixel, pixels);
    bucket_region region = {no_bucket, 0, 0, max_shift};
    if constexpr (!has_regions) {
        const bucket_region all = {0, 0, slab, max_shift};
        if (lane == 0) sizes.of_level[0] = region = all;
        if (lane == 0) sizes.table.buckets = (unsigned)(slab + config::bucket_size - 1) / config::bucket_size;
        sizes.table.region[lane] = region;
        return;
    }
    const int l = min(max(lane - 1, 0), (int)config::L - 1);
    const level_info level = levels[l];
    const bool is_level = lane > 0 && lane <= config::L && level.w > 0;
    // Regions in the order of their first pixels. A level that does not fit has none.
    const long long start = is_level ? (long long)level.start : -1;
    int rank = 0;
    for (int other = 0; other <= config::L; ++other) {
        const long long begins = __shfl_sync(0xffffffffu, start, other);
        rank += begins < start || (begins == start && other < lane);
    }
    // A lane now takes the region of its number, and looks at the level that begins it.
    if (lane <= config::L) sizes.table.region[rank].first_bucket = is_level ? l : -1;
    __syncwarp();
    const int begins_with = lane <= config::L ? sizes.table.region[lane].first_bucket : -1;
    const level_info beginning = levels[max(begins_with, 0)];
    const int points = first_sample_of(max(begins_with, 0) + 1) - first_sample_of(max(begins_with, 0));
    __syncwarp();
    if (begins_with >= 0) region.first_pixel = (int)max(min((long long)beginning.start - first_pixel, (long long)slab), 0ll);
    if (lane > config::L) region.first_pixel = slab;
    region.end_pixel = __shfl_sync(0xffffffffu, region.first_pixel, min(lane + 1, 31));
    if (lane == config::L) region.end_pixel = slab;
    unsigned buckets, end;
    for (;; contributions_per_bucket *= 2) {    // until there are few enough
        if (begins_with >= 0) region.shift = shift_of_level(beginning, points, Q, contributions_per_bucket);
        buckets = (unsigned)(region.end_pixel - region.first_pixel + (1 << region.shift) - 1) >> region.shift;
        if (lane > config::L) buckets = 0;
        end = inclusive_sum(buckets);
        if ((int)__shfl_sync(0xffffffffu, end, 31) <= max_buckets) break;
    }
    if (lane <= config::L) region.first_bucket = (int)(end - buckets);
    sizes.table.region[lane] = region;
    if (lane == 31) sizes.table.buckets = end;
    __syncwarp();
    if (lane > 0 && lane <= config::L) sizes.of_level[l] = sizes.table.region[rank];
}

}  // namespace msda
