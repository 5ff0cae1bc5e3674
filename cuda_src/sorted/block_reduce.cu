// Second pass of the sum without atomics where many parts fall on each row: a block sums the parts of one bin and writes
// its rows of grad_value, each once, in value's dtype. Nothing is zeroed before or rounded after, and the order of every
// sum is that of the samples. msda_add.cu does the same for bins of few parts.
//
// Parts come MSDA_CHUNK at a time and are sorted by row in shared memory, in order. MSDA_LANES lanes are a group; each
// group takes an equal share of the sorted parts, keeps the sums of the current row and of the row after it in
// registers, and leaves them in shared memory when the row changes: at number (row + group), which no other group and
// row can have, because both grow along the list. Then each row's owner adds up what the groups left for it.

#define MSDA_GROUPS (MSDA_WARPS * MSDA_QUERIES)
#define MSDA_KEYS (MSDA_ROWS + 1)                               // key 0: the row before the bin
#define MSDA_OWNED ((MSDA_ROWS + MSDA_GROUPS - 1) / MSDA_GROUPS)
#define MSDA_TAKES (MSDA_CHUNK / MSDA_THREADS)

struct msda_chunk {
    msda_entry entries[MSDA_CHUNK];
    alignas(16) msda_acc partial[MSDA_KEYS + MSDA_GROUPS][2][MSDA_STEP];
    unsigned begin[MSDA_KEYS + 1];                              // of each key in entries
    unsigned place[MSDA_WARPS][MSDA_KEYS + 1];
    unsigned of_warps[MSDA_WARPS];
    unsigned end[MSDA_THREADS], own[MSDA_THREADS], in_run[MSDA_THREADS];    // of MSDA_THREADS runs at a time
    long long from, to;                                         // parts of the bin that the block sums
    bool last;                                                  // whether all other pieces of the bin are done
};

// Sums of a piece: [MSDA_ROWS][MSDA_LINE].
#define MSDA_LINE (MSDA_TURNS * MSDA_STEP)

// Sorts the parts [from, to) of the runs from `run` on into shared.entries.
__device__ __forceinline__ void msda_sort_chunk(
        msda_chunk& shared, const msda_bin& bin, long long run, unsigned from, unsigned to) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    unsigned* places = shared.place[warp];
    for (int key = lane; key <= MSDA_KEYS; key += 32) places[key] = 0;
    __syncwarp();
    msda_entry entry[MSDA_TAKES];
    unsigned rank[MSDA_TAKES];
    int key[MSDA_TAKES];
#pragma unroll
    for (int take = 0; take < MSDA_TAKES; ++take) {
        const unsigned i = from + (warp * MSDA_TAKES + take) * 32 + lane;
        key[take] = MSDA_KEYS;      // none
        if (i < to) {
            int of = 0;             // the run that holds part i
#pragma unroll
            for (int step = MSDA_THREADS / 2; step > 0; step /= 2)
                if (shared.end[of + step - 1] <= i) of += step;
            msda_copy(bin.entries[(run + of) * bin.capacity + (shared.in_run[of] + i)], entry[take]);
            key[take] = i < shared.own[of] ? 0 : (int)(entry[take].row_and_pair >> 1) + 1;
            msda_prefetch(bin.grad_output + (long long)entry[take].query * (MSDA_M * MSDA_D));
        }
    }
#pragma unroll
    for (int take = 0; take < MSDA_TAKES; ++take) {
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
        for (int first = 0; first <= MSDA_KEYS; first += 32) {
            const int mine = first + lane;
            unsigned total = 0;
            if (mine <= MSDA_KEYS) {
#pragma unroll
                for (int w = 0; w < MSDA_WARPS; ++w) {
                    const unsigned count = shared.place[w][mine];
                    shared.place[w][mine] = total;
                    total += count;
                }
            }
            const unsigned end = msda_sum_below(total);
            if (mine <= MSDA_KEYS) shared.begin[mine] = before + end - total;
            before += __shfl_sync(0xffffffffu, end, 31);
        }
    }
    __syncthreads();
#pragma unroll
    for (int take = 0; take < MSDA_TAKES; ++take) {
        if (key[take] == MSDA_KEYS) continue;
        entry[take].row_and_pair = 2 * key[take] + (entry[take].row_and_pair & 1);
        msda_copy(entry[take], shared.entries[shared.begin[key[take]] + places[key[take]] + rank[take]]);
    }
    __syncthreads();
}

__device__ __forceinline__ void msda_put(msda_acc* target, const msda_acc (&sum)[MSDA_VEC]) {
    msda_sums x;
#pragma unroll
    for (int v = 0; v < MSDA_VEC; ++v) x.element[v] = sum[v];
    *reinterpret_cast<decltype(x.word)*>(target) = x.word;
}

__device__ __forceinline__ void msda_leave(
        msda_chunk& shared, int number, int lane, const msda_acc (&first)[MSDA_VEC], const msda_acc (&second)[MSDA_VEC]) {
    msda_put(&shared.partial[number][0][lane * MSDA_VEC], first);
    msda_put(&shared.partial[number][1][lane * MSDA_VEC], second);
}

// Adds what the groups left for `key`: the sums of its own row (0) or of the row after it (1).
__device__ __forceinline__ void msda_collect(
        const msda_chunk& shared, int key, int second, unsigned share, int lane, msda_acc (&sum)[MSDA_VEC]) {
    const unsigned begin = shared.begin[key], end = shared.begin[key + 1];
    if (begin == end) return;
    for (unsigned group = begin / share; group <= (end - 1) / share; ++group) {
        msda_sums x;
        x.word = *reinterpret_cast<const decltype(x.word)*>(&shared.partial[key + group][second][lane * MSDA_VEC]);
#pragma unroll
        for (int v = 0; v < MSDA_VEC; ++v) sum[v] += x.element[v];
    }
}

// The sorted parts of a chunk: each group leaves the sums of its share.
__device__ __forceinline__ void msda_add_chunk(
        msda_chunk& shared, const msda_value* incoming, unsigned count, unsigned share, bool idle) {
    const int group = threadIdx.x / MSDA_LANES, lane = threadIdx.x % MSDA_LANES;
    const unsigned last = min((group + 1) * share, count);
    msda_acc here[MSDA_VEC], after[MSDA_VEC];
    int key = -1;
#pragma unroll 1
    for (unsigned i = group * share; i < last; i += msda_unroll) {
        msda_entry entry[msda_unroll];
        msda_values row[msda_unroll];
#pragma unroll
        for (int u = 0; u < msda_unroll; ++u) {
            msda_copy(shared.entries[min(i + u, last - 1)], entry[u]);
            row[u] = msda_read_if(!idle, (msda_address)(incoming + (long long)entry[u].query * (MSDA_M * MSDA_D)));
        }
#pragma unroll
        for (int u = 0; u < msda_unroll; ++u) {
            if (i + u >= last) break;
            const int next = (int)(entry[u].row_and_pair >> 1);
            if (next != key) {
                if (key >= 0) msda_leave(shared, key + group, lane, here, after);
                key = next;
#pragma unroll
                for (int v = 0; v < MSDA_VEC; ++v) here[v] = after[v] = 0;
            }
            msda_acc x[MSDA_VEC];
            msda_unpack(row[u], x);
#pragma unroll
            for (int v = 0; v < MSDA_VEC; ++v) here[v] = fma(entry[u].first, x[v], here[v]);
            if (entry[u].row_and_pair & 1) {
#pragma unroll
                for (int v = 0; v < MSDA_VEC; ++v) after[v] = fma(entry[u].second, x[v], after[v]);
            }
        }
    }
    if (key >= 0) msda_leave(shared, key + group, lane, here, after);
}

// Writes the sums of all parts of the bin to grad_value, or where it is not `whole` those of the parts
// [shared.from, shared.to) to `sums`.
template <bool whole>
__device__ __forceinline__ void msda_sum_parts(msda_chunk& shared, const msda_bin& bin, msda_acc* sums) {
    const int group = threadIdx.x / MSDA_LANES, lane = threadIdx.x % MSDA_LANES;
#pragma unroll 1
    for (int turn = 0; turn < MSDA_TURNS; ++turn) {
        const int channel = turn * MSDA_STEP + lane * MSDA_VEC;
        const bool idle = MSDA_D % MSDA_STEP != 0 && channel >= MSDA_D;
        msda_acc sum[MSDA_OWNED][MSDA_VEC];
#pragma unroll
        for (int owned = 0; owned < MSDA_OWNED; ++owned)
#pragma unroll
            for (int v = 0; v < MSDA_VEC; ++v) sum[owned][v] = 0;

        [[maybe_unused]] long long before = 0;      // parts of the runs before these
#pragma unroll 1
        for (long long run = 0; run < bin.runs && (whole || before < shared.to); run += MSDA_THREADS) {
            const msda_stretch stretch = msda_stretch_of(bin, run + threadIdx.x);
            const unsigned count = stretch.count();
            unsigned total;
            const unsigned end = msda_sum_below(count, shared.of_warps, total), begin = end - count;
            shared.end[threadIdx.x] = end;
            shared.own[threadIdx.x] = begin + (stretch.own - stretch.from);
            shared.in_run[threadIdx.x] = stretch.from - begin;
            __syncthreads();
            const unsigned last = whole ? total : (unsigned)min(shared.to - before, (long long)total);
            unsigned at = 0;
            if (!whole && shared.from > before) at = (unsigned)min(shared.from - before, (long long)total);
#pragma unroll 1
            for (; at < last; at += MSDA_CHUNK) {
                const unsigned in_chunk = min(last - at, (unsigned)MSDA_CHUNK);
                const unsigned share = (in_chunk + MSDA_GROUPS - 1) / MSDA_GROUPS;
                msda_sort_chunk(shared, bin, run, at, at + in_chunk);
                msda_add_chunk(shared, bin.grad_output + channel, in_chunk, share, idle);
                __syncthreads();
#pragma unroll
                for (int owned = 0; owned < MSDA_OWNED; ++owned) {
                    const int row = owned * MSDA_GROUPS + group;
                    if (row < MSDA_ROWS) {
                        msda_collect(shared, row + 1, 0, share, lane, sum[owned]);
                        msda_collect(shared, row, 1, share, lane, sum[owned]);
                    }
                }
                __syncthreads();
            }
            if (!whole) before += total;
            __syncthreads();
        }

#pragma unroll
        for (int owned = 0; owned < MSDA_OWNED; ++owned) {
            const int row = owned * MSDA_GROUPS + group;
            if (row >= MSDA_ROWS || row >= bin.rows || idle) continue;
            if (whole) msda_write_row(bin, row, channel, sum[owned]);
            else msda_put(sums + row * MSDA_LINE + channel, sum[owned]);
        }
    }
}

// Adds up the sums of all pieces of a bin, in their order.
__device__ __forceinline__ void msda_add_pieces(const msda_bin& bin, const msda_acc* sums, unsigned pieces) {
    const int group = threadIdx.x / MSDA_LANES, lane = threadIdx.x % MSDA_LANES;
#pragma unroll 1
    for (int row = group; row < bin.rows; row += MSDA_GROUPS)
#pragma unroll 1
        for (int channel = lane * MSDA_VEC; channel < MSDA_D; channel += MSDA_STEP) {
            msda_acc sum[MSDA_VEC];
#pragma unroll
            for (int v = 0; v < MSDA_VEC; ++v) sum[v] = 0;
#pragma unroll 4
            for (unsigned piece = 0; piece < pieces; ++piece) {
                msda_sums x;
                const msda_acc* of_piece = sums + (long long)piece * (MSDA_ROWS * MSDA_LINE) + row * MSDA_LINE;
                x.word = __ldcg(reinterpret_cast<const decltype(x.word)*>(of_piece + channel));
#pragma unroll
                for (int v = 0; v < MSDA_VEC; ++v) sum[v] += x.element[v];
            }
            msda_write_row(bin, row, channel, sum);
        }
}

extern "C" __global__ void MSDA_BOUNDS msda_sum(
        const msda_value* __restrict__ grad_output, const msda_entry* __restrict__ entries,
        const unsigned short* __restrict__ starts, msda_value* __restrict__ grad_value, long long S, long long Q,
        long long runs, long long capacity, long long first_head, long long heads, long long first_row, long long rows,
        msda_counts* counts, const msda_piece* __restrict__ pieces, msda_acc* sums, long long piece) {
    MSDA_SHARED_MEMORY(msda_memory);
    msda_chunk& shared = *reinterpret_cast<msda_chunk*>(msda_memory);
    const unsigned bins = (unsigned)(rows / MSDA_ROWS), in_launch = gridDim.x / bins;
    // Pieces of large bins first, as far as there are any.
    const unsigned listed = counts ? counts->pieces : 0;
#pragma unroll 1
    for (unsigned at = blockIdx.x; at < listed; at += gridDim.x) {
        const msda_piece one = pieces[at];
        const msda_bin bin = msda_bin_at(
                grad_output, entries, starts, grad_value, S, Q, runs, capacity, first_head, heads, first_row, rows,
                one.bin / bins, one.bin % bins);
        if (bin.rows == 0) continue;
        if (threadIdx.x == 0) {
            shared.from = one.number * piece;
            shared.to = shared.from + piece;
        }
        __syncthreads();
        msda_acc* of_bin = sums + (long long)one.first * (MSDA_ROWS * MSDA_LINE);
        msda_sum_parts<false>(shared, bin, of_bin + one.number * (MSDA_ROWS * MSDA_LINE));
        __threadfence();
        __syncthreads();
        if (threadIdx.x == 0) shared.last = atomicAdd(&counts->of_bin[one.bin].done, 1u) == one.pieces - 1;
        __syncthreads();
        if (shared.last) {
            __threadfence();
            msda_add_pieces(bin, of_bin, one.pieces);
        }
    }

    // Last bins first: those of the coarse levels hold the most parts.
    const unsigned head_here = blockIdx.x % in_launch, number = bins - 1 - blockIdx.x / in_launch;
    if (counts && counts->of_bin[head_here * bins + number].pieces > 1) return;
    const msda_bin bin = msda_bin_at(
            grad_output, entries, starts, grad_value, S, Q, runs, capacity, first_head, heads, first_row, rows, head_here,
            number);
    if (bin.rows > 0) msda_sum_parts<true>(shared, bin, nullptr);
}
