// Types, conversions and vector access of all kernels of this folder; comes before every other file.
//
// The planner (cupy_msda/plan.py) passes every size that is fixed for a model as a macro:
//   MSDA_VALUE_*      dtype of value, output and grad_output (F16, BF16, F32 or F64), MSDA_LOCATION_* likewise
//   MSDA_INDEX_64     offsets and counts inside one image need 64 bits
//   MSDA_L, MSDA_P, MSDA_M, MSDA_D   levels, points, heads, channels a head
//   MSDA_POINTS       points of each level, by commas, where they differ; MSDA_P is 0 then
//   MSDA_NEAREST      one pixel a sample, its index clamped into the level, instead of four
//   MSDA_BORDER, MSDA_ALIGN_CORNERS  as padding_mode and align_corners of grid_sample
//   MSDA_FRONT        numbers of a reference point, where samples come as offsets from one, and as logits: 2 (x, y) or 4
//                     (and width, height); 0 where they come as locations and weights. Then all of a query are in a chunk
//   MSDA_REFERENCE_*  dtype of the reference points; MSDA_REFERENCES of them a query: one a level, or one for all
//   MSDA_PACKED       offsets and logits of a query and head follow each other in one array
//   MSDA_PIXELS       locations are in pixels of their level, not normalised
//   MSDA_STRIDE       elements from a row of value to the next
//   MSDA_PADDED       only the first queries of an image count, `lengths` says how many; the others get zeros
//   MSDA_VEC          channels a lane moves at once
//   MSDA_LANES        lanes of a warp that share the channels of one (n, q, m)
//   MSDA_ALONE        the warps of a block do not wait for each other, in the forward
//   MSDA_LEVELS_IN_REGISTERS  each lane of the forward holds all levels, instead of a copy a warp in shared memory
//   MSDA_TOGETHER     samples of a query that a lane reads at a time, in the forward, where its own lanes do (MSDA_OWN)
//   MSDA_SCREENED     neighbours outside the level have a weight of zero, instead of zeros as their values, in the forward;
//                     only where warps are alone, all of a query are in a chunk, and locations are not clamped
//   MSDA_SPLIT        groups of MSDA_LANES lanes that share the samples of one (n, q, m), in the forward; 1 elsewhere
//   MSDA_HEADS        neighbouring heads that a warp works on at a time, in the forward; 1 elsewhere
//   MSDA_CHUNK        samples of a query that are in shared memory at a time
//   MSDA_WARPS        warps of a block, all on the same heads
//   MSDA_ROUNDS       groups of queries that a warp takes one after the other
//   MSDA_JOINED       rounds of the backward whose products with the rows of value are made together, by lanes with so many
//                     times MSDA_VEC channels; where samples are merged, 1 elsewhere
//   MSDA_MIN_BLOCKS   blocks that should fit on a multiprocessor: caps the registers
//   MSDA_UNROLL       samples whose rows are loaded before the first is used
//   MSDA_ROWS         rows of value in a bin, of the kernels that sum grad_value without atomics: a power of two; 0 elsewhere
//   MSDA_MERGE        bits of the keys by which a block of the backward sorts its samples, to add up those of a cell before
//                     they go to grad_value; 0: every sample goes there by itself
//   MSDA_LEVELS_ON_DEVICE            spatial_shapes and level_start_index are device arrays, unchecked
//   MSDA_BAND         0: queries in order; otherwise rows of a band in which neighbouring queries share a block

// Inline PTX has a portable twin beside it, and shared memory a name, for the tests that run this text on a CPU.
#ifndef MSDA_PTX
#define MSDA_PTX 1
#define MSDA_SHARED_MEMORY(name) extern __shared__ uint4 name[]
#endif

typedef unsigned long long msda_address;

#if MSDA_INDEX_64
typedef long long msda_index;
#else
typedef int msda_index;
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

#if MSDA_REFERENCE_F16
typedef msda_f16 msda_reference;
#elif MSDA_REFERENCE_BF16
typedef msda_bf16 msda_reference;
#elif MSDA_REFERENCE_F64
typedef double msda_reference;
#else
typedef float msda_reference;
#endif

#define MSDA_THREADS (32 * MSDA_WARPS)
// Registers are capped for MSDA_MIN_BLOCKS resident blocks; some architectures hold fewer threads than that.
#if __CUDA_ARCH__ == 750
#define MSDA_RESIDENT (1024 / MSDA_THREADS)
#elif __CUDA_ARCH__ == 860 || __CUDA_ARCH__ == 890 || __CUDA_ARCH__ >= 1200
#define MSDA_RESIDENT (1536 / MSDA_THREADS)
#else
#define MSDA_RESIDENT (2048 / MSDA_THREADS)
#endif
#define MSDA_BOUNDS __launch_bounds__(MSDA_THREADS, MSDA_MIN_BLOCKS < MSDA_RESIDENT ? MSDA_MIN_BLOCKS : MSDA_RESIDENT)
#define MSDA_QUERIES (32 / (MSDA_LANES * MSDA_SPLIT * MSDA_HEADS))   // queries that a warp works on at a time
#define MSDA_SLOTS (MSDA_QUERIES * MSDA_HEADS)                 // the same, each head counted: query, then head
#ifdef MSDA_POINTS
#define MSDA_K (msda_first_point.of[MSDA_L])
#else
#define MSDA_K (MSDA_L * MSDA_P)
#endif
#define MSDA_CORNERS (MSDA_NEAREST ? 1 : 4)
#define MSDA_STEP (MSDA_LANES * MSDA_VEC)                      // channels between two turns of a lane
#define MSDA_TURNS ((MSDA_D + MSDA_STEP - 1) / MSDA_STEP)
#define MSDA_GRAD_STRIDE (MSDA_M * MSDA_D * sizeof(msda_acc))  // bytes from a row of the sums of grad_value to the next
enum { msda_unroll = MSDA_UNROLL };                            // a pragma's macros are not expanded everywhere

// ---- conversions: 16-bit numbers travel as bits, arithmetic is msda_acc -------------------------------------

__device__ __forceinline__ float msda_load(float x) { return x; }
__device__ __forceinline__ double msda_load(double x) { return x; }
__device__ __forceinline__ float msda_load(msda_f16 x) {
#if MSDA_PTX
    float y;
    asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits));
    return y;
#else
    const unsigned sign = (unsigned)(x.bits & 0x8000) << 16, magnitude = x.bits & 0x7fff;
    if (magnitude >= 0x7c00) return __uint_as_float(sign | 0x7f800000u | magnitude << 13);
    return __uint_as_float(sign | __float_as_uint(__uint_as_float(magnitude << 13) * 5.192296858534828e33f));  // 2**112
#endif
}
__device__ __forceinline__ float msda_load(msda_bf16 x) { return __uint_as_float((unsigned)x.bits << 16); }

__device__ __forceinline__ void msda_store(float x, float& y) { y = x; }
__device__ __forceinline__ void msda_store(double x, double& y) { y = x; }
__device__ __forceinline__ void msda_store(float x, msda_f16& y) {
#if MSDA_PTX
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
#else
    const unsigned bits = __float_as_uint(x), sign = bits >> 16 & 0x8000, magnitude = bits & 0x7fffffff;
    unsigned rounded;
    if (magnitude > 0x7f800000u) rounded = 0x7fff;                              // NaN
    else if (magnitude >= 0x477ff000u) rounded = 0x7c00;                        // 65520 and more: infinity
    else if (magnitude < 0x38800000u)                                           // subnormal: units of 2**-24
        rounded = (unsigned)rint(__uint_as_float(magnitude) * 16777216.0f);
    else rounded = (magnitude - 0x38000000u + 0xfffu + (magnitude >> 13 & 1u)) >> 13;
    y.bits = (unsigned short)(sign | rounded);
#endif
}
__device__ __forceinline__ void msda_store(float x, msda_bf16& y) {
#if MSDA_PTX && __CUDA_ARCH__ >= 800
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
#else
    const unsigned bits = __float_as_uint(x);
    y.bits = x != x ? 0x7fff : (unsigned short)((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
#endif
}

__device__ __forceinline__ float msda_exp(float x) { return exp2f(x * 1.4426950408889634f); }
__device__ __forceinline__ double msda_exp(double x) { return exp(x); }

// One over x, to the last two bits.
__device__ __forceinline__ float msda_reciprocal(float x) {
#if MSDA_PTX
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
#else
    return 1 / x;
#endif
}
__device__ __forceinline__ double msda_reciprocal(double x) { return 1 / x; }

// A product that is not contracted with an addition.
__device__ __forceinline__ float msda_multiply(float x, float y) { return __fmul_rn(x, y); }
__device__ __forceinline__ double msda_multiply(double x, double y) { return __dmul_rn(x, y); }

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
    unsigned pair[(sizeof(T) * N + 3) / 4];   // two 16-bit elements each
    __device__ __forceinline__ msda_vector() {}
};

typedef msda_vector<msda_value, MSDA_VEC> msda_values;

template <typename T, int N>
__device__ __forceinline__ void msda_unpack(const msda_vector<T, N>& v, msda_acc (&x)[N]) {
#pragma unroll
    for (int i = 0; i < N; ++i) x[i] = msda_load(v.element[i]);
}

// Pairs of 16-bit elements straight from their register: taken one by one, each costs a shift or a move as well, and
// the float16 forward is bound by instructions (encoder_800x1333, H200: 139 us one by one, 123 us like this).
template <int N>
__device__ __forceinline__ void msda_unpack(const msda_vector<msda_f16, N>& v, float (&x)[N]) {
#pragma unroll
    for (int i = 0; i + 1 < N; i += 2) {
#if MSDA_PTX
        asm("{ .reg .b16 low, high; mov.b32 {low, high}, %2; cvt.f32.f16 %0, low; cvt.f32.f16 %1, high; }"
            : "=f"(x[i]), "=f"(x[i + 1]) : "r"(v.pair[i / 2]));
#else
        x[i] = msda_load(v.element[i]);
        x[i + 1] = msda_load(v.element[i + 1]);
#endif
    }
    if (N % 2) x[N - 1] = msda_load(v.element[N - 1]);
}

template <int N>
__device__ __forceinline__ void msda_unpack(const msda_vector<msda_bf16, N>& v, float (&x)[N]) {
#pragma unroll
    for (int i = 0; i + 1 < N; i += 2) {
        x[i] = __uint_as_float(v.pair[i / 2] << 16);
        x[i + 1] = __uint_as_float(v.pair[i / 2] & 0xffff0000u);
    }
    if (N % 2) x[N - 1] = msda_load(v.element[N - 1]);
}

// Keeps an address, pointer or number in its register: the compiler may not work it out again wherever it is used.
template <typename T>
__device__ __forceinline__ void msda_keep(T& address) {
#if MSDA_PTX
    asm volatile("" : "+l"(address));
#endif
}
__device__ __forceinline__ void msda_keep(int& number) {
#if MSDA_PTX
    asm volatile("" : "+r"(number));
#endif
}

// Read-only data, through L1.
template <int N = MSDA_VEC>
__device__ __forceinline__ msda_vector<msda_value, N> msda_read(msda_address address) {
    msda_vector<msda_value, N> v;
    v.word = __ldg(reinterpret_cast<const decltype(v.word)*>(address));
    return v;
}

// The same where `present`; elsewhere `word` keeps what it holds.
__device__ __forceinline__ void msda_read_over(uint4& word, int present, msda_address address) {
#if MSDA_PTX
    asm("{ .reg .pred p; setp.ne.s32 p, %4, 0; @p ld.global.nc.v4.b32 {%0, %1, %2, %3}, [%5]; }"
        : "+r"(word.x), "+r"(word.y), "+r"(word.z), "+r"(word.w) : "r"(present), "l"(address));
#else
    if (present) word = *reinterpret_cast<const uint4*>(address);
#endif
}
__device__ __forceinline__ void msda_read_over(uint2& word, int present, msda_address address) {
#if MSDA_PTX
    asm("{ .reg .pred p; setp.ne.s32 p, %2, 0; @p ld.global.nc.v2.b32 {%0, %1}, [%3]; }"
        : "+r"(word.x), "+r"(word.y) : "r"(present), "l"(address));
#else
    if (present) word = *reinterpret_cast<const uint2*>(address);
#endif
}
__device__ __forceinline__ void msda_read_over(unsigned& word, int present, msda_address address) {
#if MSDA_PTX
    asm("{ .reg .pred p; setp.ne.s32 p, %1, 0; @p ld.global.nc.b32 %0, [%2]; }"
        : "+r"(word) : "r"(present), "l"(address));
#else
    if (present) word = *reinterpret_cast<const unsigned*>(address);
#endif
}
__device__ __forceinline__ void msda_read_over(unsigned short& word, int present, msda_address address) {
#if MSDA_PTX
    asm("{ .reg .pred p; setp.ne.s32 p, %1, 0; @p ld.global.nc.b16 %0, [%2]; }"
        : "+h"(word) : "r"(present), "l"(address));
#else
    if (present) word = *reinterpret_cast<const unsigned short*>(address);
#endif
}

// The same where `present`, zeros elsewhere: a predicated load, no branch. (Predicated additions instead of the zeros,
// in inline PTX, save 8 of 39 instructions a sample but not the registers: ptxas keeps the last row alive for the case
// that the load does not happen, and spilled 384 bytes.)
template <int N = MSDA_VEC>
__device__ __forceinline__ msda_vector<msda_value, N> msda_read_if(bool present, msda_address address) {
    msda_vector<msda_value, N> v;
    v.word = decltype(v.word)();
    if (present) v.word = __ldg(reinterpret_cast<const decltype(v.word)*>(address));
    return v;
}
