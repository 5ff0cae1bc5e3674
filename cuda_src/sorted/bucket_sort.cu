// First kernel of the sorted backward: each block sorts the contributions of its samples by segment, and writes them as one
// sorted run (sorted/buckets.cuh has a picture).
//
// A counting sort. Each warp makes a histogram of its contributions over the segments, in the order of its samples, so that
// each contribution knows its rank. An exclusive scan over the segments and the warps gives its position in the run. The
// result does not depend on which warp comes first.
//
// The run is sorted in shared memory and then copied: contributions written to their positions in global memory would cost
// a request to the L2 cache each (docs/performance/decisions.md#sorted-shared-memory-sort).
#include "common/samples.cuh"
#include "common/softmax.cuh"
#include "common/warp.cuh"
#include "sorted/buckets.cuh"
#include "sorted/contribution.cuh"

namespace msda {

constexpr int samples_per_warp = config::chunk;
constexpr int samples_per_block = config::warps * samples_per_warp;
constexpr int samples_per_thread = samples_per_warp / 32;
constexpr int contributions_per_sample = config::nearest ? 1 : 2;
constexpr int run_capacity = samples_per_block * contributions_per_sample;

constexpr int no_segment = -1;                  // of a contribution to no pixel of this launch
constexpr unsigned no_position = 0xffffffffu;

// The pixels of a launch: a multiple of config::bucket_size. A large value takes several launches.
struct pixel_slab {
    index_t first, pixels;
};

// ---- shared memory -------------------------------------------------------------------------------------------

// In this order. The sorted run takes the place of the histograms. The number of segments is known at run time only.
struct sort_shared {
    unsigned short* histograms;         // [config::warps][pitch]
    contribution* run;                  // [run_capacity]
    level_info* levels;                 // [config::L]
    unsigned* warp_sums;                // [config::warps]
    unsigned short* segment_starts;     // [pitch]

    __device__ __forceinline__ sort_shared(uint4* memory, int pitch) {
        const int run_bytes = run_capacity * (int)sizeof(contribution), histogram_bytes = config::warps * pitch * 2;
        const int first_bytes = ((run_bytes > histogram_bytes ? run_bytes : histogram_bytes) + 15) & ~15;
        histograms = reinterpret_cast<unsigned short*>(memory);
        run = reinterpret_cast<contribution*>(memory);
        levels = reinterpret_cast<level_info*>(reinterpret_cast<char*>(memory) + first_bytes);
        warp_sums = reinterpret_cast<unsigned*>(levels + config::L);
        segment_starts = reinterpret_cast<unsigned short*>(warp_sums + config::warps);
    }
};

// ---- contributions -------------------------------------------------------------------------------------------

struct located_contribution {
    int segment;
    int pixel;              // the first one, in its bucket
    bool pair;              // whether there is a second pixel
    acc_t first, second;    // weights of the two
};

// The upper (0) or lower (1) contribution of a sample; `weight` are those of its four neighbours.
__device__ __forceinline__ located_contribution contribution_of(
        const bilinear_cell& cell, const level_info& level, const acc_t (&weight)[4], int lower, const pixel_slab& slab) {
    const int present = neighbour_mask(cell, level) >> 2 * lower & 3;
    const bool only_second = present == 2;
    located_contribution found;
    found.first = only_second ? weight[2 * lower + 1] : weight[2 * lower];
    found.second = weight[2 * lower + 1];
    found.pair = present == 3;
    const index_t pixel =
        level.start + (index_t)(cell.y0 + lower) * level.w + cell.x0 + only_second - slab.first;
    found.pixel = (int)(pixel & (config::bucket_size - 1));
    const bool enters_slab = pixel == -1 && found.pair;
    found.segment =
        enters_slab
            ? 0
            : (int)(pixel / config::bucket_size * 2 + 1 + (found.pair && found.pixel == config::bucket_size - 1));
    if (present == 0 || (!enters_slab && (pixel < 0 || pixel >= slab.pixels))) found.segment = no_segment;
    return found;
}

// The samples of a lane: every 32nd of those of its warp.
struct lane_sample_range {
    long long first, end;
    __device__ __forceinline__ bool has(int i) const { return first + i * 32 < end; }
    __device__ __forceinline__ index_t number(int i) const { return (index_t)(has(i) ? first + i * 32 : 0); }
    __device__ __forceinline__ index_t query(int i) const { return number(i) / K; }
    __device__ __forceinline__ int k(int i) const { return (int)(number(i) - query(i) * K); }
};

// ---- the kernel ----------------------------------------------------------------------------------------------

// Adds this warp's contributions to its histogram. Returns segment << 16 | rank of each among those of its warp and segment.
__device__ __forceinline__ void count_contributions(
        const raw_samples<1> (&raw)[samples_per_thread], const lane_sample_range& samples, const level_info* levels,
        const pixel_slab& slab, unsigned short* histogram,
        unsigned (&segment_and_rank)[samples_per_thread][contributions_per_sample]) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int i = 0; i < samples_per_thread; ++i) {
        const int l = level_of(samples.k(i));
        const level_info level = levels[l];
        const sampling_point point = sampling_point_of(raw[i], 0, l, level);
        const bilinear_cell cell = locate(point.x, point.y, level);
        const acc_t no_weight[4] = {0, 0, 0, 0};
#pragma unroll
        for (int lower = 0; lower < contributions_per_sample; ++lower) {
            const int segment =
                samples.has(i) ? contribution_of(cell, level, no_weight, lower, slab).segment : no_segment;
            const unsigned peers = __match_any_sync(0xffffffffu, segment);
            const unsigned rank = __popc(peers & ((1u << lane) - 1));
            const unsigned before = segment < 0 ? 0 : histogram[segment];
            __syncwarp();
            if (segment >= 0 && rank == 0) histogram[segment] = (unsigned short)(before + __popc(peers));
            __syncwarp();
            segment_and_rank[i][lower] = segment < 0 ? no_position : (unsigned)segment << 16 | (before + rank);
        }
    }
}

// Exclusive scans by the whole block: over the warps in each histogram, and over the segments in `segment_starts`. Returns
// the number of all contributions. A thread takes `per_thread` neighbouring segments.
__device__ __forceinline__ unsigned scan_histograms(const sort_shared& shared, int segments, int pitch) {
    const int per_thread = (segments + threads_per_block - 1) / threads_per_block;
    const int low = min((int)threadIdx.x * per_thread, segments), high = min(low + per_thread, segments);
    unsigned total = 0;
    for (int segment = low; segment < high; ++segment) {
        unsigned count = 0;
#pragma unroll
        for (int w = 0; w < config::warps; ++w) {
            const unsigned of_warp = shared.histograms[w * pitch + segment];
            shared.histograms[w * pitch + segment] = (unsigned short)count;
            count += of_warp;
        }
        shared.segment_starts[segment] = (unsigned short)count;
        total += count;
    }
    unsigned all, before = inclusive_sum(total, shared.warp_sums, all) - total;
    for (int segment = low; segment < high; ++segment) {
        const unsigned count = shared.segment_starts[segment];
        shared.segment_starts[segment] = (unsigned short)before;
        before += count;
    }
    if (threadIdx.x == 0) shared.segment_starts[segments] = (unsigned short)all;
    __syncthreads();
    return all;
}

extern "C" __global__ void __launch_bounds__(threads_per_block, config::min_blocks) msda_bucket_sort(
        const location_t* __restrict__ locations, const __grid_constant__ level_metadata metadata,
        const location_t* __restrict__ weights, const reference_t* __restrict__ references,
        const long long* __restrict__ lengths, unsigned short* __restrict__ segment_starts,
        contribution* __restrict__ contributions, chunk_counts* counts, long long S, long long Q, long long first_head,
        long long heads, long long first_pixel, long long pixels) {
    MSDA_SHARED_MEMORY(shared_memory);
    const pixel_slab slab = {(index_t)first_pixel, (index_t)pixels};
    const int buckets = (int)(slab.pixels / config::bucket_size);
    const int segments = segments_of(buckets), pitch = segments_pitch(buckets);
    const sort_shared shared(shared_memory, pitch);
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    unsigned short* histogram = shared.histograms + warp * pitch;

    const unsigned runs = (unsigned)((Q * K + samples_per_block - 1) / samples_per_block);
    const unsigned head_in_launch = blockIdx.x / runs, run = blockIdx.x % runs;
    const long long head = first_head + head_in_launch;
    if (head >= heads) return;
    const assignment work = {head / config::M, (int)(head % config::M), 0};
    lane_sample_range samples;
    samples.end = (long long)valid_queries(lengths, work.image, (index_t)Q) * K;
    locations += first_element(work, Q, locations_pitch);
    weights += first_element(work, Q, weights_pitch);
    if constexpr (fused) references += work.image * Q * (config::reference_levels * config::reference_coordinates);
    samples.first = (long long)run * samples_per_block + warp * samples_per_warp + lane;

    raw_samples<1> raw[samples_per_thread];
#pragma unroll
    for (int i = 0; i < samples_per_thread; ++i)
        load_location(raw[i], 0, samples.query(i), 0, samples.k(i), locations, references);
    read_levels(metadata, S, 0, shared.levels);
    for (int i = lane; i < pitch / 2; i += 32) reinterpret_cast<unsigned*>(histogram)[i] = 0;
    __syncthreads();

    unsigned segment_and_rank[samples_per_thread][contributions_per_sample];
    count_contributions(raw, samples, shared.levels, slab, histogram, segment_and_rank);
#pragma unroll
    for (int i = 0; i < samples_per_thread; ++i)
        raw[i].attention[0] = load_attention(weights, samples.query(i), 0, samples.k(i));
    __syncthreads();

    const unsigned all = scan_histograms(shared, segments, pitch);
    unsigned position[samples_per_thread][contributions_per_sample];
#pragma unroll
    for (int i = 0; i < samples_per_thread; ++i)
#pragma unroll
        for (int lower = 0; lower < contributions_per_sample; ++lower) {
            const unsigned found = segment_and_rank[i][lower], segment = found >> 16;
            position[i][lower] = no_position;
            if (found != no_position)
                position[i][lower] = shared.segment_starts[segment] + histogram[segment] + (found & 0xffff);
        }
    segment_starts += ((long long)head_in_launch * runs + run) * pitch;
    for (int i = threadIdx.x; i < pitch / 2; i += threads_per_block)
        reinterpret_cast<unsigned*>(segment_starts)[i] = reinterpret_cast<const unsigned*>(shared.segment_starts)[i];
    __syncthreads();    // the sorted run takes the place of the histograms

#pragma unroll
    for (int i = 0; i < samples_per_thread; ++i) {
        const int l = level_of(samples.k(i));
        const level_info level = shared.levels[l];
        if constexpr (fused) softmax(raw[i]);   // the samples of a query lie in neighbouring lanes
        const sampling_point point = sampling_point_of(raw[i], 0, l, level);
        const bilinear_cell cell = locate(point.x, point.y, level);
        prepared_sample sample;
        sample.fraction_x = cell.fraction_x;
        sample.fraction_y = cell.fraction_y;
        sample.attention = point.attention;
        acc_t weight[4];
        neighbour_weights(sample, weight);
#pragma unroll
        for (int lower = 0; lower < contributions_per_sample; ++lower) {
            if (position[i][lower] == no_position) continue;
            const located_contribution found = contribution_of(cell, level, weight, lower, slab);
            contribution written;
            written.query = (unsigned)samples.query(i);
            written.pixel_and_pair = 2 * found.pixel + found.pair;
            written.first = found.first;
            written.second = found.second;
            copy(written, shared.run[position[i][lower]]);
        }
    }
    __syncthreads();
    contributions += ((long long)head_in_launch * runs + run) * run_capacity;
    for (unsigned i = threadIdx.x; i < all; i += threads_per_block) copy(shared.run[i], contributions[i]);
    if (counts && blockIdx.x == 0 && threadIdx.x == 0) counts->listed = 0;      // split_buckets.cu adds to it
}

}  // namespace msda
