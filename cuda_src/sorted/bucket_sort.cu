// First pass of the sum without atomics: a block writes the parts of its samples as one run, and where each list of the
// run begins.
//
// Each warp counts its parts a list in the order of its samples, which says where each stands among those of the warp;
// sums over the warps and the lists before it make that its place in the run. Nothing depends on which warp comes first.

// The parts are sorted in shared memory and written out as they stand: written to their places one by one, each would
// cost the L2 cache a request of its own.

#define MSDA_TAKES (MSDA_CHUNK / 32)
enum : unsigned { msda_nowhere = 0xffffffffu };

// Shared memory of the counters or the sorted parts.
__device__ __forceinline__ int msda_sorted_bytes(int pitch) {
    const int sorted = MSDA_WARPS * MSDA_CHUNK * MSDA_PARTS * (int)sizeof(msda_entry), counters = MSDA_WARPS * pitch * 2;
    return ((sorted > counters ? sorted : counters) + 15) & ~15;
}

struct msda_part {
    int list;           // -1: nothing here
    int row;            // in its bin
    bool pair;          // the second row counts too
    msda_acc first, second;
};

// Upper (0) or lower (1) part of a sample; `weight` are those of its four neighbours.
__device__ __forceinline__ msda_part msda_part_of(
        const msda_cell& cell, const msda_level& level, const msda_acc (&weight)[4], int lower, const msda_slab& slab) {
    const int present = msda_inside(cell, level) >> 2 * lower & 3;
    const bool only_second = present == 2;
    msda_part part;
    part.first = only_second ? weight[2 * lower + 1] : weight[2 * lower];
    part.second = weight[2 * lower + 1];
    part.pair = present == 3;
    const msda_index row =
        level.start + (msda_index)(cell.y0 + lower) * level.w + cell.x0 + only_second - slab.first;
    part.row = (int)(row & (MSDA_ROWS - 1));
    const bool before = row == -1 && part.pair;
    part.list = before ? 0 : (int)(row / MSDA_ROWS) * 2 + 1 + (part.pair && part.row == MSDA_ROWS - 1);
    if (present == 0 || (!before && (row < 0 || row >= slab.rows))) part.list = -1;
    return part;
}

// The samples of a lane: number `take` of them.
struct msda_lot {
    long long first, samples;
    __device__ __forceinline__ bool has(int take) const { return first + take * 32 < samples; }
    __device__ __forceinline__ msda_index number(int take) const { return (msda_index)(has(take) ? first + take * 32 : 0); }
    __device__ __forceinline__ msda_index query(int take) const { return number(take) / MSDA_K; }
    __device__ __forceinline__ int k(int take) const { return (int)(number(take) - query(take) * MSDA_K); }
};

extern "C" __global__ void MSDA_BOUNDS msda_sort(
        const msda_location* __restrict__ locations, const __grid_constant__ msda_metadata metadata,
        const msda_location* __restrict__ weights, const msda_reference* __restrict__ references,
        const long long* __restrict__ lengths, unsigned short* __restrict__ starts, msda_entry* __restrict__ entries, msda_counts* counts, long long S,
        long long Q, long long first_head, long long heads, long long first_row, long long rows) {
    MSDA_SHARED_MEMORY(msda_memory);
    const msda_slab slab = {(msda_index)first_row, (msda_index)rows};
    const int bins = (int)(slab.rows / MSDA_ROWS), lists = 2 * bins + 1, pitch = msda_pitch_of(bins);
    // The sorted parts take the place of the counters once each part knows its own.
    msda_entry* sorted = reinterpret_cast<msda_entry*>(msda_memory);
    unsigned short* counters = reinterpret_cast<unsigned short*>(msda_memory);      // of each warp and list
    char* after = reinterpret_cast<char*>(msda_memory) + msda_sorted_bytes(pitch);
    msda_level* levels = reinterpret_cast<msda_level*>(after);
    unsigned* of_warps = reinterpret_cast<unsigned*>(levels + MSDA_L);
    unsigned short* begin = reinterpret_cast<unsigned short*>(of_warps + MSDA_WARPS);   // of each list
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    unsigned short* mine = counters + warp * pitch;

    enum { in_block = MSDA_WARPS * MSDA_CHUNK };
    msda_lot lot;
    const unsigned runs = (unsigned)((Q * MSDA_K + in_block - 1) / in_block);
    const unsigned head_here = blockIdx.x / runs, run = blockIdx.x % runs;
    const long long head = first_head + head_here;
    if (head >= heads) return;
    const msda_work work = {head / MSDA_M, (int)(head % MSDA_M), 0};
    lot.samples = (long long)msda_length(lengths, work.image, (msda_index)Q) * MSDA_K;
    locations += msda_first_element(work, Q, MSDA_LOCATIONS_PITCH);
    weights += msda_first_element(work, Q, MSDA_WEIGHTS_PITCH);
    if (MSDA_FRONT) references += work.image * Q * (MSDA_REFERENCES * MSDA_FRONT);
    lot.first = (long long)run * in_block + warp * MSDA_CHUNK + lane;

    msda_raw_of<1> raw[MSDA_TAKES];
#pragma unroll
    for (int take = 0; take < MSDA_TAKES; ++take)
        msda_load_place(raw[take], 0, lot.query(take), 0, lot.k(take), locations, references);
    msda_read_levels(metadata, S, 0, levels);
    for (int i = lane; i < pitch / 2; i += 32) reinterpret_cast<unsigned*>(mine)[i] = 0;
    __syncthreads();

    unsigned at[MSDA_TAKES][MSDA_PARTS];    // list and rank among those of this warp in it; then the place in the run
#pragma unroll
    for (int take = 0; take < MSDA_TAKES; ++take) {
        const int l = MSDA_LEVEL_OF(lot.k(take));
        const msda_level level = levels[l];
        const msda_point point = msda_point_of(raw[take], 0, l, level);
        const msda_cell cell = msda_locate(point.x, point.y, level);
        const msda_acc weight[4] = {0, 0, 0, 0};
#pragma unroll
        for (int lower = 0; lower < MSDA_PARTS; ++lower) {
            const int list = lot.has(take) ? msda_part_of(cell, level, weight, lower, slab).list : -1;
            const unsigned peers = __match_any_sync(0xffffffffu, list);
            const unsigned rank = __popc(peers & ((1u << lane) - 1));
            const unsigned before = list < 0 ? 0 : mine[list];
            __syncwarp();
            if (list >= 0 && rank == 0) mine[list] = (unsigned short)(before + __popc(peers));
            __syncwarp();
            at[take][lower] = list < 0 ? msda_nowhere : (unsigned)list << 16 | (before + rank);
        }
    }
#pragma unroll
    for (int take = 0; take < MSDA_TAKES; ++take)
        raw[take].attention[0] = msda_load_attention(weights, lot.query(take), 0, lot.k(take));
    __syncthreads();

    // Counts to places: a stretch of lists a thread.
    const int each = (lists + MSDA_THREADS - 1) / MSDA_THREADS;
    const int low = min((int)threadIdx.x * each, lists), high = min(low + each, lists);
    unsigned total = 0;
    for (int list = low; list < high; ++list) {
        unsigned count = 0;
#pragma unroll
        for (int w = 0; w < MSDA_WARPS; ++w) {
            const unsigned of_warp = counters[w * pitch + list];
            counters[w * pitch + list] = (unsigned short)count;
            count += of_warp;
        }
        begin[list] = (unsigned short)count;
        total += count;
    }
    unsigned all, before = msda_sum_below(total, of_warps, all) - total;
    for (int list = low; list < high; ++list) {
        const unsigned count = begin[list];
        begin[list] = (unsigned short)before;
        before += count;
    }
    if (threadIdx.x == 0) begin[lists] = (unsigned short)all;
    __syncthreads();
#pragma unroll
    for (int take = 0; take < MSDA_TAKES; ++take)
#pragma unroll
        for (int lower = 0; lower < MSDA_PARTS; ++lower) {
            const unsigned found = at[take][lower], list = found >> 16;
            if (found != msda_nowhere) at[take][lower] = begin[list] + mine[list] + (found & 0xffff);
        }
    starts += ((long long)head_here * runs + run) * pitch;
    for (int i = threadIdx.x; i < pitch / 2; i += MSDA_THREADS)
        reinterpret_cast<unsigned*>(starts)[i] = reinterpret_cast<const unsigned*>(begin)[i];
    __syncthreads();

#pragma unroll
    for (int take = 0; take < MSDA_TAKES; ++take) {
        const int l = MSDA_LEVEL_OF(lot.k(take));
        const msda_level level = levels[l];
#if MSDA_FRONT
        msda_softmax(raw[take]);    // the samples of a query stand side by side
#endif
        const msda_point point = msda_point_of(raw[take], 0, l, level);
        const msda_cell cell = msda_locate(point.x, point.y, level);
        msda_sample sample;
        sample.ax = cell.ax;
        sample.ay = cell.ay;
        sample.attention = point.attention;
        msda_acc weight[4];
        msda_weights(sample, weight);
#pragma unroll
        for (int lower = 0; lower < MSDA_PARTS; ++lower) {
            if (at[take][lower] == msda_nowhere) continue;
            const msda_part part = msda_part_of(cell, level, weight, lower, slab);
            msda_entry entry;
            entry.query = (unsigned)lot.query(take);
            entry.row_and_pair = 2 * part.row + part.pair;
            entry.first = part.first;
            entry.second = part.second;
            msda_copy(entry, sorted[at[take][lower]]);
        }
    }
    __syncthreads();
    entries += ((long long)head_here * runs + run) * (in_block * MSDA_PARTS);
    for (unsigned i = threadIdx.x; i < all; i += MSDA_THREADS) msda_copy(sorted[i], entries[i]);
    if (counts && blockIdx.x == 0 && threadIdx.x == 0) counts->pieces = 0;     // for msda_count.cu
}
