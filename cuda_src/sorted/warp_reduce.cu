// Second pass of the sum without atomics where few parts fall on each row: a warp adds up the parts of one bin in shared
// memory, in the order of the samples, and writes its rows of grad_value, each once, in value's dtype. msda_sum.cu does
// the same for bins of many parts, by a block each.
//
// A warp alone, without barriers: its groups of MSDA_LANES lanes own some rows of the bin each and pick what falls on them
// out of 32 parts at a time. Where nearly all of the 32 fall on few rows (padded queries, all at one point), the groups
// share the parts of a row instead, and add up their sums.

// Rows of 32 parts up to which the groups share them.
enum { msda_few_rows = 4 };

#define MSDA_OWNED ((MSDA_ROWS + MSDA_QUERIES - 1) / MSDA_QUERIES)      // rows of a group

struct msda_tile {
    msda_entry entries[32];
    alignas(16) msda_acc sum[MSDA_ROWS][MSDA_TURNS * MSDA_STEP];
};

// Adds factor * x to the channels of a lane.
__device__ __forceinline__ void msda_add_to(msda_acc* target, msda_acc factor, const msda_acc (&x)[MSDA_VEC]) {
    msda_sums sum;
    sum.word = *reinterpret_cast<const decltype(sum.word)*>(target);
#pragma unroll
    for (int v = 0; v < MSDA_VEC; ++v) sum.element[v] = fma(factor, x[v], sum.element[v]);
    *reinterpret_cast<decltype(sum.word)*>(target) = sum.word;
}

// The channels of a lane of grad_output of a query.
__device__ __forceinline__ void msda_read_query(
        const msda_bin& bin, unsigned query, int lane, msda_values (&x)[MSDA_TURNS]) {
    const msda_value* of_query = bin.grad_output + (long long)query * (MSDA_M * MSDA_D);
#pragma unroll
    for (int turn = 0; turn < MSDA_TURNS; ++turn) {
        const int channel = turn * MSDA_STEP + lane * MSDA_VEC;
        if (MSDA_D % MSDA_STEP == 0 || channel < MSDA_D) x[turn] = msda_read((msda_address)(of_query + channel));
    }
}

// Adds the parts that the lanes hold, one each, where `row` is not -2: their row of the bin, -1 for the row before it.
__device__ __forceinline__ void msda_add_32(
        msda_tile& tile, const msda_bin& bin, msda_entry entry, int row, int lane, int low, int high) {
    const int group = threadIdx.x % 32 / MSDA_LANES;
    const int first = row < 0 ? -2 : row, second = row > -2 && entry.row_and_pair & 1 && row + 1 < MSDA_ROWS ? row + 1 : -2;
    __syncwarp();
    entry.row_and_pair = (unsigned)(row + 1);
    msda_copy(entry, tile.entries[threadIdx.x % 32]);
    unsigned mine = 0;
#pragma unroll
    for (int g = 0; g < MSDA_QUERIES; ++g) {
        const bool wanted = (first >= 0 && first / MSDA_OWNED == g) || (second >= 0 && second / MSDA_OWNED == g);
        const unsigned those = __ballot_sync(0xffffffffu, wanted);
        if (g == group) mine = those;
    }
    const unsigned pairs = __ballot_sync(0xffffffffu, second >= 0);
    __syncwarp();
    while (mine) {
        int index[msda_unroll];
        msda_values x[msda_unroll][MSDA_TURNS];
        unsigned left = mine;
#pragma unroll
        for (int u = 0; u < msda_unroll; ++u) {
            index[u] = left ? __ffs((int)left) - 1 : -1;
            left &= left - 1;
            if (index[u] < 0) continue;
            msda_read_query(bin, tile.entries[index[u]].query, lane, x[u]);
        }
        mine = left;
#pragma unroll
        for (int u = 0; u < msda_unroll; ++u) {
            if (index[u] < 0) break;
            msda_entry part;
            msda_copy(tile.entries[index[u]], part);
            const int at = (int)part.row_and_pair - 1;
            const bool adds_first = at >= low && at < high;
            const bool adds_second = (pairs >> index[u] & 1) && at + 1 >= low && at + 1 < high;
#pragma unroll
            for (int turn = 0; turn < MSDA_TURNS; ++turn) {
                const int channel = turn * MSDA_STEP + lane * MSDA_VEC;
                if (MSDA_D % MSDA_STEP != 0 && channel >= MSDA_D) continue;
                msda_acc of_lane[MSDA_VEC];
                msda_unpack(x[u][turn], of_lane);
                if (adds_first) msda_add_to(&tile.sum[at][channel], part.first, of_lane);
                if (adds_second) msda_add_to(&tile.sum[at + 1][channel], part.second, of_lane);
            }
        }
    }
}

// The same where the parts are many and their rows few: `first_of_row` are the lanes that hold the first part of a row.
__device__ __forceinline__ void msda_share_32(
        msda_tile& tile, const msda_bin& bin, const msda_entry& entry, int row, int lane, unsigned first_of_row) {
    const int group = threadIdx.x % 32 / MSDA_LANES;
    __syncwarp();
    msda_copy(entry, tile.entries[threadIdx.x % 32]);
    __syncwarp();
    while (first_of_row) {
        const int leader = __ffs((int)first_of_row) - 1, at = __shfl_sync(0xffffffffu, row, leader);
        first_of_row &= first_of_row - 1;
        unsigned mine = __ballot_sync(0xffffffffu, row == at);
        for (int skipped = 0; skipped < group; ++skipped) mine &= mine - 1;
        msda_acc here[MSDA_TURNS][MSDA_VEC], after[MSDA_TURNS][MSDA_VEC];
#pragma unroll
        for (int turn = 0; turn < MSDA_TURNS; ++turn)
#pragma unroll
            for (int v = 0; v < MSDA_VEC; ++v) here[turn][v] = after[turn][v] = 0;
        while (mine) {
            int index[msda_unroll];
            msda_values x[msda_unroll][MSDA_TURNS];
#pragma unroll
            for (int u = 0; u < msda_unroll; ++u) {
                index[u] = mine ? __ffs((int)mine) - 1 : -1;
#pragma unroll
                for (int skipped = 0; skipped < MSDA_QUERIES; ++skipped) mine &= mine - 1;
                if (index[u] < 0) continue;
                msda_read_query(bin, tile.entries[index[u]].query, lane, x[u]);
            }
#pragma unroll
            for (int u = 0; u < msda_unroll; ++u) {
                if (index[u] < 0) break;
                msda_entry part;
                msda_copy(tile.entries[index[u]], part);
#pragma unroll
                for (int turn = 0; turn < MSDA_TURNS; ++turn) {
                    if (MSDA_D % MSDA_STEP != 0 && turn * MSDA_STEP + lane * MSDA_VEC >= MSDA_D) continue;
                    msda_acc of_lane[MSDA_VEC];
                    msda_unpack(x[u][turn], of_lane);
#pragma unroll
                    for (int v = 0; v < MSDA_VEC; ++v) {
                        here[turn][v] = fma(part.first, of_lane[v], here[turn][v]);
                        if (part.row_and_pair & 1) after[turn][v] = fma(part.second, of_lane[v], after[turn][v]);
                    }
                }
            }
        }
#pragma unroll
        for (int turn = 0; turn < MSDA_TURNS; ++turn)
#pragma unroll
            for (int v = 0; v < MSDA_VEC; ++v)
#pragma unroll
                for (int step = MSDA_LANES; step < 32; step *= 2) {
                    here[turn][v] += __shfl_xor_sync(0xffffffffu, here[turn][v], step);
                    after[turn][v] += __shfl_xor_sync(0xffffffffu, after[turn][v], step);
                }
        if (group == 0) {
#pragma unroll
            for (int turn = 0; turn < MSDA_TURNS; ++turn) {
                const int channel = turn * MSDA_STEP + lane * MSDA_VEC;
                if (at >= 0) msda_add_to(&tile.sum[at][channel], 1, here[turn]);
                if (at + 1 < MSDA_ROWS) msda_add_to(&tile.sum[at + 1][channel], 1, after[turn]);
            }
        }
        __syncwarp();
    }
}

__device__ __forceinline__ void msda_add_bin(msda_tile& tile, const msda_bin& bin) {
    const int in_warp = threadIdx.x % 32, group = in_warp / MSDA_LANES, lane = in_warp % MSDA_LANES;
    const int low = group * MSDA_OWNED, high = min(low + MSDA_OWNED, MSDA_ROWS);     // rows of this group
#pragma unroll 4
    for (int row = low; row < high; ++row)
#pragma unroll
        for (int turn = 0; turn < MSDA_TURNS; ++turn) {
            msda_sums zero;
#pragma unroll
            for (int v = 0; v < MSDA_VEC; ++v) zero.element[v] = 0;
            *reinterpret_cast<decltype(zero.word)*>(&tile.sum[row][turn * MSDA_STEP + lane * MSDA_VEC]) = zero.word;
        }

#pragma unroll 1
    for (long long run = 0; run < bin.runs; run += 32) {
        const msda_stretch stretch = msda_stretch_of(bin, run + in_warp);
        const unsigned count = stretch.count(), end = msda_sum_below(count);
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
            msda_entry entry = {0, 0, 0, 0};
            int row = -2;
            if (i < total) {
                msda_copy(bin.entries[(run + of) * bin.capacity + in_run], entry);
                row = in_run < own ? -1 : (int)(entry.row_and_pair >> 1);
                msda_prefetch(bin.grad_output + (long long)entry.query * (MSDA_M * MSDA_D));
            }
            const unsigned peers = __match_any_sync(0xffffffffu, row);
            const unsigned first_of_row = __ballot_sync(0xffffffffu, row > -2 && !(peers & ((1u << in_warp) - 1)));
            if (__popc(first_of_row) <= msda_few_rows && at + 32 <= total)
                msda_share_32(tile, bin, entry, row, lane, first_of_row);
            else
                msda_add_32(tile, bin, entry, row, lane, low, high);
        }
    }

    const int last = min(bin.rows, high);
#pragma unroll 4
    for (int row = low; row < last; ++row)
#pragma unroll
        for (int turn = 0; turn < MSDA_TURNS; ++turn) {
            const int channel = turn * MSDA_STEP + lane * MSDA_VEC;
            if (MSDA_D % MSDA_STEP != 0 && channel >= MSDA_D) continue;
            msda_sums sum;
            sum.word = *reinterpret_cast<const decltype(sum.word)*>(&tile.sum[row][channel]);
            msda_write_row(bin, row, channel, sum.element);
        }
}

extern "C" __global__ void MSDA_BOUNDS msda_add(
        const msda_value* __restrict__ grad_output, const msda_entry* __restrict__ entries,
        const unsigned short* __restrict__ starts, msda_value* __restrict__ grad_value, long long S, long long Q,
        long long runs, long long capacity, long long first_head, long long heads, long long first_row, long long rows) {
    MSDA_SHARED_MEMORY(msda_memory);
    const unsigned bins = (unsigned)(rows / MSDA_ROWS), blocks = (bins + MSDA_WARPS - 1) / MSDA_WARPS;
    const unsigned warp = threadIdx.x / 32, in_launch = gridDim.x / blocks;
    // All heads of the last bins first: the coarse levels' hold the most parts, and the rows of the heads of a pixel are
    // neighbours in memory (decoder_900 142 -> 127 us with the sort, head by head 147; decoder_300 35 -> 30).
    const msda_bin bin = msda_bin_at(
            grad_output, entries, starts, grad_value, S, Q, runs, capacity, first_head, heads, first_row, rows,
            blockIdx.x % in_launch, (blocks - 1 - blockIdx.x / in_launch) * MSDA_WARPS + warp);
    if (bin.rows > 0) msda_add_bin(reinterpret_cast<msda_tile*>(msda_memory)[warp], bin);
}
