// Batches of contributions to a bucket: how a warp adds them to its sums in shared memory.
//
// A warp sorts a batch by pixel, a stable counting sort, and each group of `config::lanes` lanes takes an equal share of it.
// Where buckets have few contributions, it does not sort, and a group takes those to its own pixels. No barrier of the block.
#pragma once
#include "common/warp.cuh"
#include "sorted/reduction.cuh"

namespace msda {

constexpr int batch_size = config::chunk;       // contributions that are loaded at a time
constexpr bool sorts_batches = batch_size > 32;

constexpr int contributions_per_lane = batch_size / 32;

// Key 0 is the pixel before the bucket, key 1 + p the bucket's pixel p. The last key stands for no contribution, and its sum
// for the pixel after the bucket.
constexpr int max_keys = config::bucket_size + 2;

// Elements of the sums of a chunk in global memory.
constexpr long long chunk_sum_size = (long long)config::bucket_size * padded_channels;

// Shared memory of a warp.
struct warp_bucket {
    contribution batch[batch_size + config::unroll];    // sorted; `pixel_and_pair` has the key as its pixel
    alignas(16) acc_t sum[max_keys][channel_tile];
    alignas(16) unsigned begin[max_keys];               // of each key in the batch
};
static_assert(config::warps * sizeof(warp_bucket) == config::shared_bytes, "the planner and the kernel disagree");

using lane_sum = acc_t[config::vec];

// Words of 16 bytes, or one smaller word, that a lane's sum is stored in. Words of the same number are next to each other.
enum : int { in_word = config::vec * sizeof(acc_t) > 16 ? 16 / sizeof(acc_t) : config::vec, words = config::vec / in_word };
using sum_word = vector<acc_t, in_word>;

__device__ __forceinline__ sum_word* word_of(acc_t* sums, int lane, int word) {
    return reinterpret_cast<sum_word*>(sums) + word * config::lanes + lane;
}

__device__ __forceinline__ void set_to_zero(lane_sum& sum) {
#pragma unroll
    for (int v = 0; v < config::vec; ++v) sum[v] = 0;
}

// To and from the sums of a pixel, in memory of any kind.
__device__ __forceinline__ void store_sum(acc_t* sums, int lane, const lane_sum& sum) {
#pragma unroll
    for (int w = 0; w < words; ++w) {
        sum_word word;
#pragma unroll
        for (int v = 0; v < in_word; ++v) word.element[v] = sum[w * in_word + v];
        word_of(sums, lane, w)->word = word.word;
    }
}
__device__ __forceinline__ void add_to_sum(acc_t* sums, int lane, const lane_sum& added) {
#pragma unroll
    for (int w = 0; w < words; ++w) {
        sum_word word;
        word.word = word_of(sums, lane, w)->word;
#pragma unroll
        for (int v = 0; v < in_word; ++v) word.element[v] += added[w * in_word + v];
        word_of(sums, lane, w)->word = word.word;
    }
}
__device__ __forceinline__ void load_sum(const acc_t* sums, int lane, lane_sum& sum) {
#pragma unroll
    for (int w = 0; w < words; ++w) {
        sum_word word;
        word.word = word_of(const_cast<acc_t*>(sums), lane, w)->word;
#pragma unroll
        for (int v = 0; v < in_word; ++v) sum[w * in_word + v] = word.element[v];
    }
}

// ---- a batch -------------------------------------------------------------------------------------------------

// Where the contributions of 32 runs lie, of which each lane has one.
struct lane_run {
    unsigned first;     // the run of lane 0
    unsigned end;       // where the contributions of this lane's run end, counted through the runs
    unsigned to_run;    // what leads from such a number to the position in the run
    unsigned inside;    // where in the run those begin whose first pixel is in the bucket
};

// Loads contribution `i` of 32 runs, if it is before `to`, and asks for its vector of grad_output. Returns its key. By all lanes.
__device__ __forceinline__ unsigned load_contribution(
        const reduction_arrays& arrays, const bucket_view& bucket, const lane_run& run, const value_t* grad_output, unsigned i,
        unsigned to, unsigned no_key, contribution& loaded) {
    int owner = 0;      // the lane whose run holds it: a binary search
#pragma unroll
    for (int step = 16; step > 0; step /= 2)
        if (__shfl_sync(0xffffffffu, run.end, owner + step - 1) <= i) owner += step;
    const unsigned in_run = __shfl_sync(0xffffffffu, run.to_run, owner) + i;
    const unsigned inside = __shfl_sync(0xffffffffu, run.inside, owner);
    if (i >= to) return no_key;
    copy(bucket.of_run(arrays, run.first + owner)[in_run], loaded);
    prefetch(grad_output + (long long)loaded.query * vector_pitch);
    return in_run < inside ? 0 : (loaded.pixel_and_pair >> 1) + 1;
}

// Sorts contributions [from, to) of 32 runs into shared.batch.
__device__ __forceinline__ void sort_batch(
        warp_bucket& shared, const reduction_arrays& arrays, const bucket_view& bucket, const lane_run& run,
        const value_t* grad_output, unsigned from, unsigned to, int keys) {
    const int lane = threadIdx.x % 32, no_key = keys - 1;
    contribution loaded[contributions_per_lane];
    unsigned key_and_rank[contributions_per_lane];     // rank among those of the same key
#pragma unroll
    for (int j = 0; j < contributions_per_lane; ++j) {
        key_and_rank[j] = no_key;
        if (from + 32 * j < to)
            key_and_rank[j] = load_contribution(
                arrays, bucket, run, grad_output, from + 32 * j + lane, to, no_key, loaded[j]);
    }
    for (int k = lane; k < keys; k += 32) shared.begin[k] = 0;
    __syncwarp();
#pragma unroll
    for (int j = 0; j < contributions_per_lane; ++j) {
        if (from + 32 * j >= to) continue;
        const unsigned key = key_and_rank[j], peers = __match_any_sync(0xffffffffu, key);
        const unsigned lower = __popc(peers & ((1u << lane) - 1)), before = shared.begin[key];
        key_and_rank[j] |= (before + lower) << 16;
        __syncwarp();
        if (lower == 0) shared.begin[key] = before + __popc(peers);
        __syncwarp();
    }
    unsigned before = 0;
#pragma unroll 1
    for (int first = 0; first < keys; first += 32) {
        const unsigned count = first + lane < keys ? shared.begin[first + lane] : 0, end = inclusive_sum(count);
        if (first + lane < keys) shared.begin[first + lane] = before + end - count;
        before += __shfl_sync(0xffffffffu, end, 31);
    }
    __syncwarp();
#pragma unroll
    for (int j = 0; j < contributions_per_lane; ++j) {
        const unsigned key = key_and_rank[j] & 0xffff;
        if (key == no_key) continue;
        loaded[j].pixel_and_pair = 2 * key + (loaded[j].pixel_and_pair & 1);
        copy(loaded[j], shared.batch[shared.begin[key] + (key_and_rank[j] >> 16)]);
    }
    // What follows the batch is loaded, but not added.
    const contribution nothing = {0, 0, 0, 0};
    if (lane < config::unroll) copy(nothing, shared.batch[to - from + lane]);
    __syncwarp();
}

// Adds the sorted batch of `count` contributions to shared.sum. `grad_output` begins at this lane's channels; `idle`: these
// are beyond D. A group sums its share in registers, for the current pixel and for the next one, and adds the sum where the
// pixel changes. Only the last pixels of a share are those of other groups, too: their sums follow when all groups are done,
// one group after the other.
//
//     sorted batch   | 0 0 0 1 1 | 1 1 1 3 3 | 3 3 3 3 3 |     keys
//     group          |     0     |     1     |     2     |
//     on the way           0           1, 2        -
//     in the end           1, 2        3, 4        3, 4
__device__ __forceinline__ void add_batch(warp_bucket& shared, const value_t* grad_output, unsigned count, bool idle) {
    const int group = threadIdx.x % 32 / config::lanes, lane = threadIdx.x % config::lanes;
    const unsigned share = (count + groups_per_warp * config::unroll - 1) / (groups_per_warp * config::unroll) * config::unroll;
    const unsigned end = min((group + 1) * share, count);
    lane_sum first, second;     // sums for the pixel of `key` and for the pixel after it
    int key = -1;
#pragma unroll 1
    for (unsigned i = group * share; i < end; i += config::unroll) {
        contribution added[config::unroll];
        channel_vector grad[config::unroll];
#pragma unroll
        for (int u = 0; u < config::unroll; ++u) {
            copy(shared.batch[i + u], added[u]);
            grad[u] = load_channels_or_zeros(!idle, (address_t)(grad_output + (long long)added[u].query * vector_pitch));
        }
#pragma unroll
        for (int u = 0; u < config::unroll; ++u) {
            if (i + u >= end) break;
            const int next = (int)(added[u].pixel_and_pair >> 1);
            if (next != key) {
                const bool follows = key >= 0 && next == key + 1;
                if (key >= 0) {
                    add_to_sum(shared.sum[key], lane, first);
                    if (!follows) add_to_sum(shared.sum[key + 1], lane, second);
                }
#pragma unroll
                for (int v = 0; v < config::vec; ++v) {
                    first[v] = follows ? second[v] : 0;
                    second[v] = 0;
                }
                key = next;
            }
            lane_sum x;
            unpack(grad[u], x);
#pragma unroll
            for (int v = 0; v < config::vec; ++v) first[v] = fma(added[u].first, x[v], first[v]);
            if (added[u].pixel_and_pair & 1) {
#pragma unroll
                for (int v = 0; v < config::vec; ++v) second[v] = fma(added[u].second, x[v], second[v]);
            }
        }
    }
#pragma unroll 1
    for (int g = 0; g < groups_per_warp; ++g) {
        __syncwarp();
        if (g == group && key >= 0) {
            add_to_sum(shared.sum[key], lane, first);
            add_to_sum(shared.sum[key + 1], lane, second);
        }
    }
    __syncwarp();
}

// Adds contributions [from, to) of 32 runs to shared.sum, at most 32 of them: for buckets of so few that sorting them takes
// longer. A group adds those to the pixels that it owns, one after the other.
__device__ __forceinline__ void add_unsorted_batch(
        warp_bucket& shared, const reduction_arrays& arrays, const bucket_view& bucket, const lane_run& run,
        const value_t* grad_output, unsigned from, unsigned to, int keys, bool idle) {
    const int group = threadIdx.x % 32 / config::lanes, lane = threadIdx.x % config::lanes;
    const int owned_shift = bucket.shift > log2_of(groups_per_warp) ? bucket.shift - log2_of(groups_per_warp) : 0;
    contribution loaded;
    const unsigned key =
        load_contribution(arrays, bucket, run, grad_output, from + threadIdx.x % 32, to, keys - 1, loaded);
    const bool present = from + threadIdx.x % 32 < to, pair = present && loaded.pixel_and_pair & 1;
    if (present) {
        loaded.pixel_and_pair = 2 * key + pair;
        copy(loaded, shared.batch[threadIdx.x % 32]);
    }
    unsigned of_group = 0;      // lanes whose contribution this group adds
#pragma unroll
    for (int g = 0; g < groups_per_warp; ++g) {
        const bool last = g == groups_per_warp - 1;
        const int first_owner = (int)key >> owned_shift, second_owner = (int)(key + 1) >> owned_shift;
        const bool wanted = (present && (last ? first_owner >= g : first_owner == g)) ||
                            (pair && (last ? second_owner >= g : second_owner == g));
        const unsigned lanes = __ballot_sync(0xffffffffu, wanted);
        if (g == group) of_group = lanes;
    }
    __syncwarp();
    const int begin = group << owned_shift, end = group == groups_per_warp - 1 ? keys : begin + (1 << owned_shift);
    while (of_group) {
        int from_lane[config::unroll];
        channel_vector grad[config::unroll];
#pragma unroll
        for (int u = 0; u < config::unroll; ++u) {
            from_lane[u] = of_group ? __ffs((int)of_group) - 1 : -1;
            of_group &= of_group - 1;
            if (from_lane[u] < 0) continue;
            const long long query = shared.batch[from_lane[u]].query;
            grad[u] = load_channels_or_zeros(!idle, (address_t)(grad_output + query * vector_pitch));
        }
#pragma unroll
        for (int u = 0; u < config::unroll; ++u) {
            if (from_lane[u] < 0) break;
            contribution added;
            copy(shared.batch[from_lane[u]], added);
            const int at = (int)(added.pixel_and_pair >> 1);
            lane_sum x, part;
            unpack(grad[u], x);
            if (at >= begin && at < end) {
#pragma unroll
                for (int v = 0; v < config::vec; ++v) part[v] = added.first * x[v];
                add_to_sum(shared.sum[at], lane, part);
            }
            if (added.pixel_and_pair & 1 && at + 1 >= begin && at + 1 < end) {
#pragma unroll
                for (int v = 0; v < config::vec; ++v) part[v] = added.second * x[v];
                add_to_sum(shared.sum[at + 1], lane, part);
            }
        }
    }
    __syncwarp();
}

}  // namespace msda
