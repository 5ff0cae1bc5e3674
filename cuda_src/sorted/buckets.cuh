// Parts, bins, lists and runs: how the gradient of value is summed without atomics. Shared by msda_sort.cu,
// msda_count.cu, msda_sum.cu and atomic_add_channels.cu.
//
// A part is what a sample adds to two neighbouring rows of value: its upper two pixels are one part, its lower two the
// other; at an edge of the level only one of the two rows may be left. config::bucket_size consecutive rows of value, of one head
// of one image, are a bin, which is summed and written at once. A run is the parts of consecutive samples of a head, in
// lists: two a bin, so that a pair that reaches into the next bin stands between the lists of both, and a first list for
// pairs that reach into bin 0 from the row before it. Bin t then owns what stands in lists 2t, 2t + 1 and 2t + 2 of each
// run, one stretch of memory.
#pragma once
#include "common/channels.cuh"
#include "common/index.cuh"

namespace msda {

// A part in its list; in shared memory `row` counts from the row before the bin.
struct alignas(16) contribution {
    unsigned query;
    unsigned row_and_pair;      // 2 * row in its bin + whether the second row counts
    acc_t first, second;     // factors of grad_output for the two rows
};

__device__ __forceinline__ void copy(const contribution& from, contribution& to) {
#pragma unroll
    for (int i = 0; i < (int)(sizeof(contribution) / 16); ++i)
        reinterpret_cast<uint4*>(&to)[i] = reinterpret_cast<const uint4*>(&from)[i];
}

constexpr int contributions_per_sample = config::nearest ? 1 : 2;

// Rows of value: a multiple of config::bucket_size. Where value has more than one launch can count, one slab follows the other.
struct value_slab {
    index_t first, rows;
};

// Numbers of a run in `starts`: where each of 2 * bins + 1 lists begins, and where the last one ends.
__device__ __forceinline__ int segments_pitch(int bins) { return 2 * bins + 2; }

// A bin of rows as the sum sees it: its parts stand in `runs` runs of at most `capacity` parts.
struct bucket {
    const contribution* entries;
    const unsigned short* starts;   // of the first run, at list 2t
    int pitch;
    long long runs, capacity;
    const value_t* grad_output;  // of this image and head
    value_t* grad_value;         // row 0 of the bin, at this head
    int rows;                       // of the bin, that value has: 0 for a bin that is none
};

// Bin `number` of head `head_here` of a launch.
__device__ __forceinline__ bucket bucket_at(
        const value_t* grad_output, const contribution* entries, const unsigned short* starts, value_t* grad_value,
        long long S, long long Q, long long runs, long long capacity, long long first_head, long long heads,
        long long first_row, long long rows, unsigned head_here, unsigned number) {
    const unsigned bins = (unsigned)(rows / config::bucket_size);
    const long long head = first_head + head_here, first = first_row + (long long)number * config::bucket_size;
    const long long image = head / config::M, m = head % config::M;
    bucket bin;
    bin.pitch = segments_pitch((int)bins);
    bin.entries = entries + head_here * runs * capacity;
    bin.starts = starts + head_here * runs * bin.pitch + 2 * number;
    bin.runs = runs;
    bin.capacity = capacity;
    bin.grad_output = grad_output + (image * Q * config::M + m) * config::D;
    bin.grad_value = grad_value + ((image * S + first) * config::M + m) * config::D;
    bin.rows = head < heads && number < bins && first < S ? (int)min(S - first, (long long)config::bucket_size) : 0;
    return bin;
}

// Where the parts of a bin stand in a run: from its beginning; those before `own` are pairs of the bin before, whose second
// rows are this bin's row 0.
struct segment {
    unsigned from, own, to;
    __device__ __forceinline__ unsigned count() const { return to - from; }
};

// `starts` of the run, at list 2t.
__device__ __forceinline__ segment load_segment(const unsigned short* starts) {
    const unsigned* pair = reinterpret_cast<const unsigned*>(starts);
    const unsigned begins = __ldg(pair), ends = __ldg(pair + 1);
    segment stretch = {begins & 0xffff, begins >> 16, ends >> 16};
    return stretch;
}

__device__ __forceinline__ segment segment_of(const bucket& bin, long long run) {
    segment nothing = {0, 0, 0};
    return run < bin.runs ? load_segment(bin.starts + run * bin.pitch) : nothing;
}

// A bin of more than a certain number of parts is summed in pieces of that number, by a block each; the block that ends
// last adds up what the others left.
struct alignas(16) bucket_chunk {
    unsigned bin;               // head_here * bins + number
    unsigned number, pieces;    // of the bin
    unsigned first;             // place of the bin's piece 0 in the list, and of its sums
};

struct chunk_counts {
    unsigned pieces, padding[3];    // in the list
    struct {
        unsigned pieces, done;
    } of_bin[1];                    // of all bins of a launch
};

typedef vector<acc_t, config::vec> sum_vector;

// Writes the sums of a lane to row `row` of a bin.
__device__ __forceinline__ void write_value_vector(const bucket& bin, int row, int channel, const acc_t (&sum)[config::vec]) {
    channel_vector out;
#pragma unroll
    for (int v = 0; v < config::vec; ++v) narrow(sum[v], out.element[v]);
    value_t* target = bin.grad_value + (long long)row * (config::M * config::D) + channel;
    // First out of the L2 cache, which grad_value would empty of all that is read (decoder_300 30 -> 28 us with the sort).
    __stcs(reinterpret_cast<decltype(out.word)*>(target), out.word);
}

// Asks for a row of grad_output while the parts are still being sorted: 3 to 5 % of the sum (into L2 or L1, no difference).
__device__ __forceinline__ void prefetch(const value_t* row) {
#if MSDA_PTX
    asm volatile("prefetch.global.L2 [%0];" :: "l"(row));
#endif
}

}  // namespace msda
