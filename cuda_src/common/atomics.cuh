// How the backward adds to grad_value: by atomic additions in the L2 cache, sample by sample or merged.

#if MSDA_GRAD_VALUE
// Adds contiguous channels to one row of the float32 or float64 gradient: from sm_90 on by one vector reduction, elsewhere
// by an atomic addition a channel. (Predicated in inline PTX or not, the compiler jumps around it.)
__device__ __forceinline__ void msda_add(msda_address target, const msda_acc (&x)[MSDA_VEC]) {
#if MSDA_PTX && !MSDA_VALUE_F64 && MSDA_VEC == 4 && __CUDA_ARCH__ >= 900
    asm volatile("red.global.add.v4.f32 [%0], {%1, %2, %3, %4};"
                 :: "l"(target), "f"(x[0]), "f"(x[1]), "f"(x[2]), "f"(x[3]));
#elif MSDA_PTX && !MSDA_VALUE_F64 && MSDA_VEC == 2 && __CUDA_ARCH__ >= 900
    asm volatile("red.global.add.v2.f32 [%0], {%1, %2};" :: "l"(target), "f"(x[0]), "f"(x[1]));
#else
    for (int v = 0; v < MSDA_VEC; ++v) atomicAdd((msda_acc*)target + v, x[v]);
#endif
}
#endif

#if MSDA_MERGE
// ---- samples of a cell added up before they go to grad_value --------------------------------------------------
//
// The samples of all queries of the block are sorted by cell: by the low bits of its row and column, so that no window
// has to be found, and cells that are far apart may share a key. Each group of MSDA_LANES lanes then takes an equal
// share of the sorted samples and keeps the sums of the four neighbours in registers for as long as the cell stays the
// same. Where the next cell is the right neighbour, only the left column goes to grad_value and the right one stays.

#define MSDA_GROUPS (MSDA_WARPS * MSDA_QUERIES)

__device__ constexpr int msda_bits(int n) { return n <= 1 ? 0 : 1 + msda_bits((n + 1) / 2); }
enum {
    msda_level_bits = msda_bits(MSDA_L) < MSDA_MERGE ? msda_bits(MSDA_L) : MSDA_MERGE,
    msda_cell_bits = MSDA_MERGE - msda_level_bits,
    msda_y_bits = msda_cell_bits / 2,
    msda_x_bits = msda_cell_bits - msda_y_bits
};

__device__ __forceinline__ int msda_key(const msda_cell& cell, int level) {
    const int x = cell.x0 & ((1 << msda_x_bits) - 1), y = cell.y0 & ((1 << msda_y_bits) - 1);
    return ((level & ((1 << msda_level_bits) - 1)) << msda_cell_bits) | y << msda_x_bits | x;
}

// Fills the samples of all rounds and sorts them; returns how many count.
__device__ __forceinline__ unsigned msda_fill_sorted(
        msda_shared& shared, int k0, const msda_location* __restrict__ locations,
        const msda_location* __restrict__ weights, const msda_reference* __restrict__ references) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    for (int key = threadIdx.x; key < 1 << MSDA_MERGE; key += MSDA_THREADS) shared.begin[key] = 0;
    msda_raw raw[MSDA_ROUNDS];
#pragma unroll
    for (int round = 0; round < MSDA_ROUNDS; ++round)
        msda_load_raw(raw[round], shared, round, k0, locations, weights, references);
    __syncthreads();
    unsigned key_and_rank[MSDA_ROUNDS][MSDA_FILLS];
#pragma unroll
    for (int round = 0; round < MSDA_ROUNDS; ++round) {
#if MSDA_FRONT
        msda_softmax(raw[round]);
#endif
#pragma unroll
        for (int fill = 0; fill < MSDA_FILLS; ++fill) {
            const int i = fill * 32 + lane, local = i / MSDA_SPAN, place = i % MSDA_SPAN, k = k0 + place;
            key_and_rank[round][fill] = 0xffffffffu;
            if (local >= MSDA_QUERIES || place >= MSDA_CHUNK) continue;
            const msda_index q = msda_query_of(shared, round, local);
            msda_sample sample = {0, 0, 0, 0};
            if (q >= 0 && k < MSDA_K) {
                const int level = MSDA_LEVEL_OF(k);
                const msda_point point = msda_point_of(raw[round], fill, level, shared.levels[level]);
                sample = msda_prepare(point.x, point.y, point.attention, shared.levels[level]);
                if (sample.place & 15) {
                    const int key = msda_key(msda_locate(point.x, point.y, shared.levels[level]), level);
                    key_and_rank[round][fill] = (unsigned)key << 16 | atomicAdd(shared.begin + key, 1u);
                }
            }
            shared.samples[round * MSDA_WARPS + warp][local * MSDA_PITCH + place] = sample;
        }
    }
    __syncthreads();

    // Counts to beginnings: a stretch of keys a thread.
    enum { keys = 1 << MSDA_MERGE, mine = (keys + MSDA_THREADS - 1) / MSDA_THREADS };
    unsigned count[mine], total = 0;
#pragma unroll
    for (int j = 0; j < mine; ++j) {
        const int key = threadIdx.x * mine + j;
        count[j] = key < keys ? shared.begin[key] : 0;
        total += count[j];
    }
    unsigned all, before = msda_sum_below(total, shared.of_warps, all) - total;
#pragma unroll
    for (int j = 0; j < mine; ++j) {
        const int key = threadIdx.x * mine + j;
        if (key < keys) shared.begin[key] = before;
        before += count[j];
    }
    __syncthreads();
#pragma unroll
    for (int round = 0; round < MSDA_ROUNDS; ++round)
#pragma unroll
        for (int fill = 0; fill < MSDA_FILLS; ++fill) {
            const unsigned found = key_and_rank[round][fill];
            if (found == 0xffffffffu) continue;
            const int i = fill * 32 + lane;
            const int place = (round * MSDA_WARPS + warp) * (MSDA_QUERIES * MSDA_PITCH) +
                              i / MSDA_SPAN * MSDA_PITCH + i % MSDA_SPAN;
            shared.order[shared.begin[found >> 16] + (found & 0xffff)] = (unsigned short)place;
        }
    __syncthreads();
    return all;
}

// The cell that a group is at, and the sums of its neighbours.
struct msda_run {
    msda_index place;       // of its samples; 0: none
    int level;
    msda_acc sum[MSDA_CORNERS][MSDA_VEC];
};

// Adds the sums of one column of a cell, as far as bits 0 and 2 of `inside` say that its neighbours are in the level. Mostly
// both are, and two jumps are saved: with the other column alike 2 % of encoder_800x1333 in 16 bits.
__device__ __forceinline__ void msda_add_column(
        int inside, msda_address upper, msda_address below, const msda_acc (&top)[MSDA_VEC],
        const msda_acc (&bottom)[MSDA_VEC]) {
    if ((inside & 5) == 5) {
        msda_add(upper, top);
        msda_add(upper + below, bottom);
    } else {
        if (inside & 1) msda_add(upper, top);
        if (inside & 4) msda_add(upper + below, bottom);
    }
}

// Adds the sums of a run to grad_value, but for the right column where it `stays`.
__device__ __forceinline__ void msda_end_run(
        const msda_shared& shared, const msda_run& run, bool stays, msda_address grad_value) {
    msda_address upper = grad_value + (long long)(run.place >> 4) * MSDA_GRAD_STRIDE;
    msda_keep(upper);
#if MSDA_CORNERS == 4
    const int inside = (int)run.place;
    const msda_address below = (msda_address)shared.levels[run.level].w * MSDA_GRAD_STRIDE;
    msda_add_column(inside, upper, below, run.sum[0], run.sum[2]);
    if (!stays) msda_add_column(inside >> 1, upper + MSDA_GRAD_STRIDE, below, run.sum[1], run.sum[3]);
#else
    msda_add(upper, run.sum[0]);
#endif
}

// `incoming` is grad_output of this image and head at the channels of this lane, `grad_value` likewise.
__device__ __forceinline__ void msda_add_merged(
        const msda_shared& shared, unsigned count, int k0, msda_address incoming, msda_address grad_value) {
    const unsigned share = (count + MSDA_GROUPS - 1) / MSDA_GROUPS, group = threadIdx.x / MSDA_LANES;
    const unsigned last = min((group + 1) * share, count);
    const msda_sample* samples = shared.samples[0];
    msda_keep(incoming);    // saves 2 instructions of 95 a sample, 1 % of encoder_800x1333
    msda_keep(grad_value);  // else 100 instructions more here, and encoder_800x1333 takes 10 % longer
    msda_run run;
    run.place = 0;
    run.level = 0;
#pragma unroll 1
    for (unsigned i = group * share; i < last; i += msda_unroll) {
        msda_sample sample[msda_unroll];
        msda_values row[msda_unroll];
        int level[msda_unroll];
#pragma unroll
        for (int u = 0; u < msda_unroll; ++u) {
            const unsigned place = shared.order[min(i + u, last - 1)], query = place / MSDA_PITCH;
            sample[u] = samples[place];
            level[u] = MSDA_LEVEL_OF(k0 + (place - query * MSDA_PITCH));
            row[u] = msda_read(incoming + (long long)shared.query[query] * (MSDA_M * MSDA_D * sizeof(msda_value)));
        }
#pragma unroll
        for (int u = 0; u < msda_unroll; ++u) {
            if (i + u >= last) break;
            if (sample[u].place != run.place || level[u] != run.level) {
                const bool stays = MSDA_CORNERS == 4 && level[u] == run.level && (run.place & 10) != 0 &&
                                   (sample[u].place & 5) != 0 &&
                                   (sample[u].place >> 4) - (run.place >> 4) == 1;
                if (run.place & 15) msda_end_run(shared, run, stays, grad_value);
#pragma unroll
                for (int c = 0; c < MSDA_CORNERS; ++c)
#pragma unroll
                    for (int v = 0; v < MSDA_VEC; ++v)
                        run.sum[c][v] = stays && c % 2 == 0 ? run.sum[MSDA_CORNERS == 4 ? c + 1 : c][v] : 0;
                run.place = sample[u].place;
                run.level = level[u];
            }
            msda_acc weight[4], x[MSDA_VEC];
            msda_weights(sample[u], weight);
            msda_unpack(row[u], x);
#pragma unroll
            for (int c = 0; c < MSDA_CORNERS; ++c)
#pragma unroll
                for (int v = 0; v < MSDA_VEC; ++v) run.sum[c][v] = fma(weight[c], x[v], run.sum[c][v]);
        }
    }
    if (run.place & 15) msda_end_run(shared, run, false, grad_value);
}
#endif
