// Second pass of the sum without atomics where many parts fall on each row: a block sums the parts of one bin and writes
// its rows of grad_value, each once, in value's dtype. Nothing is zeroed before or rounded after, and the order of every
// sum is that of the samples. atomic_add_channels.cu does the same for bins of few parts.
//
// Parts come config::chunk at a time and are sorted by row in shared memory, in order. config::lanes lanes are a group; each
// group takes an equal share of the sorted parts, keeps the sums of the current row and of the row after it in
// registers, and leaves them in shared memory when the row changes: at number (row + group), which no other group and
// row can have, because both grow along the list. Then each row's owner adds up what the groups left for it.
#include "common/warp.cuh"
#include "sorted/buckets.cuh"

namespace msda {

constexpr int groups_per_block = config::warps * groups_per_warp;
constexpr int sort_keys = config::bucket_size + 1;    // key 0: the row before the bin
constexpr int vectors_per_group = (config::bucket_size + groups_per_block - 1) / groups_per_block;
constexpr int contributions_per_thread = config::chunk / threads_per_block;

struct reduce_shared {
    contribution entries[config::chunk];
    alignas(16) acc_t partial[sort_keys + groups_per_block][2][channel_tile];
    unsigned begin[sort_keys + 1];                              // of each key in entries
    unsigned place[config::warps][sort_keys + 1];
    unsigned warp_sums[config::warps];
    unsigned end[threads_per_block], own[threads_per_block], in_run[threads_per_block];    // of threads_per_block runs at a time
    long long from, to;                                         // parts of the bin that the block sums
    bool last;                                                  // whether all other pieces of the bin are done
};

// Sums of a piece: [config::bucket_size][padded_channels].
constexpr int padded_channels = channel_tiles * channel_tile;

// Sorts the parts [from, to) of the runs from `run` on into shared.entries.
__device__ __forceinline__ void sort_contributions(
        reduce_shared& shared, const bucket& bin, long long run, unsigned from, unsigned to) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    unsigned* places = shared.place[warp];
    for (int key = lane; key <= sort_keys; key += 32) places[key] = 0;
    __syncwarp();
    contribution entry[contributions_per_thread];
    unsigned rank[contributions_per_thread];
    int key[contributions_per_thread];
#pragma unroll
    for (int take = 0; take < contributions_per_thread; ++take) {
        const unsigned i = from + (warp * contributions_per_thread + take) * 32 + lane;
        key[take] = sort_keys;      // none
        if (i < to) {
            int of = 0;             // the run that holds part i
#pragma unroll
            for (int step = threads_per_block / 2; step > 0; step /= 2)
                if (shared.end[of + step - 1] <= i) of += step;
            copy(bin.entries[(run + of) * bin.capacity + (shared.in_run[of] + i)], entry[take]);
            key[take] = i < shared.own[of] ? 0 : (int)(entry[take].row_and_pair >> 1) + 1;
            prefetch(bin.grad_output + (long long)entry[take].query * (config::M * config::D));
        }
    }
#pragma unroll
    for (int take = 0; take < contributions_per_thread; ++take) {
        const unsigned peers = __match_any_sync(0xffffffffu, key[take]);
        const unsigned lower = __popc(peers & ((1u << lane) - 1));
        rank[take] = places[key[take]] + lower;
        __syncwarp();
        if (lower == 0) places[key[take]] += __popc(peers);
        __syncwarp();
    }
    __syncthreads();
    if (warp == 0) {
        unsigned before = 0;
        for (int first = 0; first <= sort_keys; first += 32) {
            const int mine = first + lane;
            unsigned total = 0;
            if (mine <= sort_keys) {
#pragma unroll
                for (int w = 0; w < config::warps; ++w) {
                    const unsigned count = shared.place[w][mine];
                    shared.place[w][mine] = total;
                    total += count;
                }
            }
            const unsigned end = inclusive_sum(total);
            if (mine <= sort_keys) shared.begin[mine] = before + end - total;
            before += __shfl_sync(0xffffffffu, end, 31);
        }
    }
    __syncthreads();
#pragma unroll
    for (int take = 0; take < contributions_per_thread; ++take) {
        if (key[take] == sort_keys) continue;
        entry[take].row_and_pair = 2 * key[take] + (entry[take].row_and_pair & 1);
        copy(entry[take], shared.entries[shared.begin[key[take]] + places[key[take]] + rank[take]]);
    }
    __syncthreads();
}

__device__ __forceinline__ void store_sums(acc_t* target, const acc_t (&sum)[config::vec]) {
    sum_vector x;
#pragma unroll
    for (int v = 0; v < config::vec; ++v) x.element[v] = sum[v];
    *reinterpret_cast<decltype(x.word)*>(target) = x.word;
}

__device__ __forceinline__ void leave_partial_sums(
        reduce_shared& shared, int number, int lane, const acc_t (&first)[config::vec], const acc_t (&second)[config::vec]) {
    store_sums(&shared.partial[number][0][lane * config::vec], first);
    store_sums(&shared.partial[number][1][lane * config::vec], second);
}

// Adds what the groups left for `key`: the sums of its own row (0) or of the row after it (1).
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

// The sorted parts of a chunk: each group leaves the sums of its share.
__device__ __forceinline__ void sum_sorted(
        reduce_shared& shared, const value_t* incoming, unsigned count, unsigned share, bool idle) {
    const int group = threadIdx.x / config::lanes, lane = threadIdx.x % config::lanes;
    const unsigned last = min((group + 1) * share, count);
    acc_t here[config::vec], after[config::vec];
    int key = -1;
#pragma unroll 1
    for (unsigned i = group * share; i < last; i += config::unroll) {
        contribution entry[config::unroll];
        channel_vector row[config::unroll];
#pragma unroll
        for (int u = 0; u < config::unroll; ++u) {
            copy(shared.entries[min(i + u, last - 1)], entry[u]);
            row[u] = load_channels_or_zeros(!idle, (address_t)(incoming + (long long)entry[u].query * (config::M * config::D)));
        }
#pragma unroll
        for (int u = 0; u < config::unroll; ++u) {
            if (i + u >= last) break;
            const int next = (int)(entry[u].row_and_pair >> 1);
            if (next != key) {
                if (key >= 0) leave_partial_sums(shared, key + group, lane, here, after);
                key = next;
#pragma unroll
                for (int v = 0; v < config::vec; ++v) here[v] = after[v] = 0;
            }
            acc_t x[config::vec];
            unpack(row[u], x);
#pragma unroll
            for (int v = 0; v < config::vec; ++v) here[v] = fma(entry[u].first, x[v], here[v]);
            if (entry[u].row_and_pair & 1) {
#pragma unroll
                for (int v = 0; v < config::vec; ++v) after[v] = fma(entry[u].second, x[v], after[v]);
            }
        }
    }
    if (key >= 0) leave_partial_sums(shared, key + group, lane, here, after);
}

// Writes the sums of all parts of the bin to grad_value, or where it is not `whole` those of the parts
// [shared.from, shared.to) to `sums`.
template <bool whole>
__device__ __forceinline__ void sum_bucket(reduce_shared& shared, const bucket& bin, acc_t* sums) {
    const int group = threadIdx.x / config::lanes, lane = threadIdx.x % config::lanes;
#pragma unroll 1
    for (int turn = 0; turn < channel_tiles; ++turn) {
        const int channel = turn * channel_tile + lane * config::vec;
        const bool idle = config::D % channel_tile != 0 && channel >= config::D;
        acc_t sum[vectors_per_group][config::vec];
#pragma unroll
        for (int owned = 0; owned < vectors_per_group; ++owned)
#pragma unroll
            for (int v = 0; v < config::vec; ++v) sum[owned][v] = 0;

        [[maybe_unused]] long long before = 0;      // parts of the runs before these
#pragma unroll 1
        for (long long run = 0; run < bin.runs && (whole || before < shared.to); run += threads_per_block) {
            const segment stretch = segment_of(bin, run + threadIdx.x);
            const unsigned count = stretch.count();
            unsigned total;
            const unsigned end = inclusive_sum(count, shared.warp_sums, total), begin = end - count;
            shared.end[threadIdx.x] = end;
            shared.own[threadIdx.x] = begin + (stretch.own - stretch.from);
            shared.in_run[threadIdx.x] = stretch.from - begin;
            __syncthreads();
            const unsigned last = whole ? total : (unsigned)min(shared.to - before, (long long)total);
            unsigned at = 0;
            if (!whole && shared.from > before) at = (unsigned)min(shared.from - before, (long long)total);
#pragma unroll 1
            for (; at < last; at += config::chunk) {
                const unsigned in_chunk = min(last - at, (unsigned)config::chunk);
                const unsigned share = (in_chunk + groups_per_block - 1) / groups_per_block;
                sort_contributions(shared, bin, run, at, at + in_chunk);
                sum_sorted(shared, bin.grad_output + channel, in_chunk, share, idle);
                __syncthreads();
#pragma unroll
                for (int owned = 0; owned < vectors_per_group; ++owned) {
                    const int row = owned * groups_per_block + group;
                    if (row < config::bucket_size) {
                        collect_partial_sums(shared, row + 1, 0, share, lane, sum[owned]);
                        collect_partial_sums(shared, row, 1, share, lane, sum[owned]);
                    }
                }
                __syncthreads();
            }
            if (!whole) before += total;
            __syncthreads();
        }

#pragma unroll
        for (int owned = 0; owned < vectors_per_group; ++owned) {
            const int row = owned * groups_per_block + group;
            if (row >= config::bucket_size || row >= bin.rows || idle) continue;
            if (whole) write_value_vector(bin, row, channel, sum[owned]);
            else store_sums(sums + row * padded_channels + channel, sum[owned]);
        }
    }
}

// Adds up the sums of all pieces of a bin, in their order.
__device__ __forceinline__ void add_chunks(const bucket& bin, const acc_t* sums, unsigned pieces) {
    const int group = threadIdx.x / config::lanes, lane = threadIdx.x % config::lanes;
#pragma unroll 1
    for (int row = group; row < bin.rows; row += groups_per_block)
#pragma unroll 1
        for (int channel = lane * config::vec; channel < config::D; channel += channel_tile) {
            acc_t sum[config::vec];
#pragma unroll
            for (int v = 0; v < config::vec; ++v) sum[v] = 0;
#pragma unroll 4
            for (unsigned piece = 0; piece < pieces; ++piece) {
                sum_vector x;
                const acc_t* of_piece = sums + (long long)piece * (config::bucket_size * padded_channels) + row * padded_channels;
                x.word = __ldcg(reinterpret_cast<const decltype(x.word)*>(of_piece + channel));
#pragma unroll
                for (int v = 0; v < config::vec; ++v) sum[v] += x.element[v];
            }
            write_value_vector(bin, row, channel, sum);
        }
}

extern "C" __global__ void __launch_bounds__(threads_per_block, resident_blocks) msda_block_reduce(
        const value_t* __restrict__ grad_output, const contribution* __restrict__ entries,
        const unsigned short* __restrict__ starts, value_t* __restrict__ grad_value, long long S, long long Q,
        long long runs, long long capacity, long long first_head, long long heads, long long first_row, long long rows,
        chunk_counts* counts, const bucket_chunk* __restrict__ pieces, acc_t* sums, long long piece) {
    MSDA_SHARED_MEMORY(shared_memory);
    reduce_shared& shared = *reinterpret_cast<reduce_shared*>(shared_memory);
    const unsigned bins = (unsigned)(rows / config::bucket_size), in_launch = gridDim.x / bins;
    // Pieces of large bins first, as far as there are any.
    const unsigned listed = counts ? counts->pieces : 0;
#pragma unroll 1
    for (unsigned at = blockIdx.x; at < listed; at += gridDim.x) {
        const bucket_chunk one = pieces[at];
        const bucket bin = bucket_at(
                grad_output, entries, starts, grad_value, S, Q, runs, capacity, first_head, heads, first_row, rows,
                one.bin / bins, one.bin % bins);
        if (bin.rows == 0) continue;
        if (threadIdx.x == 0) {
            shared.from = one.number * piece;
            shared.to = shared.from + piece;
        }
        __syncthreads();
        acc_t* of_bin = sums + (long long)one.first * (config::bucket_size * padded_channels);
        sum_bucket<false>(shared, bin, of_bin + one.number * (config::bucket_size * padded_channels));
        __threadfence();
        __syncthreads();
        if (threadIdx.x == 0) shared.last = atomicAdd(&counts->of_bin[one.bin].done, 1u) == one.pieces - 1;
        __syncthreads();
        if (shared.last) {
            __threadfence();
            add_chunks(bin, of_bin, one.pieces);
        }
    }

    // Last bins first: those of the coarse levels hold the most parts.
    const unsigned head_here = blockIdx.x % in_launch, number = bins - 1 - blockIdx.x / in_launch;
    if (counts && counts->of_bin[head_here * bins + number].pieces > 1) return;
    const bucket bin = bucket_at(
            grad_output, entries, starts, grad_value, S, Q, runs, capacity, first_head, heads, first_row, rows, head_here,
            number);
    if (bin.rows > 0) sum_bucket<true>(shared, bin, nullptr);
}

}  // namespace msda
