// Second pass of the sum without atomics where few parts fall on each row: a warp adds up the parts of one bin in shared
// memory, in the order of the samples, and writes its rows of grad_value, each once, in value's dtype. msda_sum.cu does
// the same for bins of many parts, by a block each.
//
// A warp alone, without barriers: its groups of config::lanes lanes own some rows of the bin each and pick what falls on them
// out of 32 parts at a time. Where nearly all of the 32 fall on few rows (padded queries, all at one point), the groups
// share the parts of a row instead, and add up their sums.
#include "common/warp.cuh"
#include "sorted/buckets.cuh"

namespace msda {

// Rows of 32 parts up to which the groups share them.
enum { few_vectors = 4 };

constexpr int vectors_per_group = (config::bucket_size + groups_per_warp - 1) / groups_per_warp;      // rows of a group

struct warp_bucket {
    contribution entries[32];
    alignas(16) acc_t sum[config::bucket_size][channel_tiles * channel_tile];
};

// Adds factor * x to the channels of a lane.
__device__ __forceinline__ void add_scaled(acc_t* target, acc_t factor, const acc_t (&x)[config::vec]) {
    sum_vector sum;
    sum.word = *reinterpret_cast<const decltype(sum.word)*>(target);
#pragma unroll
    for (int v = 0; v < config::vec; ++v) sum.element[v] = fma(factor, x[v], sum.element[v]);
    *reinterpret_cast<decltype(sum.word)*>(target) = sum.word;
}

// The channels of a lane of grad_output of a query.
__device__ __forceinline__ void load_query_channels(
        const bucket& bin, unsigned query, int lane, channel_vector (&x)[channel_tiles]) {
    const value_t* of_query = bin.grad_output + (long long)query * (config::M * config::D);
#pragma unroll
    for (int turn = 0; turn < channel_tiles; ++turn) {
        const int channel = turn * channel_tile + lane * config::vec;
        if (config::D % channel_tile == 0 || channel < config::D) x[turn] = load_channels((address_t)(of_query + channel));
    }
}

// Adds the parts that the lanes hold, one each, where `row` is not -2: their row of the bin, -1 for the row before it.
__device__ __forceinline__ void add_contributions(
        warp_bucket& tile, const bucket& bin, contribution entry, int row, int lane, int low, int high) {
    const int group = threadIdx.x % 32 / config::lanes;
    const int first = row < 0 ? -2 : row, second = row > -2 && entry.row_and_pair & 1 && row + 1 < config::bucket_size ? row + 1 : -2;
    __syncwarp();
    entry.row_and_pair = (unsigned)(row + 1);
    copy(entry, tile.entries[threadIdx.x % 32]);
    unsigned mine = 0;
#pragma unroll
    for (int g = 0; g < groups_per_warp; ++g) {
        const bool wanted = (first >= 0 && first / vectors_per_group == g) || (second >= 0 && second / vectors_per_group == g);
        const unsigned those = __ballot_sync(0xffffffffu, wanted);
        if (g == group) mine = those;
    }
    const unsigned pairs = __ballot_sync(0xffffffffu, second >= 0);
    __syncwarp();
    while (mine) {
        int index[config::unroll];
        channel_vector x[config::unroll][channel_tiles];
        unsigned left = mine;
#pragma unroll
        for (int u = 0; u < config::unroll; ++u) {
            index[u] = left ? __ffs((int)left) - 1 : -1;
            left &= left - 1;
            if (index[u] < 0) continue;
            load_query_channels(bin, tile.entries[index[u]].query, lane, x[u]);
        }
        mine = left;
#pragma unroll
        for (int u = 0; u < config::unroll; ++u) {
            if (index[u] < 0) break;
            contribution part;
            copy(tile.entries[index[u]], part);
            const int at = (int)part.row_and_pair - 1;
            const bool adds_first = at >= low && at < high;
            const bool adds_second = (pairs >> index[u] & 1) && at + 1 >= low && at + 1 < high;
#pragma unroll
            for (int turn = 0; turn < channel_tiles; ++turn) {
                const int channel = turn * channel_tile + lane * config::vec;
                if (config::D % channel_tile != 0 && channel >= config::D) continue;
                acc_t of_lane[config::vec];
                unpack(x[u][turn], of_lane);
                if (adds_first) add_scaled(&tile.sum[at][channel], part.first, of_lane);
                if (adds_second) add_scaled(&tile.sum[at + 1][channel], part.second, of_lane);
            }
        }
    }
}

// The same where the parts are many and their rows few: `first_of_row` are the lanes that hold the first part of a row.
__device__ __forceinline__ void add_crowded_contributions(
        warp_bucket& tile, const bucket& bin, const contribution& entry, int row, int lane, unsigned first_of_row) {
    const int group = threadIdx.x % 32 / config::lanes;
    __syncwarp();
    copy(entry, tile.entries[threadIdx.x % 32]);
    __syncwarp();
    while (first_of_row) {
        const int leader = __ffs((int)first_of_row) - 1, at = __shfl_sync(0xffffffffu, row, leader);
        first_of_row &= first_of_row - 1;
        unsigned mine = __ballot_sync(0xffffffffu, row == at);
        for (int skipped = 0; skipped < group; ++skipped) mine &= mine - 1;
        acc_t here[channel_tiles][config::vec], after[channel_tiles][config::vec];
#pragma unroll
        for (int turn = 0; turn < channel_tiles; ++turn)
#pragma unroll
            for (int v = 0; v < config::vec; ++v) here[turn][v] = after[turn][v] = 0;
        while (mine) {
            int index[config::unroll];
            channel_vector x[config::unroll][channel_tiles];
#pragma unroll
            for (int u = 0; u < config::unroll; ++u) {
                index[u] = mine ? __ffs((int)mine) - 1 : -1;
#pragma unroll
                for (int skipped = 0; skipped < groups_per_warp; ++skipped) mine &= mine - 1;
                if (index[u] < 0) continue;
                load_query_channels(bin, tile.entries[index[u]].query, lane, x[u]);
            }
#pragma unroll
            for (int u = 0; u < config::unroll; ++u) {
                if (index[u] < 0) break;
                contribution part;
                copy(tile.entries[index[u]], part);
#pragma unroll
                for (int turn = 0; turn < channel_tiles; ++turn) {
                    if (config::D % channel_tile != 0 && turn * channel_tile + lane * config::vec >= config::D) continue;
                    acc_t of_lane[config::vec];
                    unpack(x[u][turn], of_lane);
#pragma unroll
                    for (int v = 0; v < config::vec; ++v) {
                        here[turn][v] = fma(part.first, of_lane[v], here[turn][v]);
                        if (part.row_and_pair & 1) after[turn][v] = fma(part.second, of_lane[v], after[turn][v]);
                    }
                }
            }
        }
#pragma unroll
        for (int turn = 0; turn < channel_tiles; ++turn)
#pragma unroll
            for (int v = 0; v < config::vec; ++v)
#pragma unroll
                for (int step = config::lanes; step < 32; step *= 2) {
                    here[turn][v] += __shfl_xor_sync(0xffffffffu, here[turn][v], step);
                    after[turn][v] += __shfl_xor_sync(0xffffffffu, after[turn][v], step);
                }
        if (group == 0) {
#pragma unroll
            for (int turn = 0; turn < channel_tiles; ++turn) {
                const int channel = turn * channel_tile + lane * config::vec;
                if (at >= 0) add_scaled(&tile.sum[at][channel], 1, here[turn]);
                if (at + 1 < config::bucket_size) add_scaled(&tile.sum[at + 1][channel], 1, after[turn]);
            }
        }
        __syncwarp();
    }
}

__device__ __forceinline__ void reduce_bucket(warp_bucket& tile, const bucket& bin) {
    const int in_warp = threadIdx.x % 32, group = in_warp / config::lanes, lane = in_warp % config::lanes;
    const int low = group * vectors_per_group, high = min(low + vectors_per_group, config::bucket_size);     // rows of this group
#pragma unroll 4
    for (int row = low; row < high; ++row)
#pragma unroll
        for (int turn = 0; turn < channel_tiles; ++turn) {
            sum_vector zero;
#pragma unroll
            for (int v = 0; v < config::vec; ++v) zero.element[v] = 0;
            *reinterpret_cast<decltype(zero.word)*>(&tile.sum[row][turn * channel_tile + lane * config::vec]) = zero.word;
        }

#pragma unroll 1
    for (long long run = 0; run < bin.runs; run += 32) {
        const segment stretch = segment_of(bin, run + in_warp);
        const unsigned count = stretch.count(), end = inclusive_sum(count);
        const unsigned total = __shfl_sync(0xffffffffu, end, 31);
#pragma unroll 1
        for (unsigned at = 0; at < total; at += 32) {
            const unsigned i = at + in_warp;
            int of = 0;     // the lane whose run holds part i
#pragma unroll
            for (int step = 16; step > 0; step /= 2)
                if (__shfl_sync(0xffffffffu, end, of + step - 1) <= i) of += step;
            const unsigned in_run = __shfl_sync(0xffffffffu, stretch.from - (end - count), of) + i;
            const unsigned own = __shfl_sync(0xffffffffu, stretch.own, of);
            contribution entry = {0, 0, 0, 0};
            int row = -2;
            if (i < total) {
                copy(bin.entries[(run + of) * bin.capacity + in_run], entry);
                row = in_run < own ? -1 : (int)(entry.row_and_pair >> 1);
                prefetch(bin.grad_output + (long long)entry.query * (config::M * config::D));
            }
            const unsigned peers = __match_any_sync(0xffffffffu, row);
            const unsigned first_of_row = __ballot_sync(0xffffffffu, row > -2 && !(peers & ((1u << in_warp) - 1)));
            if (__popc(first_of_row) <= few_vectors && at + 32 <= total)
                add_crowded_contributions(tile, bin, entry, row, lane, first_of_row);
            else
                add_contributions(tile, bin, entry, row, lane, low, high);
        }
    }

    const int last = min(bin.rows, high);
#pragma unroll 4
    for (int row = low; row < last; ++row)
#pragma unroll
        for (int turn = 0; turn < channel_tiles; ++turn) {
            const int channel = turn * channel_tile + lane * config::vec;
            if (config::D % channel_tile != 0 && channel >= config::D) continue;
            sum_vector sum;
            sum.word = *reinterpret_cast<const decltype(sum.word)*>(&tile.sum[row][channel]);
            write_value_vector(bin, row, channel, sum.element);
        }
}

extern "C" __global__ void __launch_bounds__(threads_per_block, resident_blocks) msda_warp_reduce(
        const value_t* __restrict__ grad_output, const contribution* __restrict__ entries,
        const unsigned short* __restrict__ starts, value_t* __restrict__ grad_value, long long S, long long Q,
        long long runs, long long capacity, long long first_head, long long heads, long long first_row, long long rows) {
    MSDA_SHARED_MEMORY(shared_memory);
    const unsigned bins = (unsigned)(rows / config::bucket_size), blocks = (bins + config::warps - 1) / config::warps;
    const unsigned warp = threadIdx.x / 32, in_launch = gridDim.x / blocks;
    // All heads of the last bins first: the coarse levels' hold the most parts, and the rows of the heads of a pixel are
    // neighbours in memory (decoder_900 142 -> 127 us with the sort, head by head 147; decoder_300 35 -> 30).
    const bucket bin = bucket_at(
            grad_output, entries, starts, grad_value, S, Q, runs, capacity, first_head, heads, first_row, rows,
            blockIdx.x % in_launch, (blocks - 1 - blockIdx.x / in_launch) * config::warps + warp);
    if (bin.rows > 0) reduce_bucket(reinterpret_cast<warp_bucket*>(shared_memory)[warp], bin);
}

}  // namespace msda
