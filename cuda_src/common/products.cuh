// Products of grad_output with the rows of value of a sample, summed over the channels of a head: what the gradients of
// locations and weights are made of.

// Lanes and their channels, of a row that they make products of.
#define MSDA_ROW_LANES (MSDA_LANES / MSDA_JOINED)
#define MSDA_ROW_VEC (MSDA_VEC * MSDA_JOINED)
typedef msda_vector<msda_value, MSDA_ROW_VEC> msda_part;

#define MSDA_HOLD (MSDA_TURNS <= 4)
#define MSDA_GRAD_SAMPLES (MSDA_GRAD_LOCATIONS || MSDA_GRAD_WEIGHTS)

// 16-bit products by the tensor cores: exact, and summed in float32. A group is 4 lanes here; a group's part of a row is a
// row of the one matrix and its part of grad_output a column of the other, both as the lanes have loaded them. What they
// compute of one group's row and another's column is dropped.
#define MSDA_MATRIX                                                                                          \
    (MSDA_GRAD_SAMPLES && (MSDA_VALUE_F16 || MSDA_VALUE_BF16) && (MSDA_ROW_VEC == 4 || MSDA_ROW_VEC == 8) && \
     MSDA_ROW_LANES % 4 == 0 && MSDA_D % MSDA_STEP == 0 && MSDA_HOLD && (MSDA_MERGE || !MSDA_GRAD_VALUE) &&  \
     (!MSDA_PTX || __CUDA_ARCH__ >= 800))

// grad_output of one query at the channels of a lane: held in registers unless a head has very many channels.
struct msda_held {
#if MSDA_MATRIX
    msda_part grad[MSDA_TURNS];
#else
    msda_acc grad[MSDA_HOLD ? MSDA_TURNS : 1][MSDA_ROW_VEC];
#endif
};

#if !MSDA_MATRIX
__device__ __forceinline__ void msda_read_incoming(
        const msda_value* incoming, int turn, int lane, msda_acc (&grad)[MSDA_ROW_VEC]) {
    const int channel = turn * MSDA_STEP + lane * MSDA_ROW_VEC;
    if (MSDA_D % MSDA_STEP != 0 && channel >= MSDA_D) return;
    msda_unpack(msda_read<MSDA_ROW_VEC>((msda_address)(incoming + channel)), grad);
}
#endif

__device__ __forceinline__ msda_held msda_hold(const msda_value* incoming, int lane) {
    msda_held held;
#if MSDA_MATRIX
#pragma unroll
    for (int turn = 0; turn < MSDA_TURNS; ++turn)
        held.grad[turn] = msda_read<MSDA_ROW_VEC>((msda_address)(incoming + turn * MSDA_STEP + lane * MSDA_ROW_VEC));
#elif MSDA_HOLD
#pragma unroll
    for (int turn = 0; turn < MSDA_TURNS; ++turn) msda_read_incoming(incoming, turn, lane, held.grad[turn]);
#else
#pragma unroll
    for (int v = 0; v < MSDA_ROW_VEC; ++v) held.grad[0][v] = 0;
#endif
    return held;
}

#if MSDA_GRAD_SAMPLES
__device__ __forceinline__ msda_acc msda_shuffle(msda_acc x, int mask) {
    return __shfl_xor_sync(0xffffffffu, x, mask);
}

// The product of each corner's row, interpolated between them.
__device__ __forceinline__ msda_acc msda_interpolate(const msda_sample& sample, const msda_acc (&dot)[4]) {
    msda_sample alone = sample;
    alone.attention = 1;
    msda_acc share[4], interpolated = 0;
    msda_weights(alone, share);
#pragma unroll
    for (int c = 0; c < MSDA_CORNERS; ++c) interpolated = fma(share[c], dot[c], interpolated);
    return interpolated;
}

#if MSDA_MATRIX
// sum[i][j] += the sum over k of a[i][k] * b[k][j], i < 16, j < 8, k < 16. Lane 4 * g + t has rows g and g + 8 of `a` at
// k = 2t, 2t + 1 (words 0 and 1) and 2t + 8, 2t + 9 (words 2 and 3), column g of `b` at the same k, and of the sum rows
// g and g + 8 in columns 2t and 2t + 1. (PTX ISA, mma.m16n8k16. The order of k is the lanes' own: that of channels.)
__device__ __forceinline__ void msda_multiply_matrices(
        float (&sum)[4], unsigned a0, unsigned a1, unsigned a2, unsigned a3, unsigned b0, unsigned b1) {
#if MSDA_PTX
#if MSDA_VALUE_F16
#define MSDA_MMA "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32"
#else
#define MSDA_MMA "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32"
#endif
    asm volatile(MSDA_MMA " {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                 : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
                 : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
#else
    const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    for (int source = 0; source < 4; ++source) {
        msda_vector<msda_value, 4> row[2], column[2];
        for (int half = 0; half < 2; ++half) {
            row[half].pair[0] = __shfl_sync(0xffffffffu, half ? a1 : a0, 4 * g + source);
            row[half].pair[1] = __shfl_sync(0xffffffffu, half ? a3 : a2, 4 * g + source);
            column[half].pair[0] = __shfl_sync(0xffffffffu, b0, 4 * (2 * t + half) + source);
            column[half].pair[1] = __shfl_sync(0xffffffffu, b1, 4 * (2 * t + half) + source);
        }
        for (int i = 0; i < 4; ++i)
            for (int k = 0; k < 4; ++k)
                sum[i] += msda_load(row[i / 2].element[k]) * msda_load(column[i % 2].element[k]);
    }
#endif
}

struct msda_products {
    float sum[(MSDA_CORNERS + 1) / 2][4];   // of two corners each
};

// Adds the products of `x`, what a lane has loaded of the corners' rows.
__device__ __forceinline__ void msda_add_products(
        msda_products& products, const msda_held& held, int turn, const msda_part (&x)[MSDA_CORNERS]) {
#pragma unroll
    for (int c = 0; c < MSDA_CORNERS; c += 2)
#pragma unroll
        for (int i = 0; i < MSDA_ROW_VEC / 2; i += 2) {
            const bool both = c + 1 < MSDA_CORNERS;
            const msda_part& right = x[both ? c + 1 : c];
            msda_multiply_matrices(products.sum[c / 2], x[c].pair[i], both ? right.pair[i] : 0u, x[c].pair[i + 1],
                                   both ? right.pair[i + 1] : 0u, held.grad[turn].pair[i], held.grad[turn].pair[i + 1]);
        }
}

// Sums the products over the lanes of a query and writes them to `target`: one a corner, or with frozen locations what is
// interpolated between them. By all lanes.
__device__ __forceinline__ void msda_write_products(
        msda_acc* target, const msda_products& products, const msda_sample& sample) {
    // A group's own row and column meet in one of its lanes. In a query's other groups that is the lane whose number
    // differs by as many bits as the group's, so that halves are exchanged in turn: two sums left, then one.
    const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
    __syncwarp();   // every lane has read the sample
    const bool odd = g & 1, own = t == g >> 1;
    msda_acc dot[4];
#pragma unroll
    for (int c = 0; c < 4; ++c) {
        const float* sum = products.sum[c / 2 < (MSDA_CORNERS + 1) / 2 ? c / 2 : 0] + c % 2 * 2;
        dot[c] = c < MSDA_CORNERS ? (odd ? sum[1] : sum[0]) : 0.0f;
    }
#if !MSDA_GRAD_LOCATIONS
    msda_acc interpolated = msda_interpolate(sample, dot);
#pragma unroll
    for (int groups = 1; groups < MSDA_ROW_LANES / 4; groups *= 2)
        interpolated += msda_shuffle(interpolated, 4 * groups + groups / 2);
    if (own) target[0] = interpolated;
#elif MSDA_ROW_LANES == 4
    if (own)
#pragma unroll
        for (int c = 0; c < 4; ++c) target[c] = dot[c];
#else
    dot[0] = (odd ? dot[2] : dot[0]) + msda_shuffle(odd ? dot[0] : dot[2], 4);
    dot[1] = (odd ? dot[3] : dot[1]) + msda_shuffle(odd ? dot[1] : dot[3], 4);
#if MSDA_ROW_LANES == 8
    if (own)
#pragma unroll
        for (int c = 0; c < 2; ++c) target[2 * odd + c] = dot[c];
#else
    const bool high = g & 2;
    dot[0] = (high ? dot[1] : dot[0]) + msda_shuffle(high ? dot[0] : dot[1], 9);
    if (MSDA_ROW_LANES == 32) dot[0] += msda_shuffle(dot[0], 18);
    if (own) target[2 * odd + high] = dot[0];
#endif
#endif
}
#else
struct msda_products {
    msda_acc sum[4];
};

__device__ __forceinline__ void msda_add_products(
        msda_products& products, const msda_acc (&grad)[MSDA_ROW_VEC], int corner, const msda_part& row) {
    msda_acc x[MSDA_ROW_VEC];
    msda_unpack(row, x);
#pragma unroll
    for (int v = 0; v < MSDA_ROW_VEC; ++v) products.sum[corner] = fma(grad[v], x[v], products.sum[corner]);
}

// Sums `dot` over the lanes of a query, all lanes get it.
__device__ __forceinline__ msda_acc msda_reduce(msda_acc dot) {
#pragma unroll
    for (int mask = 1; mask < MSDA_ROW_LANES; mask *= 2) dot += msda_shuffle(dot, mask);
    return dot;
}

// Sums `dot` over the lanes of a query. Lane 0 to 3 end with sum number `lane` of the four (all four in lane 0 of 1,
// two each in lanes 0 and 1 of 2): halves are exchanged, so the whole costs 4 shuffles for 8 lanes instead of 12.
__device__ __forceinline__ void msda_reduce(msda_acc (&dot)[4], int lane) {
#if MSDA_ROW_LANES >= 2
    const bool odd = lane & 1;
    dot[0] = (odd ? dot[1] : dot[0]) + msda_shuffle(odd ? dot[0] : dot[1], 1);
    dot[2] = (odd ? dot[3] : dot[2]) + msda_shuffle(odd ? dot[2] : dot[3], 1);
#endif
#if MSDA_ROW_LANES >= 4
    const bool high = lane & 2;
    dot[0] = (high ? dot[2] : dot[0]) + msda_shuffle(high ? dot[0] : dot[2], 2);
#pragma unroll
    for (int mask = 4; mask < MSDA_ROW_LANES; mask *= 2) dot[0] += msda_shuffle(dot[0], mask);
#endif
}

// As above.
__device__ __forceinline__ void msda_write_products(
        msda_acc* target, msda_products& products, const msda_sample& sample) {
    const int lane = threadIdx.x % 32 % MSDA_ROW_LANES;
    msda_acc(&dot)[4] = products.sum;
#if !MSDA_GRAD_LOCATIONS
    const msda_acc interpolated = msda_reduce(msda_interpolate(sample, dot));
    __syncwarp();   // every lane has read the sample
    if (lane == 0) target[0] = interpolated;
#else
    msda_reduce(dot, lane);
    __syncwarp();
#if MSDA_ROW_LANES == 1
    for (int c = 0; c < 4; ++c) target[c] = dot[c];
#elif MSDA_ROW_LANES == 2
    target[lane] = dot[0];
    target[lane + 2] = dot[2];
#else
    if (lane < 4) target[lane] = dot[0];
#endif
#endif
}
#endif
#endif
