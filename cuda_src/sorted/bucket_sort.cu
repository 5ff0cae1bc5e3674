// First pass of the sum without atomics: a block writes the parts of its samples as one run, and where each list of the
// run begins.
//
// Each warp counts its parts a list in the order of its samples, which says where each stands among those of the warp;
// sums over the warps and the lists before it make that its place in the run. Nothing depends on which warp comes first.
#include "common/samples.cuh"
#include "common/softmax.cuh"
#include "common/warp.cuh"
#include "sorted/buckets.cuh"

namespace msda {

// The parts are sorted in shared memory and written out as they stand: written to their places one by one, each would
// cost the L2 cache a request of its own.

constexpr int samples_per_thread = config::chunk / 32;
enum : unsigned { nowhere = 0xffffffffu };

// Shared memory of the counters or the sorted parts.
__device__ __forceinline__ int sort_bytes(int pitch) {
    const int sorted = config::warps * config::chunk * contributions_per_sample * (int)sizeof(contribution), counters = config::warps * pitch * 2;
    return ((sorted > counters ? sorted : counters) + 15) & ~15;
}

struct located_contribution {
    int list;           // -1: nothing here
    int row;            // in its bin
    bool pair;          // the second row counts too
    acc_t first, second;
};

// Upper (0) or lower (1) part of a sample; `weight` are those of its four neighbours.
__device__ __forceinline__ located_contribution contribution_of(
        const bilinear_cell& cell, const level_info& level, const acc_t (&weight)[4], int lower, const value_slab& slab) {
    const int present = neighbour_mask(cell, level) >> 2 * lower & 3;
    const bool only_second = present == 2;
    located_contribution part;
    part.first = only_second ? weight[2 * lower + 1] : weight[2 * lower];
    part.second = weight[2 * lower + 1];
    part.pair = present == 3;
    const index_t row =
        level.start + (index_t)(cell.y0 + lower) * level.w + cell.x0 + only_second - slab.first;
    part.row = (int)(row & (config::bucket_size - 1));
    const bool before = row == -1 && part.pair;
    part.list = before ? 0 : (int)(row / config::bucket_size) * 2 + 1 + (part.pair && part.row == config::bucket_size - 1);
    if (present == 0 || (!before && (row < 0 || row >= slab.rows))) part.list = -1;
    return part;
}

// The samples of a lane: number `take` of them.
struct sample_range {
    long long first, samples;
    __device__ __forceinline__ bool has(int take) const { return first + take * 32 < samples; }
    __device__ __forceinline__ index_t number(int take) const { return (index_t)(has(take) ? first + take * 32 : 0); }
    __device__ __forceinline__ index_t query(int take) const { return number(take) / K; }
    __device__ __forceinline__ int k(int take) const { return (int)(number(take) - query(take) * K); }
};

extern "C" __global__ void __launch_bounds__(threads_per_block, resident_blocks) msda_bucket_sort(
        const location_t* __restrict__ locations, const __grid_constant__ level_metadata metadata,
        const location_t* __restrict__ weights, const reference_t* __restrict__ references,
        const long long* __restrict__ lengths, unsigned short* __restrict__ starts, contribution* __restrict__ entries, chunk_counts* counts, long long S,
        long long Q, long long first_head, long long heads, long long first_row, long long rows) {
    MSDA_SHARED_MEMORY(shared_memory);
    const value_slab slab = {(index_t)first_row, (index_t)rows};
    const int bins = (int)(slab.rows / config::bucket_size), lists = 2 * bins + 1, pitch = segments_pitch(bins);
    // The sorted parts take the place of the counters once each part knows its own.
    contribution* sorted = reinterpret_cast<contribution*>(shared_memory);
    unsigned short* counters = reinterpret_cast<unsigned short*>(shared_memory);      // of each warp and list
    char* after = reinterpret_cast<char*>(shared_memory) + sort_bytes(pitch);
    level_info* levels = reinterpret_cast<level_info*>(after);
    unsigned* warp_sums = reinterpret_cast<unsigned*>(levels + config::L);
    unsigned short* begin = reinterpret_cast<unsigned short*>(warp_sums + config::warps);   // of each list
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    unsigned short* mine = counters + warp * pitch;

    enum { in_block = config::warps * config::chunk };
    sample_range lot;
    const unsigned runs = (unsigned)((Q * K + in_block - 1) / in_block);
    const unsigned head_here = blockIdx.x / runs, run = blockIdx.x % runs;
    const long long head = first_head + head_here;
    if (head >= heads) return;
    const assignment work = {head / config::M, (int)(head % config::M), 0};
    lot.samples = (long long)valid_queries(lengths, work.image, (index_t)Q) * K;
    locations += first_element(work, Q, locations_pitch);
    weights += first_element(work, Q, weights_pitch);
    if (config::reference_coordinates) references += work.image * Q * (config::reference_levels * config::reference_coordinates);
    lot.first = (long long)run * in_block + warp * config::chunk + lane;

    raw_samples<1> raw[samples_per_thread];
#pragma unroll
    for (int take = 0; take < samples_per_thread; ++take)
        load_location(raw[take], 0, lot.query(take), 0, lot.k(take), locations, references);
    read_levels(metadata, S, 0, levels);
    for (int i = lane; i < pitch / 2; i += 32) reinterpret_cast<unsigned*>(mine)[i] = 0;
    __syncthreads();

    unsigned at[samples_per_thread][contributions_per_sample];    // list and rank among those of this warp in it; then the place in the run
#pragma unroll
    for (int take = 0; take < samples_per_thread; ++take) {
        const int l = level_of(lot.k(take));
        const level_info level = levels[l];
        const sampling_point point = sampling_point_of(raw[take], 0, l, level);
        const bilinear_cell cell = locate(point.x, point.y, level);
        const acc_t weight[4] = {0, 0, 0, 0};
#pragma unroll
        for (int lower = 0; lower < contributions_per_sample; ++lower) {
            const int list = lot.has(take) ? contribution_of(cell, level, weight, lower, slab).list : -1;
            const unsigned peers = __match_any_sync(0xffffffffu, list);
            const unsigned rank = __popc(peers & ((1u << lane) - 1));
            const unsigned before = list < 0 ? 0 : mine[list];
            __syncwarp();
            if (list >= 0 && rank == 0) mine[list] = (unsigned short)(before + __popc(peers));
            __syncwarp();
            at[take][lower] = list < 0 ? nowhere : (unsigned)list << 16 | (before + rank);
        }
    }
#pragma unroll
    for (int take = 0; take < samples_per_thread; ++take)
        raw[take].attention[0] = load_attention(weights, lot.query(take), 0, lot.k(take));
    __syncthreads();

    // Counts to places: a stretch of lists a thread.
    const int each = (lists + threads_per_block - 1) / threads_per_block;
    const int low = min((int)threadIdx.x * each, lists), high = min(low + each, lists);
    unsigned total = 0;
    for (int list = low; list < high; ++list) {
        unsigned count = 0;
#pragma unroll
        for (int w = 0; w < config::warps; ++w) {
            const unsigned of_warp = counters[w * pitch + list];
            counters[w * pitch + list] = (unsigned short)count;
            count += of_warp;
        }
        begin[list] = (unsigned short)count;
        total += count;
    }
    unsigned all, before = inclusive_sum(total, warp_sums, all) - total;
    for (int list = low; list < high; ++list) {
        const unsigned count = begin[list];
        begin[list] = (unsigned short)before;
        before += count;
    }
    if (threadIdx.x == 0) begin[lists] = (unsigned short)all;
    __syncthreads();
#pragma unroll
    for (int take = 0; take < samples_per_thread; ++take)
#pragma unroll
        for (int lower = 0; lower < contributions_per_sample; ++lower) {
            const unsigned found = at[take][lower], list = found >> 16;
            if (found != nowhere) at[take][lower] = begin[list] + mine[list] + (found & 0xffff);
        }
    starts += ((long long)head_here * runs + run) * pitch;
    for (int i = threadIdx.x; i < pitch / 2; i += threads_per_block)
        reinterpret_cast<unsigned*>(starts)[i] = reinterpret_cast<const unsigned*>(begin)[i];
    __syncthreads();

#pragma unroll
    for (int take = 0; take < samples_per_thread; ++take) {
        const int l = level_of(lot.k(take));
        const level_info level = levels[l];
        if constexpr (fused) softmax(raw[take]);    // the samples of a query stand side by side
        const sampling_point point = sampling_point_of(raw[take], 0, l, level);
        const bilinear_cell cell = locate(point.x, point.y, level);
        prepared_sample sample;
        sample.fraction_x = cell.fraction_x;
        sample.fraction_y = cell.fraction_y;
        sample.attention = point.attention;
        acc_t weight[4];
        neighbour_weights(sample, weight);
#pragma unroll
        for (int lower = 0; lower < contributions_per_sample; ++lower) {
            if (at[take][lower] == nowhere) continue;
            const located_contribution part = contribution_of(cell, level, weight, lower, slab);
            contribution entry;
            entry.query = (unsigned)lot.query(take);
            entry.row_and_pair = 2 * part.row + part.pair;
            entry.first = part.first;
            entry.second = part.second;
            copy(entry, sorted[at[take][lower]]);
        }
    }
    __syncthreads();
    entries += ((long long)head_here * runs + run) * (in_block * contributions_per_sample);
    for (unsigned i = threadIdx.x; i < all; i += threads_per_block) copy(sorted[i], entries[i]);
    if (counts && blockIdx.x == 0 && threadIdx.x == 0) counts->pieces = 0;     // for msda_count.cu
}

}  // namespace msda
