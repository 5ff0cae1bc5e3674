// Third kernel of the sorted backward where many contributions fall on each pixel: a block sums one bucket, or a chunk of a
// very large one, in the order of the samples. Each value vector of the gradient is written once, in value's dtype.
// warp_reduce.cu does it for buckets of few contributions (docs/performance/decisions.md#sorted-block-or-warp).
//
// Contributions come in batches, which are sorted by pixel in shared memory: a stable counting sort. Each group of
// `config::lanes` lanes takes an equal share of the sorted batch and sums it in registers, one sum for the current pixel
// and one for the pixel after it. Where the pixel changes, it stores both as partial sums. The group that owns a pixel then
// collects the partial sums for it.
//
//     sorted batch   | 0 0 0 1 1 | 1 1 1 3 3 | 3 3 3 3 3 | ...     sort keys
//     group          |     0     |     1     |     2     |
//     partial[key + group]  0, 1     2,  4        5                no two (key, group) have the same place
#include "common/block_size.cuh"
#include "common/warp.cuh"
#include "sorted/reduction.cuh"

namespace msda {

constexpr int batch_size = config::chunk;       // contributions that are sorted at a time
constexpr int contributions_per_thread = batch_size / threads_per_block;
constexpr int groups_per_block = config::warps * groups_per_warp;
constexpr int pixels_per_group = (config::bucket_size + groups_per_block - 1) / groups_per_block;   // owned by a group

// Key 0 is the pixel before the bucket, key 1 + p the bucket's pixel p; `sort_keys` stands for no contribution.
constexpr int sort_keys = config::bucket_size + 1;

// Elements of the sums of a chunk in global memory.
constexpr int chunk_sum_size = config::bucket_size * padded_channels;

struct reduce_shared {
    contribution batch[batch_size];                             // sorted; `pixel_and_pair` has the sort key as its pixel
    // For the pixel of the key and for the pixel after it, at key + group: both grow along the batch.
    alignas(16) acc_t partial[sort_keys + groups_per_block][2][channel_tile];
    unsigned begin[sort_keys + 1];                              // of each key in the batch
    unsigned histogram[config::warps][sort_keys + 1];
    unsigned warp_sums[config::warps];
    // Slices of the bucket in `threads_per_block` runs at a time, numbered through: where each ends and where its
    // contributions inside the bucket begin; and what leads from such a number to the position in the run.
    unsigned end[threads_per_block], inside[threads_per_block], to_run[threads_per_block];
    long long from, to;                                         // contributions of the bucket that are in the chunk
    bool last;                                                  // whether all other chunks of the bucket are done
};
static_assert(sizeof(reduce_shared) == config::shared_bytes, "the planner and the kernel disagree");

// ---- a batch -------------------------------------------------------------------------------------------------

// Sorts contributions [from, to) of the slices in the runs from `run` on into shared.batch.
__device__ __forceinline__ void sort_batch(
        reduce_shared& shared, const bucket_view& bucket, long long run, unsigned from, unsigned to) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    unsigned* histogram = shared.histogram[warp];
    for (int key = lane; key <= sort_keys; key += 32) histogram[key] = 0;
    __syncwarp();
    contribution loaded[contributions_per_thread];
    unsigned rank[contributions_per_thread];    // among those of this warp and key
    int key[contributions_per_thread];
#pragma unroll
    for (int j = 0; j < contributions_per_thread; ++j) {
        const unsigned i = from + (warp * contributions_per_thread + j) * 32 + lane;
        key[j] = sort_keys;
        if (i < to) {
            int owner = 0;      // the run that holds contribution i: a binary search
#pragma unroll
            for (int step = threads_per_block / 2; step > 0; step /= 2)
                if (shared.end[owner + step - 1] <= i) owner += step;
            copy(bucket.contributions[(run + owner) * bucket.capacity + (shared.to_run[owner] + i)], loaded[j]);
            key[j] = i < shared.inside[owner] ? 0 : (int)(loaded[j].pixel_and_pair >> 1) + 1;
            prefetch(bucket.grad_output + (long long)loaded[j].query * vector_pitch);
        }
    }
#pragma unroll
    for (int j = 0; j < contributions_per_thread; ++j) {
        const unsigned peers = __match_any_sync(0xffffffffu, key[j]);
        const unsigned lower = __popc(peers & ((1u << lane) - 1));
        rank[j] = histogram[key[j]] + lower;
        __syncwarp();
        if (lower == 0) histogram[key[j]] += __popc(peers);
        __syncwarp();
    }
    __syncthreads();
    // Exclusive scans: over the warps in each histogram, and over the keys in shared.begin.
    if (warp == 0) {
        unsigned before = 0;
        for (int first = 0; first <= sort_keys; first += 32) {
            const int of_lane = first + lane;
            unsigned total = 0;
            if (of_lane <= sort_keys) {
#pragma unroll
                for (int w = 0; w < config::warps; ++w) {
                    const unsigned count = shared.histogram[w][of_lane];
                    shared.histogram[w][of_lane] = total;
                    total += count;
                }
            }
            const unsigned end = inclusive_sum(total);
            if (of_lane <= sort_keys) shared.begin[of_lane] = before + end - total;
            before += __shfl_sync(0xffffffffu, end, 31);
        }
    }
    __syncthreads();
#pragma unroll
    for (int j = 0; j < contributions_per_thread; ++j) {
        if (key[j] == sort_keys) continue;
        loaded[j].pixel_and_pair = 2 * key[j] + (loaded[j].pixel_and_pair & 1);
        copy(loaded[j], shared.batch[shared.begin[key[j]] + histogram[key[j]] + rank[j]]);
    }
    __syncthreads();
}

__device__ __forceinline__ void store_sum(acc_t* target, const acc_t (&sum)[config::vec]) {
    sum_vector x;
#pragma unroll
    for (int v = 0; v < config::vec; ++v) x.element[v] = sum[v];
    *reinterpret_cast<decltype(x.word)*>(target) = x.word;
}

__device__ __forceinline__ void store_partial_sums(
        reduce_shared& shared, int place, int lane, const acc_t (&first)[config::vec],
        const acc_t (&second)[config::vec]) {
    store_sum(&shared.partial[place][0][lane * config::vec], first);
    store_sum(&shared.partial[place][1][lane * config::vec], second);
}

// Adds the partial sums that the groups stored for `key`: those of its pixel (`second` is 0), or of the pixel after it (1).
__device__ __forceinline__ void collect_partial_sums(
        const reduce_shared& shared, int key, int second, unsigned share, int lane, acc_t (&sum)[config::vec]) {
    const unsigned begin = shared.begin[key], end = shared.begin[key + 1];
    if (begin == end) return;
    for (unsigned group = begin / share; group <= (end - 1) / share; ++group) {
        sum_vector x;
        x.word = *reinterpret_cast<const decltype(x.word)*>(&shared.partial[key + group][second][lane * config::vec]);
#pragma unroll
        for (int v = 0; v < config::vec; ++v) sum[v] += x.element[v];
    }
}

// Sums the sorted batch of `count` contributions to partial sums; a group takes `share` of them. `idle`: this lane's
// channels are beyond D.
__device__ __forceinline__ void sum_batch(
        reduce_shared& shared, const value_t* grad_output, unsigned count, unsigned share, bool idle) {
    const int group = threadIdx.x / config::lanes, lane = threadIdx.x % config::lanes;
    const unsigned last = min((group + 1) * share, count);
    acc_t first[config::vec], second[config::vec];
    int key = -1;
#pragma unroll 1
    for (unsigned i = group * share; i < last; i += config::unroll) {
        contribution added[config::unroll];
        channel_vector grad[config::unroll];
#pragma unroll
        for (int u = 0; u < config::unroll; ++u) {
            copy(shared.batch[min(i + u, last - 1)], added[u]);
            const value_t* of_query = grad_output + (long long)added[u].query * vector_pitch;
            grad[u] = load_channels_or_zeros(!idle, (address_t)of_query);
        }
#pragma unroll
        for (int u = 0; u < config::unroll; ++u) {
            if (i + u >= last) break;
            const int next = (int)(added[u].pixel_and_pair >> 1);
            if (next != key) {
                if (key >= 0) store_partial_sums(shared, key + group, lane, first, second);
                key = next;
#pragma unroll
                for (int v = 0; v < config::vec; ++v) first[v] = second[v] = 0;
            }
            acc_t x[config::vec];
            unpack(grad[u], x);
#pragma unroll
            for (int v = 0; v < config::vec; ++v) first[v] = fma(added[u].first, x[v], first[v]);
            if (added[u].pixel_and_pair & 1) {
#pragma unroll
                for (int v = 0; v < config::vec; ++v) second[v] = fma(added[u].second, x[v], second[v]);
            }
        }
    }
    if (key >= 0) store_partial_sums(shared, key + group, lane, first, second);
}

// ---- a bucket ------------------------------------------------------------------------------------------------

// Sums all contributions to a bucket and writes grad_value; or, if not `whole`, sums the contributions [shared.from,
// shared.to) and writes `chunk_sums`.
template <bool whole>
__device__ __forceinline__ void reduce_bucket(
        reduce_shared& shared, const bucket_view& bucket, [[maybe_unused]] acc_t* chunk_sums) {
    const int group = threadIdx.x / config::lanes, lane = threadIdx.x % config::lanes;
#pragma unroll 1
    for (int tile = 0; tile < channel_tiles; ++tile) {
        const int channel = tile * channel_tile + lane * config::vec;
        const bool idle = config::D % channel_tile != 0 && channel >= config::D;
        acc_t sum[pixels_per_group][config::vec];
#pragma unroll
        for (int owned = 0; owned < pixels_per_group; ++owned)
#pragma unroll
            for (int v = 0; v < config::vec; ++v) sum[owned][v] = 0;

        [[maybe_unused]] long long before = 0;      // contributions of the runs before `run`
#pragma unroll 1
        for (long long run = 0; run < bucket.runs && (whole || before < shared.to); run += threads_per_block) {
            const bucket_slice slice = slice_of(bucket, run + threadIdx.x);
            const unsigned count = slice.count();
            unsigned total;
            const unsigned end = inclusive_sum(count, shared.warp_sums, total), begin = end - count;
            shared.end[threadIdx.x] = end;
            shared.inside[threadIdx.x] = begin + (slice.inside - slice.begin);
            shared.to_run[threadIdx.x] = slice.begin - begin;
            __syncthreads();
            const unsigned last = whole ? total : (unsigned)min(shared.to - before, (long long)total);
            unsigned at = 0;
            if (!whole && shared.from > before) at = (unsigned)min(shared.from - before, (long long)total);
#pragma unroll 1
            for (; at < last; at += batch_size) {
                const unsigned in_batch = min(last - at, (unsigned)batch_size);
                const unsigned share = (in_batch + groups_per_block - 1) / groups_per_block;
                sort_batch(shared, bucket, run, at, at + in_batch);
                sum_batch(shared, bucket.grad_output + channel, in_batch, share, idle);
                __syncthreads();
#pragma unroll
                for (int owned = 0; owned < pixels_per_group; ++owned) {
                    const int pixel = owned * groups_per_block + group;
                    if (pixel < config::bucket_size) {
                        collect_partial_sums(shared, pixel + 1, 0, share, lane, sum[owned]);
                        collect_partial_sums(shared, pixel, 1, share, lane, sum[owned]);
                    }
                }
                __syncthreads();
            }
            if (!whole) before += total;
            __syncthreads();
        }

#pragma unroll
        for (int owned = 0; owned < pixels_per_group; ++owned) {
            const int pixel = owned * groups_per_block + group;
            if (pixel >= config::bucket_size || pixel >= bucket.pixels || idle) continue;
            if constexpr (whole) store_value_vector(bucket, pixel, channel, sum[owned]);
            else store_sum(chunk_sums + pixel * padded_channels + channel, sum[owned]);
        }
    }
}

// Adds up the sums of all chunks of a bucket, in their order, and writes grad_value.
__device__ __forceinline__ void add_chunks(const bucket_view& bucket, const acc_t* chunk_sums, unsigned chunks) {
    const int group = threadIdx.x / config::lanes, lane = threadIdx.x % config::lanes;
#pragma unroll 1
    for (int pixel = group; pixel < bucket.pixels; pixel += groups_per_block)
#pragma unroll 1
        for (int channel = lane * config::vec; channel < config::D; channel += channel_tile) {
            acc_t sum[config::vec];
#pragma unroll
            for (int v = 0; v < config::vec; ++v) sum[v] = 0;
#pragma unroll 4
            for (unsigned chunk = 0; chunk < chunks; ++chunk) {
                sum_vector x;
                const acc_t* of_pixel = chunk_sums + (long long)chunk * chunk_sum_size + pixel * padded_channels;
                x.word = __ldcg(reinterpret_cast<const decltype(x.word)*>(of_pixel + channel));
#pragma unroll
                for (int v = 0; v < config::vec; ++v) sum[v] += x.element[v];
            }
            store_value_vector(bucket, pixel, channel, sum);
        }
}

// `counts` is null where no bucket can be so large that it is split; else split_buckets.cu has written `list`.
extern "C" __global__ void __launch_bounds__(threads_per_block, config::min_blocks) msda_block_reduce(
        const value_t* __restrict__ grad_output, const contribution* __restrict__ contributions,
        const unsigned short* __restrict__ segment_starts, value_t* __restrict__ grad_value, long long S, long long Q,
        long long runs, long long capacity, long long first_head, long long heads, long long first_pixel,
        long long pixels, chunk_counts* counts, const bucket_chunk* __restrict__ list, acc_t* chunk_sums,
        long long contributions_per_chunk) {
    MSDA_SHARED_MEMORY(shared_memory);
    reduce_shared& shared = *reinterpret_cast<reduce_shared*>(shared_memory);
    const unsigned buckets = (unsigned)(pixels / config::bucket_size), heads_in_launch = gridDim.x / buckets;
    // The chunks of large buckets first.
    const unsigned listed = counts ? counts->listed : 0;
#pragma unroll 1
    for (unsigned at = blockIdx.x; at < listed; at += gridDim.x) {
        const bucket_chunk chunk = list[at];
        const bucket_view bucket = bucket_at(
                grad_output, contributions, segment_starts, grad_value, S, Q, runs, capacity, first_head, heads,
                first_pixel, pixels, chunk.bucket / buckets, chunk.bucket % buckets);
        if (bucket.pixels == 0) continue;
        if (threadIdx.x == 0) {
            shared.from = chunk.number * contributions_per_chunk;
            shared.to = shared.from + contributions_per_chunk;
        }
        __syncthreads();
        acc_t* of_bucket = chunk_sums + (long long)chunk.first * chunk_sum_size;
        reduce_bucket<false>(shared, bucket, of_bucket + chunk.number * chunk_sum_size);
        __threadfence();
        __syncthreads();
        if (threadIdx.x == 0)
            shared.last = atomicAdd(&counts->of_bucket[chunk.bucket].done, 1u) == chunk.chunks - 1;
        __syncthreads();
        if (shared.last) {
            __threadfence();
            add_chunks(bucket, of_bucket, chunk.chunks);
        }
    }

    // The last buckets first: coarse levels come last and have the most contributions.
    const unsigned head_in_launch = blockIdx.x % heads_in_launch, number = buckets - 1 - blockIdx.x / heads_in_launch;
    if (counts && counts->of_bucket[head_in_launch * buckets + number].chunks > 1) return;
    const bucket_view bucket = bucket_at(
            grad_output, contributions, segment_starts, grad_value, S, Q, runs, capacity, first_head, heads, first_pixel,
            pixels, head_in_launch, number);
    if (bucket.pixels > 0) reduce_bucket<true>(shared, bucket, nullptr);
}

}  // namespace msda
