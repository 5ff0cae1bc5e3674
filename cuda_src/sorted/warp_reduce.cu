// Third kernel of the sorted backward where few contributions fall on each pixel: a warp sums one bucket in shared memory,
// in the order of the samples, and writes the bucket's value vectors of the gradient, each once, in value's dtype.
// block_reduce.cu does it for buckets of many contributions (docs/performance/decisions.md#sorted-block-or-warp).
//
// No barrier of the block. Each group of `config::lanes` lanes owns some pixels of the bucket, and picks the contributions
// to them out of 32 at a time. Where 32 contributions fall on very few pixels (padded queries, all at one point), the
// groups share the contributions to a pixel instead, and add up their sums.
#include "common/block_size.cuh"
#include "common/warp.cuh"
#include "sorted/reduction.cuh"

namespace msda {

constexpr int pixels_per_group = (config::bucket_size + groups_per_warp - 1) / groups_per_warp;     // owned by a group

// 32 contributions are crowded on at most this many pixels (docs/performance/decisions.md#sorted-crowded-pixels).
constexpr int max_crowded_pixels = 4;

// Of a contribution: the pixel before the bucket, whose second pixel is pixel 0; and no contribution.
constexpr int pixel_before = -1, no_pixel = -2;

// Shared memory of a warp.
struct warp_bucket {
    contribution contributions[32];
    alignas(16) acc_t sum[config::bucket_size][padded_channels];
};
static_assert(config::warps * sizeof(warp_bucket) == config::shared_bytes, "the planner and the kernel disagree");

// Adds factor * x to a lane's channels of a sum.
__device__ __forceinline__ void add_scaled(acc_t* target, acc_t factor, const acc_t (&x)[config::vec]) {
    sum_vector sum;
    sum.word = *reinterpret_cast<const decltype(sum.word)*>(target);
#pragma unroll
    for (int v = 0; v < config::vec; ++v) sum.element[v] = fma(factor, x[v], sum.element[v]);
    *reinterpret_cast<decltype(sum.word)*>(target) = sum.word;
}

// A lane's channels of grad_output of a query.
__device__ __forceinline__ void load_grad_output(
        const bucket_view& bucket, unsigned query, int lane, channel_vector (&x)[channel_tiles]) {
    const value_t* of_query = bucket.grad_output + (long long)query * vector_pitch;
#pragma unroll
    for (int tile = 0; tile < channel_tiles; ++tile) {
        const int channel = tile * channel_tile + lane * config::vec;
        if (config::D % channel_tile == 0 || channel < config::D) x[tile] = load_channels((address_t)(of_query + channel));
    }
}

// Adds up to 32 contributions: each lane of the warp has one, to `pixel` and maybe the pixel after it. A group adds those
// to its pixels, [group_begin, group_end), one after the other.
__device__ __forceinline__ void add_contributions(
        warp_bucket& shared, const bucket_view& bucket, contribution mine, int pixel, int lane, int group_begin,
        int group_end) {
    const int group = threadIdx.x % 32 / config::lanes;
    const int first = pixel < 0 ? no_pixel : pixel;
    const int second = pixel > no_pixel && mine.pixel_and_pair & 1 && pixel + 1 < config::bucket_size ? pixel + 1 : no_pixel;
    __syncwarp();
    mine.pixel_and_pair = (unsigned)(pixel + 1);    // while it is in shared memory
    copy(mine, shared.contributions[threadIdx.x % 32]);
    unsigned of_group = 0;      // the lanes whose contribution this group adds
#pragma unroll
    for (int g = 0; g < groups_per_warp; ++g) {
        const bool wanted =
            (first >= 0 && first / pixels_per_group == g) || (second >= 0 && second / pixels_per_group == g);
        const unsigned lanes = __ballot_sync(0xffffffffu, wanted);
        if (g == group) of_group = lanes;
    }
    const unsigned pairs = __ballot_sync(0xffffffffu, second >= 0);
    __syncwarp();
    while (of_group) {
        int index[config::unroll];
        channel_vector x[config::unroll][channel_tiles];
        unsigned left = of_group;
#pragma unroll
        for (int u = 0; u < config::unroll; ++u) {
            index[u] = left ? __ffs((int)left) - 1 : -1;
            left &= left - 1;
            if (index[u] < 0) continue;
            load_grad_output(bucket, shared.contributions[index[u]].query, lane, x[u]);
        }
        of_group = left;
#pragma unroll
        for (int u = 0; u < config::unroll; ++u) {
            if (index[u] < 0) break;
            contribution added;
            copy(shared.contributions[index[u]], added);
            const int at = (int)added.pixel_and_pair - 1;
            const bool adds_first = at >= group_begin && at < group_end;
            const bool adds_second = (pairs >> index[u] & 1) && at + 1 >= group_begin && at + 1 < group_end;
#pragma unroll
            for (int tile = 0; tile < channel_tiles; ++tile) {
                const int channel = tile * channel_tile + lane * config::vec;
                if (config::D % channel_tile != 0 && channel >= config::D) continue;
                acc_t grad[config::vec];
                unpack(x[u][tile], grad);
                if (adds_first) add_scaled(&shared.sum[at][channel], added.first, grad);
                if (adds_second) add_scaled(&shared.sum[at + 1][channel], added.second, grad);
            }
        }
    }
}

// The same for 32 contributions that are crowded on few pixels. `leaders` are the lanes with the first contribution to each
// pixel. Pixel by pixel, the groups take turns at its contributions, and sum them in registers.
__device__ __forceinline__ void add_crowded_contributions(
        warp_bucket& shared, const bucket_view& bucket, const contribution& mine, int pixel, int lane, unsigned leaders) {
    const int group = threadIdx.x % 32 / config::lanes;
    __syncwarp();
    copy(mine, shared.contributions[threadIdx.x % 32]);
    __syncwarp();
    while (leaders) {
        const int leader = __ffs((int)leaders) - 1, at = __shfl_sync(0xffffffffu, pixel, leader);
        leaders &= leaders - 1;
        unsigned of_group = __ballot_sync(0xffffffffu, pixel == at);
        for (int skipped = 0; skipped < group; ++skipped) of_group &= of_group - 1;
        acc_t first[channel_tiles][config::vec], second[channel_tiles][config::vec];    // sums for the pixels of a pair
#pragma unroll
        for (int tile = 0; tile < channel_tiles; ++tile)
#pragma unroll
            for (int v = 0; v < config::vec; ++v) first[tile][v] = second[tile][v] = 0;
        while (of_group) {
            int index[config::unroll];
            channel_vector x[config::unroll][channel_tiles];
#pragma unroll
            for (int u = 0; u < config::unroll; ++u) {
                index[u] = of_group ? __ffs((int)of_group) - 1 : -1;
#pragma unroll
                for (int skipped = 0; skipped < groups_per_warp; ++skipped) of_group &= of_group - 1;
                if (index[u] < 0) continue;
                load_grad_output(bucket, shared.contributions[index[u]].query, lane, x[u]);
            }
#pragma unroll
            for (int u = 0; u < config::unroll; ++u) {
                if (index[u] < 0) break;
                contribution added;
                copy(shared.contributions[index[u]], added);
#pragma unroll
                for (int tile = 0; tile < channel_tiles; ++tile) {
                    if (config::D % channel_tile != 0 && tile * channel_tile + lane * config::vec >= config::D) continue;
                    acc_t grad[config::vec];
                    unpack(x[u][tile], grad);
#pragma unroll
                    for (int v = 0; v < config::vec; ++v) {
                        first[tile][v] = fma(added.first, grad[v], first[tile][v]);
                        if (added.pixel_and_pair & 1) second[tile][v] = fma(added.second, grad[v], second[tile][v]);
                    }
                }
            }
        }
#pragma unroll
        for (int tile = 0; tile < channel_tiles; ++tile)
#pragma unroll
            for (int v = 0; v < config::vec; ++v)
#pragma unroll
                for (int mask = config::lanes; mask < 32; mask *= 2) {
                    first[tile][v] += __shfl_xor_sync(0xffffffffu, first[tile][v], mask);
                    second[tile][v] += __shfl_xor_sync(0xffffffffu, second[tile][v], mask);
                }
        if (group == 0) {
#pragma unroll
            for (int tile = 0; tile < channel_tiles; ++tile) {
                const int channel = tile * channel_tile + lane * config::vec;
                if (at >= 0) add_scaled(&shared.sum[at][channel], 1, first[tile]);
                if (at + 1 < config::bucket_size) add_scaled(&shared.sum[at + 1][channel], 1, second[tile]);
            }
        }
        __syncwarp();
    }
}

__device__ __forceinline__ void reduce_bucket(warp_bucket& shared, const bucket_view& bucket) {
    const int lane_of_warp = threadIdx.x % 32, group = lane_of_warp / config::lanes, lane = lane_of_warp % config::lanes;
    const int group_begin = group * pixels_per_group, group_end = min(group_begin + pixels_per_group, config::bucket_size);
#pragma unroll 4
    for (int pixel = group_begin; pixel < group_end; ++pixel)
#pragma unroll
        for (int tile = 0; tile < channel_tiles; ++tile) {
            sum_vector zero;
#pragma unroll
            for (int v = 0; v < config::vec; ++v) zero.element[v] = 0;
            acc_t* target = &shared.sum[pixel][tile * channel_tile + lane * config::vec];
            *reinterpret_cast<decltype(zero.word)*>(target) = zero.word;
        }

    // 32 runs at a time, and of those 32 contributions at a time.
#pragma unroll 1
    for (long long run = 0; run < bucket.runs; run += 32) {
        const bucket_slice slice = slice_of(bucket, run + lane_of_warp);
        const unsigned count = slice.count(), end = inclusive_sum(count);
        const unsigned total = __shfl_sync(0xffffffffu, end, 31);
#pragma unroll 1
        for (unsigned at = 0; at < total; at += 32) {
            const unsigned i = at + lane_of_warp;
            int owner = 0;      // the lane whose run holds contribution i: a binary search
#pragma unroll
            for (int step = 16; step > 0; step /= 2)
                if (__shfl_sync(0xffffffffu, end, owner + step - 1) <= i) owner += step;
            const unsigned in_run = __shfl_sync(0xffffffffu, slice.begin - (end - count), owner) + i;
            const unsigned inside = __shfl_sync(0xffffffffu, slice.inside, owner);
            contribution mine = {0, 0, 0, 0};
            int pixel = no_pixel;
            if (i < total) {
                copy(bucket.contributions[(run + owner) * bucket.capacity + in_run], mine);
                pixel = in_run < inside ? pixel_before : (int)(mine.pixel_and_pair >> 1);
                prefetch(bucket.grad_output + (long long)mine.query * vector_pitch);
            }
            const unsigned peers = __match_any_sync(0xffffffffu, pixel);
            const bool leads = pixel > no_pixel && !(peers & ((1u << lane_of_warp) - 1));
            const unsigned leaders = __ballot_sync(0xffffffffu, leads);
            if (__popc(leaders) <= max_crowded_pixels && at + 32 <= total)
                add_crowded_contributions(shared, bucket, mine, pixel, lane, leaders);
            else
                add_contributions(shared, bucket, mine, pixel, lane, group_begin, group_end);
        }
    }

    const int last = min(bucket.pixels, group_end);
#pragma unroll 4
    for (int pixel = group_begin; pixel < last; ++pixel)
#pragma unroll
        for (int tile = 0; tile < channel_tiles; ++tile) {
            const int channel = tile * channel_tile + lane * config::vec;
            if (config::D % channel_tile != 0 && channel >= config::D) continue;
            sum_vector sum;
            sum.word = *reinterpret_cast<const decltype(sum.word)*>(&shared.sum[pixel][channel]);
            store_value_vector(bucket, pixel, channel, sum.element);
        }
}

extern "C" __global__ void __launch_bounds__(threads_per_block, config::min_blocks) msda_warp_reduce(
        const value_t* __restrict__ grad_output, const contribution* __restrict__ contributions,
        const unsigned short* __restrict__ segment_starts, value_t* __restrict__ grad_value, long long S, long long Q,
        long long runs, long long capacity, long long first_head, long long heads, long long first_pixel,
        long long pixels) {
    MSDA_SHARED_MEMORY(shared_memory);
    const unsigned buckets = (unsigned)(pixels / config::bucket_size);
    const unsigned blocks = (buckets + config::warps - 1) / config::warps;
    const unsigned warp = threadIdx.x / 32, heads_in_launch = gridDim.x / blocks;
    // All heads of the last buckets first: coarse levels come last and have the most contributions per pixel, and the heads
    // of a pixel are neighbours in memory (docs/performance/decisions.md#sorted-bucket-order).
    const bucket_view bucket = bucket_at(
            grad_output, contributions, segment_starts, grad_value, S, Q, runs, capacity, first_head, heads, first_pixel,
            pixels, blockIdx.x % heads_in_launch,
            (blocks - 1 - blockIdx.x / heads_in_launch) * config::warps + warp);
    if (bucket.pixels > 0) reduce_bucket(reinterpret_cast<warp_bucket*>(shared_memory)[warp], bucket);
}

}  // namespace msda
