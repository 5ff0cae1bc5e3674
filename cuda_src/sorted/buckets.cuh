// Parts, bins, lists and runs: how the gradient of value is summed without atomics. Shared by msda_sort.cu,
// msda_count.cu, msda_sum.cu and msda_add.cu.
//
// A part is what a sample adds to two neighbouring rows of value: its upper two pixels are one part, its lower two the
// other; at an edge of the level only one of the two rows may be left. MSDA_ROWS consecutive rows of value, of one head
// of one image, are a bin, which is summed and written at once. A run is the parts of consecutive samples of a head, in
// lists: two a bin, so that a pair that reaches into the next bin stands between the lists of both, and a first list for
// pairs that reach into bin 0 from the row before it. Bin t then owns what stands in lists 2t, 2t + 1 and 2t + 2 of each
// run, one stretch of memory.

// A part in its list; in shared memory `row` counts from the row before the bin.
struct alignas(16) msda_entry {
    unsigned query;
    unsigned row_and_pair;      // 2 * row in its bin + whether the second row counts
    msda_acc first, second;     // factors of grad_output for the two rows
};

__device__ __forceinline__ void msda_copy(const msda_entry& from, msda_entry& to) {
#pragma unroll
    for (int i = 0; i < (int)(sizeof(msda_entry) / 16); ++i)
        reinterpret_cast<uint4*>(&to)[i] = reinterpret_cast<const uint4*>(&from)[i];
}

#define MSDA_PARTS (MSDA_NEAREST ? 1 : 2)

// Rows of value: a multiple of MSDA_ROWS. Where value has more than one launch can count, one slab follows the other.
struct msda_slab {
    msda_index first, rows;
};

// Numbers of a run in `starts`: where each of 2 * bins + 1 lists begins, and where the last one ends.
__device__ __forceinline__ int msda_pitch_of(int bins) { return 2 * bins + 2; }

// A bin of rows as the sum sees it: its parts stand in `runs` runs of at most `capacity` parts.
struct msda_bin {
    const msda_entry* entries;
    const unsigned short* starts;   // of the first run, at list 2t
    int pitch;
    long long runs, capacity;
    const msda_value* grad_output;  // of this image and head
    msda_value* grad_value;         // row 0 of the bin, at this head
    int rows;                       // of the bin, that value has: 0 for a bin that is none
};

// Bin `number` of head `head_here` of a launch.
__device__ __forceinline__ msda_bin msda_bin_at(
        const msda_value* grad_output, const msda_entry* entries, const unsigned short* starts, msda_value* grad_value,
        long long S, long long Q, long long runs, long long capacity, long long first_head, long long heads,
        long long first_row, long long rows, unsigned head_here, unsigned number) {
    const unsigned bins = (unsigned)(rows / MSDA_ROWS);
    const long long head = first_head + head_here, first = first_row + (long long)number * MSDA_ROWS;
    const long long image = head / MSDA_M, m = head % MSDA_M;
    msda_bin bin;
    bin.pitch = msda_pitch_of((int)bins);
    bin.entries = entries + head_here * runs * capacity;
    bin.starts = starts + head_here * runs * bin.pitch + 2 * number;
    bin.runs = runs;
    bin.capacity = capacity;
    bin.grad_output = grad_output + (image * Q * MSDA_M + m) * MSDA_D;
    bin.grad_value = grad_value + ((image * S + first) * MSDA_M + m) * MSDA_D;
    bin.rows = head < heads && number < bins && first < S ? (int)min(S - first, (long long)MSDA_ROWS) : 0;
    return bin;
}

// Where the parts of a bin stand in a run: from its beginning; those before `own` are pairs of the bin before, whose second
// rows are this bin's row 0.
struct msda_stretch {
    unsigned from, own, to;
    __device__ __forceinline__ unsigned count() const { return to - from; }
};

// `starts` of the run, at list 2t.
__device__ __forceinline__ msda_stretch msda_stretch_at(const unsigned short* starts) {
    const unsigned* pair = reinterpret_cast<const unsigned*>(starts);
    const unsigned begins = __ldg(pair), ends = __ldg(pair + 1);
    msda_stretch stretch = {begins & 0xffff, begins >> 16, ends >> 16};
    return stretch;
}

__device__ __forceinline__ msda_stretch msda_stretch_of(const msda_bin& bin, long long run) {
    msda_stretch nothing = {0, 0, 0};
    return run < bin.runs ? msda_stretch_at(bin.starts + run * bin.pitch) : nothing;
}

// A bin of more than a certain number of parts is summed in pieces of that number, by a block each; the block that ends
// last adds up what the others left.
struct alignas(16) msda_piece {
    unsigned bin;               // head_here * bins + number
    unsigned number, pieces;    // of the bin
    unsigned first;             // place of the bin's piece 0 in the list, and of its sums
};

struct msda_counts {
    unsigned pieces, padding[3];    // in the list
    struct {
        unsigned pieces, done;
    } of_bin[1];                    // of all bins of a launch
};

typedef msda_vector<msda_acc, MSDA_VEC> msda_sums;

// Writes the sums of a lane to row `row` of a bin.
__device__ __forceinline__ void msda_write_row(const msda_bin& bin, int row, int channel, const msda_acc (&sum)[MSDA_VEC]) {
    msda_values out;
#pragma unroll
    for (int v = 0; v < MSDA_VEC; ++v) msda_store(sum[v], out.element[v]);
    msda_value* target = bin.grad_value + (long long)row * (MSDA_M * MSDA_D) + channel;
    // First out of the L2 cache, which grad_value would empty of all that is read (decoder_300 30 -> 28 us with the sort).
    __stcs(reinterpret_cast<decltype(out.word)*>(target), out.word);
}

// Asks for a row of grad_output while the parts are still being sorted: 3 to 5 % of the sum (into L2 or L1, no difference).
__device__ __forceinline__ void msda_prefetch(const msda_value* row) {
#if MSDA_PTX
    asm volatile("prefetch.global.L2 [%0];" :: "l"(row));
#endif
}
