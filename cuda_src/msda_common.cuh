// Types, vector access and bilinear cells shared by the kernels of this folder.
//
// The planner (cupy_msda/plan.py) passes every size that is fixed for a model as a macro:
//   MSDA_VALUE_*      dtype of value, output and grad_output (F16, BF16, F32 or F64), MSDA_LOCATION_* likewise
//   MSDA_INDEX_64     offsets inside one image need 64 bits
//   MSDA_L, MSDA_P, MSDA_M, MSDA_D   levels, points, heads, channels a head
//   MSDA_VEC          channels a lane moves at once
//   MSDA_LANES        lanes that share the channels of one (n, q, m)
//   MSDA_QUERIES      queries of a block, all of one head
//   MSDA_CHUNK        samples of a query that are in shared memory at a time
//   MSDA_THREADS, MSDA_MIN_BLOCKS    launch bounds
//   MSDA_LEVELS_ON_DEVICE            spatial_shapes and level_start_index are device arrays, unchecked
//   MSDA_BAND         0: queries in order; otherwise rows of a band in which neighbouring queries share a block

typedef unsigned long long msda_address;

#if MSDA_INDEX_64
typedef long long msda_index;
typedef unsigned long long msda_unsigned;
#define MSDA_ELSEWHERE (-9223372036854775807LL - 1)
#else
typedef int msda_index;
typedef unsigned int msda_unsigned;
#define MSDA_ELSEWHERE (-2147483647 - 1)
#endif

#if MSDA_VALUE_F64
typedef double msda_acc;
#else
typedef float msda_acc;
#endif

struct msda_f16 { unsigned short bits; };
struct msda_bf16 { unsigned short bits; };

#if MSDA_VALUE_F16
typedef msda_f16 msda_value;
#elif MSDA_VALUE_BF16
typedef msda_bf16 msda_value;
#else
typedef msda_acc msda_value;
#endif

#if MSDA_LOCATION_F16
typedef msda_f16 msda_location;
#elif MSDA_LOCATION_BF16
typedef msda_bf16 msda_location;
#else
typedef msda_acc msda_location;
#endif

#define MSDA_K (MSDA_L * MSDA_P)
#define MSDA_STEP (MSDA_LANES * MSDA_VEC)                      // channels between two turns of a lane
#define MSDA_TURNS ((MSDA_D + MSDA_STEP - 1) / MSDA_STEP)

// ---- conversions: 16-bit numbers travel as bits, arithmetic is msda_acc -------------------------------------

__device__ __forceinline__ float msda_load(float x) { return x; }
__device__ __forceinline__ double msda_load(double x) { return x; }
__device__ __forceinline__ float msda_load(msda_f16 x) {
    float y;
    asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits));
    return y;
}
__device__ __forceinline__ float msda_load(msda_bf16 x) { return __uint_as_float((unsigned)x.bits << 16); }

__device__ __forceinline__ void msda_store(float x, float& y) { y = x; }
__device__ __forceinline__ void msda_store(double x, double& y) { y = x; }
__device__ __forceinline__ void msda_store(float x, msda_f16& y) {
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
}
__device__ __forceinline__ void msda_store(float x, msda_bf16& y) {
    // In integers: the instruction exists from sm_80 on only.
    const unsigned bits = __float_as_uint(x);
    y.bits = x != x ? 0x7fc0 : (unsigned short)((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

// ---- vectors -----------------------------------------------------------------------------------------------

template <int BYTES> struct msda_word;
template <> struct msda_word<16> { typedef uint4 type; };
template <> struct msda_word<8> { typedef uint2 type; };
template <> struct msda_word<4> { typedef unsigned type; };
template <> struct msda_word<2> { typedef unsigned short type; };

template <typename T, int N>
union msda_vector {
    typename msda_word<sizeof(T) * N>::type word;
    T element[N];
    __device__ __forceinline__ msda_vector() {}
};

typedef msda_vector<msda_value, MSDA_VEC> msda_values;

// Read-only data, through L1.
__device__ __forceinline__ msda_values msda_read(msda_address address) {
    msda_values v;
    v.word = __ldg(reinterpret_cast<const decltype(v.word)*>(address));
    return v;
}

// ---- levels ------------------------------------------------------------------------------------------------

struct msda_level {
    msda_index start;
    int h, w;       // 0 for a level that does not fit into the S rows of value
};

#if MSDA_LEVELS_ON_DEVICE
struct msda_metadata {
    const long long* shapes;    // [L, 2]
    const long long* starts;    // [L], or null: levels are packed
};
#else
struct msda_metadata {
    long long level[MSDA_L][3];  // h, w, start; by value, so that a call needs no copy to the device
};
#endif

__device__ __forceinline__ void msda_read_levels(const msda_metadata& metadata, long long S, msda_level* levels) {
    for (int l = threadIdx.x; l < MSDA_L; l += MSDA_THREADS) {
#if MSDA_LEVELS_ON_DEVICE
        const long long h = metadata.shapes[2 * l], w = metadata.shapes[2 * l + 1];
        long long start = 0;
        if (metadata.starts) {
            start = metadata.starts[l];
        } else {
            // Unsigned, because garbage may wrap around; what then seems to fit is still inside the array.
            for (int k = 0; k < l; ++k)
                start = (long long)((msda_address)start +
                                    (msda_address)metadata.shapes[2 * k] * (msda_address)metadata.shapes[2 * k + 1]);
        }
#else
        const long long h = metadata.level[l][0], w = metadata.level[l][1], start = metadata.level[l][2];
#endif
        const bool fits = h > 0 && w > 0 && h <= 0x7fffffff && w <= 0x7fffffff && start >= 0 && start <= S &&
                          h * w <= S - start;
        levels[l].h = fits ? (int)h : 0;
        levels[l].w = fits ? (int)w : 0;
        levels[l].start = fits ? (msda_index)start : 0;
    }
}

// ---- order of queries ----------------------------------------------------------------------------------------

// Query at `position` of the order in which blocks take them. Where queries are the pixels of all levels, a block
// then holds a patch of MSDA_BAND rows instead of a line, and its samples share more of L1.
__device__ __forceinline__ long long msda_query(long long position, long long Q, const msda_level* levels) {
#if MSDA_BAND
    long long total = 0;
    bool packed = true;
    for (int l = 0; l < MSDA_L; ++l) {
        packed = packed && levels[l].start == total;
        total += (long long)levels[l].h * levels[l].w;
    }
    if (!packed || total != Q) return position;
    int l = 0;
    while (position >= levels[l].start + (long long)levels[l].h * levels[l].w) ++l;
    const unsigned inside = (unsigned)(position - levels[l].start);
    const unsigned h = levels[l].h, w = levels[l].w;
    const unsigned band = inside / (MSDA_BAND * w), first_row = band * MSDA_BAND;
    const unsigned in_band = inside - first_row * w;
    const unsigned rows = min((unsigned)MSDA_BAND, h - first_row);
    const unsigned column = rows == MSDA_BAND ? in_band / MSDA_BAND : in_band / rows;
    return levels[l].start + (long long)(first_row + (in_band - column * rows)) * w + column;
#else
    return position;
#endif
}

// ---- bilinear cells ----------------------------------------------------------------------------------------

struct msda_cell {
    int x0, y0;
    msda_acc ax, ay;    // fractions: weight of the right column and of the bottom row
    bool counts;        // -1 < px < W and -1 < py < H; false for NaN and for a level that does not fit
};

__device__ __forceinline__ msda_cell msda_locate(msda_acc x, msda_acc y, const msda_level& level) {
    const msda_acc w = (msda_acc)level.w, h = (msda_acc)level.h, half = (msda_acc)0.5;
    const msda_acc px = fma(x, w, -half), py = fma(y, h, -half);
    msda_cell cell;
    cell.counts = px > -1 && py > -1 && px < w && py < h && level.w > 0;
    const msda_acc fx = cell.counts ? floor(px) : 0, fy = cell.counts ? floor(py) : 0;
    cell.x0 = (int)fx;
    cell.y0 = (int)fy;
    // Not px - fx: that has lost log2(W) bits already, this is rounded once.
    cell.ax = fma(x, w, -half - fx);
    cell.ay = fma(y, h, -half - fy);
    return cell;
}

// What the lanes of a query need of one sample: where its four neighbours begin, in elements of the image, and their
// weights with the attention weight folded in.
struct msda_sample {
    msda_index offset[4];
    msda_acc weight[4];
};

// A neighbour outside the level is replaced by the one inside, read twice with half of the weight each: no branch,
// and an infinity or NaN elsewhere in value cannot leak in. A sample that does not count reads the row of zeros.
__device__ __forceinline__ msda_sample msda_prepare(
        msda_acc x, msda_acc y, msda_acc attention, const msda_level& level, int m) {
    const msda_cell cell = msda_locate(x, y, level);
    msda_sample sample;
    if (!cell.counts) {
        const msda_acc weight = level.w > 0 ? (msda_acc)0 : (msda_acc)__int_as_float(0x7fc00000);
        for (int c = 0; c < 4; ++c) {
            sample.offset[c] = MSDA_ELSEWHERE;
            sample.weight[c] = weight;
        }
        return sample;
    }
    const msda_acc half = (msda_acc)0.5;
    msda_acc left = 1 - cell.ax, right = cell.ax, top = 1 - cell.ay, bottom = cell.ay;
    int x0 = cell.x0, x1 = cell.x0 + 1, y0 = cell.y0, y1 = cell.y0 + 1;
    if (x0 < 0) { x0 = 0; left = right = half * right; }
    else if (x1 >= level.w) { x1 = x0; left = right = half * left; }
    if (y0 < 0) { y0 = 0; top = bottom = half * bottom; }
    else if (y1 >= level.h) { y1 = y0; top = bottom = half * top; }
    top *= attention;
    bottom *= attention;
    const msda_index row = MSDA_M * MSDA_D;
    const msda_index upper = (level.start + (msda_index)y0 * level.w) * row + m * MSDA_D;
    const msda_index lower = (level.start + (msda_index)y1 * level.w) * row + m * MSDA_D;
    sample.offset[0] = upper + x0 * row;
    sample.offset[1] = upper + x1 * row;
    sample.offset[2] = lower + x0 * row;
    sample.offset[3] = lower + x1 * row;
    sample.weight[0] = top * left;
    sample.weight[1] = top * right;
    sample.weight[2] = bottom * left;
    sample.weight[3] = bottom * right;
    return sample;
}

// Samples of a chunk, padded to an odd number a query: the lane groups of a warp then read from different banks.
#define MSDA_PITCH (MSDA_CHUNK | 1)

struct alignas(16) msda_offsets { msda_index at[4]; };
struct alignas(16) msda_weights { msda_acc at[4]; };

struct msda_table {
    msda_offsets offsets[MSDA_QUERIES * MSDA_PITCH];
    msda_weights weights[MSDA_QUERIES * MSDA_PITCH];
    msda_level levels[MSDA_L];
    long long query[MSDA_QUERIES];     // -1 past the last one
};

// Zeros for samples that do not count, with the alignment of a vector load.
__device__ uint4 msda_zeros[(MSDA_D * sizeof(msda_value) + 15) / 16];

// Base address such that base + MSDA_ELSEWHERE elements is the row of zeros. In integers, modulo 2**64.
__device__ __forceinline__ msda_address msda_zeros_base() {
    return (msda_address)(msda_zeros) - (msda_address)(long long)MSDA_ELSEWHERE * sizeof(msda_value);
}

__device__ __forceinline__ msda_address msda_at(msda_address base, msda_index offset) {
    return base + (msda_address)(long long)offset * sizeof(msda_value);
}

struct msda_tile {
    long long n;
    int m;
    long long first;    // position of its first query
};

// Tiles in the order image, head, queries: the blocks that run together share one head's rows.
__device__ __forceinline__ msda_tile msda_tile_at(long long index, long long Q) {
    const long long tiles = (Q + MSDA_QUERIES - 1) / MSDA_QUERIES;
    msda_tile tile;
    const long long head = index / tiles;
    tile.first = (index - head * tiles) * MSDA_QUERIES;
    tile.n = head / MSDA_M;
    tile.m = (int)(head - tile.n * MSDA_M);
    return tile;
}

__device__ __forceinline__ void msda_choose_queries(msda_table& table, const msda_tile& tile, long long Q) {
    for (int i = threadIdx.x; i < MSDA_QUERIES; i += MSDA_THREADS) {
        const long long position = tile.first + i;
        table.query[i] = position < Q ? msda_query(position, Q, table.levels) : -1;
    }
}

// Index of sample k of (n, q, m) in attention_weights; twice that in sampling_locations.
__device__ __forceinline__ long long msda_sample_index(const msda_tile& tile, long long q, long long Q, int k) {
    return ((tile.n * Q + q) * MSDA_M + tile.m) * MSDA_K + k;
}

__device__ __forceinline__ void msda_read_sample(
        const msda_location* __restrict__ locations, const msda_location* __restrict__ weights, long long index,
        msda_acc& x, msda_acc& y, msda_acc& attention) {
    msda_vector<msda_location, 2> xy;
#if MSDA_LOCATION_F64
    xy.word = __ldg(reinterpret_cast<const uint4*>(locations) + index);
#elif MSDA_LOCATION_F32
    xy.word = __ldg(reinterpret_cast<const uint2*>(locations) + index);
#else
    xy.word = __ldg(reinterpret_cast<const unsigned*>(locations) + index);
#endif
    x = msda_load(xy.element[0]);
    y = msda_load(xy.element[1]);
    attention = msda_load(weights[index]);
}

// Samples [k0, k0 + MSDA_CHUNK) of the tile's queries into shared memory, one thread a sample.
__device__ __forceinline__ void msda_fill(
        msda_table& table, const msda_tile& tile, long long Q, int k0, const msda_location* __restrict__ locations,
        const msda_location* __restrict__ weights) {
#pragma unroll 2
    for (int i = threadIdx.x; i < MSDA_QUERIES * MSDA_CHUNK; i += MSDA_THREADS) {
        const int local = i / MSDA_CHUNK, k = k0 + i % MSDA_CHUNK;
        const long long q = table.query[local];
        msda_sample sample;
        if (q >= 0 && k < MSDA_K) {
            msda_acc x, y, attention;
            msda_read_sample(locations, weights, msda_sample_index(tile, q, Q, k), x, y, attention);
            sample = msda_prepare(x, y, attention, table.levels[k / MSDA_P], tile.m);
        } else {
            for (int c = 0; c < 4; ++c) {
                sample.offset[c] = MSDA_ELSEWHERE;
                sample.weight[c] = 0;
            }
        }
        const int slot = local * MSDA_PITCH + i % MSDA_CHUNK;
        for (int c = 0; c < 4; ++c) {
            table.offsets[slot].at[c] = sample.offset[c];
            table.weights[slot].at[c] = sample.weight[c];
        }
    }
}
