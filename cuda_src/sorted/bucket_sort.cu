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
#include "sorted/bucket_sizes.cuh"
#include "sorted/contribution.cuh"

namespace msda {

constexpr int samples_per_warp = config::chunk;
constexpr int samples_per_block = config::warps * samples_per_warp;
constexpr int samples_per_thread = samples_per_warp / 32;
constexpr int run_capacity = samples_per_block * contributions_per_sample;

// The pixels of a launch. A large value takes several launches.
struct pixel_slab {
    index_t first, pixels;
};

// ---- shared memory -------------------------------------------------------------------------------------------

enum : int { sizes_offset = (config::L * (int)sizeof(level_info) + 4 * config::warps + 15) / 16 * 16 };

// In this order. The sorted run takes the place of the histograms. The number of segments is known at run time only.
struct sort_shared {
    unsigned short* histograms;         // [config::warps][pitch]
    contribution* run;                  // [run_capacity]
    level_info* levels;                 // [config::L]
    unsigned* warp_sums;                // [config::warps]
    bucket_sizes* sizes;
    unsigned short* segment_starts;     // [pitch]

    __device__ __forceinline__ sort_shared(uint4* memory, int pitch) {
        const int run_bytes = run_capacity * (int)sizeof(contribution), histogram_bytes = config::warps * pitch * 2;
        const int first_bytes = ((run_bytes > histogram_bytes ? run_bytes : histogram_bytes) + 15) & ~15;
        histograms = reinterpret_cast<unsigned short*>(memory);
        run = reinterpret_cast<contribution*>(memory);
        levels = reinterpret_cast<level_info*>(reinterpret_cast<char*>(memory) + first_bytes);
        warp_sums = reinterpret_cast<unsigned*>(levels + config::L);
        sizes = reinterpret_cast<bucket_sizes*>(reinterpret_cast<char*>(levels) + sizes_offset);
        segment_starts = reinterpret_cast<unsigned short*>(sizes + 1);
    }

    // The region of a pixel of level `l`, at the first pixel of that level or after it.
    __device__ __forceinline__ bucket_region region_of(int l, index_t pixel) const {
        bucket_region region = load_region(sizes->of_level + (has_regions ? l : 0));
        if constexpr (has_regions) {
            // Levels overlap: the pixel is in a later one, too.
            if (pixel >= region.end_pixel) {
                int r = 0;
                while (pixel >= sizes->table.region[r].end_pixel) ++r;
                region = load_region(sizes->table.region + r);
            }
        }
        return region;
    }
};

// ---- contributions -------------------------------------------------------------------------------------------

// What of a contribution does not depend on its weights, in the bits of a word: its segment, and its rank among those of its
// warp and segment, later its position in the run; the number of its first pixel in the bucket; whether it has a second pixel;
// and whether its only pixel is the right one of its row.
enum : unsigned { no_contribution = 0xffffffffu, place_bits = 12, pixel_bits = 6 };
static_assert(config::bucket_size <= 1 << pixel_bits && run_capacity < 1 << place_bits, "they fit into a word");

__device__ __forceinline__ unsigned packed(unsigned segment, unsigned rank, unsigned pixel_and_kind) {
    return segment << (place_bits + pixel_bits + 2) | rank << (pixel_bits + 2) | pixel_and_kind;
}
__device__ __forceinline__ unsigned segment_of(unsigned word) { return word >> (place_bits + pixel_bits + 2); }
__device__ __forceinline__ unsigned rank_of(unsigned word) { return word >> (pixel_bits + 2) & ((1 << place_bits) - 1); }
__device__ __forceinline__ unsigned pixel_of(unsigned word) { return word >> 2 & ((1 << pixel_bits) - 1); }
__device__ __forceinline__ bool is_pair(unsigned word) { return word & 2; }
__device__ __forceinline__ bool is_right(unsigned word) { return word & 1; }

// The upper (0) or lower (1) contribution of a sample of level `l`, without its rank.
__device__ __forceinline__ unsigned contribution_of(
        const bilinear_cell& cell, const level_info& level, int lower, const pixel_slab& slab, const sort_shared& shared,
        int l) {
    const int present = neighbour_mask(cell, level) >> 2 * lower & 3;
    const bool right = present == 2, pair = present == 3;
    const index_t pixel = level.start + (index_t)(cell.y0 + lower) * level.w + cell.x0 + right - slab.first;
    // The pixel before the slab counts where the second one of the pair is in it.
    if (present == 0 || pixel < -(index_t)pair || pixel >= slab.pixels) return no_contribution;
    const bucket_region region = shared.region_of(l, pixel);
    const int in_region = (int)pixel - region.first_pixel, last = (1 << region.shift) - 1, in_bucket = in_region & last;
    const bool crosses = pair && (in_bucket == last || pixel + 1 == region.end_pixel);
    const int segment = 2 * (region.first_bucket + (in_region >> region.shift)) + 1 + crosses;
    return packed((unsigned)segment, 0, in_bucket << 2 | pair << 1 | right);
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

// Adds this warp's contributions to its histogram, and their ranks to `contributions`.
__device__ __forceinline__ void count_contributions(
        const raw_samples<1> (&raw)[samples_per_thread], const lane_sample_range& samples, const sort_shared& shared,
        const pixel_slab& slab, unsigned short* histogram,
        unsigned (&contributions)[samples_per_thread][contributions_per_sample]) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int i = 0; i < samples_per_thread; ++i) {
        const int l = level_of(samples.k(i));
        const level_info level = shared.levels[l];
        const sampling_point point = sampling_point_of(raw[i], 0, l, level);
        const bilinear_cell cell = locate(point.x, point.y, level);
#pragma unroll
        for (int lower = 0; lower < contributions_per_sample; ++lower) {
            const unsigned found = samples.has(i) ? contribution_of(cell, level, lower, slab, shared, l) : no_contribution;
            const unsigned segment = segment_of(found), peers = __match_any_sync(0xffffffffu, segment);
            const unsigned rank = __popc(peers & ((1u << lane) - 1));
            const unsigned before = found == no_contribution ? 0 : histogram[segment];
            __syncwarp();
            if (found != no_contribution && rank == 0) histogram[segment] = (unsigned short)(before + __popc(peers));
            __syncwarp();
            contributions[i][lower] = found == no_contribution ? found : found + packed(0, before + rank, 0);
        }
    }
}

// Exclusive scans by the whole block: over the warps in each histogram, and over the segments in `segment_starts`. Returns
// the number of all contributions. A thread takes neighbouring words of two segments each, an odd number of them: the
// threads of a warp then read different banks.
__device__ __forceinline__ unsigned scan_histograms(const sort_shared& shared, int pitch) {
    const int words = pitch / 2, per_thread = (words + threads_per_block - 1) / threads_per_block | 1;
    const int low = min((int)threadIdx.x * per_thread, words), high = min(low + per_thread, words);
    unsigned* histograms = reinterpret_cast<unsigned*>(shared.histograms);
    unsigned* starts = reinterpret_cast<unsigned*>(shared.segment_starts);
    unsigned total = 0;
    for (int word = low; word < high; ++word) {
        unsigned counts = 0;    // of both segments, which do not overflow
#pragma unroll
        for (int w = 0; w < config::warps; ++w) {
            const unsigned of_warp = histograms[w * words + word];
            histograms[w * words + word] = counts;
            counts += of_warp;
        }
        starts[word] = counts;
        total += (counts & 0xffff) + (counts >> 16);
    }
    unsigned all, before = inclusive_sum(total, shared.warp_sums, all) - total;
    for (int word = low; word < high; ++word) {
        const unsigned counts = starts[word], second = before + (counts & 0xffff);
        starts[word] = before | second << 16;
        before = second + (counts >> 16);
    }
    __syncthreads();
    return all;
}

extern "C" __global__ void __launch_bounds__(threads_per_block, config::min_blocks) msda_bucket_sort(
        const location_t* __restrict__ locations, const __grid_constant__ level_metadata metadata,
        const location_t* __restrict__ weights, const reference_t* __restrict__ references,
        const long long* __restrict__ lengths, unsigned short* __restrict__ segment_starts,
        contribution* __restrict__ contributions, bucket_table* table, chunk_queue* queue,
        long long queued, long long contributions_per_bucket, long long S, long long Q, long long first_head, long long heads,
        long long first_pixel, long long buckets, long long pixels) {
    MSDA_SHARED_MEMORY(shared_memory);
    const pixel_slab slab = {(index_t)first_pixel, (index_t)pixels};
    const int pitch = segments_pitch((int)buckets);
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
    __syncthreads();
    if (warp == 0)
        choose_bucket_sizes(*shared.sizes, shared.levels, S, Q, first_pixel, pixels, (int)buckets, contributions_per_bucket);
    for (int i = lane; i < pitch / 2; i += 32) reinterpret_cast<unsigned*>(histogram)[i] = 0;
    __syncthreads();

    unsigned found[samples_per_thread][contributions_per_sample];
    count_contributions(raw, samples, shared, slab, histogram, found);
#pragma unroll
    for (int i = 0; i < samples_per_thread; ++i)
        raw[i].attention[0] = load_attention(weights, samples.query(i), 0, samples.k(i));
    __syncthreads();

    const unsigned all = scan_histograms(shared, pitch);
#pragma unroll
    for (int i = 0; i < samples_per_thread; ++i)
#pragma unroll
        for (int lower = 0; lower < contributions_per_sample; ++lower) {
            const unsigned word = found[i][lower], segment = segment_of(word);
            if (word != no_contribution)
                found[i][lower] = packed(0, shared.segment_starts[segment] + histogram[segment], 0) + word;
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
            const unsigned word = found[i][lower];
            if (word == no_contribution) continue;
            contribution written;
            written.query = (unsigned)samples.query(i);
            written.pixel_and_pair = 2 * pixel_of(word) + is_pair(word);
            written.first = weight[2 * lower + is_right(word)];
            written.second = weight[2 * lower + 1];
            copy(written, shared.run[rank_of(word)]);
        }
    }
    __syncthreads();
    contributions += ((long long)head_in_launch * runs + run) * run_capacity;
    for (unsigned i = threadIdx.x; i < all; i += threads_per_block) copy(shared.run[i], contributions[i]);
    if (blockIdx.x == 0 && warp == 0) {
        table->region[lane] = shared.sizes->table.region[lane];
        if (lane == 0) table->buckets = shared.sizes->table.buckets;
    }
    // An empty queue, for reduce_buckets.cu.
    if (queue && blockIdx.x == 0 && threadIdx.x == 0) *reinterpret_cast<uint4*>(queue) = uint4();
    if (queue)
        for (long long i = blockIdx.x * threads_per_block + threadIdx.x; i < 2 * queued; i += gridDim.x * threads_per_block)
            reinterpret_cast<uint4*>(queue->chunk)[i] = uint4();
}

}  // namespace msda
