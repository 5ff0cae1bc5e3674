// Backward: gradients of value, sampling_locations and attention_weights, as far as MSDA_GRAD_VALUE and
// MSDA_GRAD_SAMPLES ask for them.
//
// Blocks, lanes and the table of samples are those of the forward. For each sample the lanes add
// weight * grad_output to the four rows of grad_value (one vector reduction a lane and row, in the L2 cache), and sum
// the products of grad_output with the four rows of value. Those four sums replace the sample's weights in the
// table, and at the end of a chunk one thread a sample turns them into the gradients of location and weight.

#if MSDA_GRAD_VALUE
// Contiguous channels of one row of the float32 or float64 gradient.
__device__ __forceinline__ void msda_add(msda_acc* target, const msda_acc (&x)[MSDA_VEC]) {
#if !MSDA_VALUE_F64 && MSDA_VEC == 4 && __CUDA_ARCH__ >= 900
    asm volatile("red.global.add.v4.f32 [%0], {%1, %2, %3, %4};"
                 :: "l"(target), "f"(x[0]), "f"(x[1]), "f"(x[2]), "f"(x[3]));
#elif !MSDA_VALUE_F64 && MSDA_VEC == 2 && __CUDA_ARCH__ >= 900
    asm volatile("red.global.add.v2.f32 [%0], {%1, %2};" :: "l"(target), "f"(x[0]), "f"(x[1]));
#else
    for (int v = 0; v < MSDA_VEC; ++v) atomicAdd(target + v, x[v]);
#endif
}
#endif

#define MSDA_HOLD (MSDA_TURNS <= 4)

__device__ __forceinline__ void msda_read_incoming(
        const msda_value* incoming, int turn, int lane, msda_acc (&grad)[MSDA_VEC]) {
    const int channel = turn * MSDA_STEP + lane * MSDA_VEC;
    if (MSDA_D % MSDA_STEP != 0 && channel >= MSDA_D) return;
    const msda_values packed = msda_read((msda_address)(incoming + channel));
#pragma unroll
    for (int v = 0; v < MSDA_VEC; ++v) grad[v] = msda_load(packed.element[v]);
}

#if MSDA_GRAD_SAMPLES
__device__ __forceinline__ msda_acc msda_shuffle(msda_acc x, int mask) {
    return __shfl_xor_sync(0xffffffffu, x, mask);
}

// Sums `dot` over the lanes of a query. Lane 0 to 3 end with sum number `lane` of the four (all four in lane 0 of 1,
// two each in lanes 0 and 1 of 2): halves are exchanged, so the whole costs 4 shuffles for 8 lanes instead of 12.
__device__ __forceinline__ void msda_reduce(msda_acc (&dot)[4], int lane) {
#if MSDA_LANES >= 2
    const bool odd = lane & 1;
    dot[0] = (odd ? dot[1] : dot[0]) + msda_shuffle(odd ? dot[0] : dot[1], 1);
    dot[2] = (odd ? dot[3] : dot[2]) + msda_shuffle(odd ? dot[2] : dot[3], 1);
#endif
#if MSDA_LANES >= 4
    const bool high = lane & 2;
    dot[0] = (high ? dot[2] : dot[0]) + msda_shuffle(high ? dot[0] : dot[2], 2);
#pragma unroll
    for (int mask = 4; mask < MSDA_LANES; mask *= 2) dot[0] += msda_shuffle(dot[0], mask);
#endif
}

__device__ __forceinline__ void msda_write_samples(
        const msda_table& table, const msda_tile& tile, long long Q, int k0,
        const msda_location* __restrict__ locations, const msda_location* __restrict__ weights,
        msda_location* __restrict__ grad_locations, msda_location* __restrict__ grad_weights) {
    for (int i = threadIdx.x; i < MSDA_QUERIES * MSDA_CHUNK; i += MSDA_THREADS) {
        const int local = i / MSDA_CHUNK, k = k0 + i % MSDA_CHUNK;
        const long long q = table.query[local];
        if (q < 0 || k >= MSDA_K) continue;
        const long long index = msda_sample_index(tile, q, Q, k);
        const msda_level level = table.levels[k / MSDA_P];
        msda_acc x, y, attention;
        msda_read_sample(locations, weights, index, x, y, attention);
        const msda_cell cell = msda_locate(x, y, level);
        const msda_acc nothing = level.w > 0 ? (msda_acc)0 : (msda_acc)__int_as_float(0x7fc00000);
        msda_acc grad_x = nothing, grad_y = nothing, grad_attention = nothing;
        if (cell.counts) {
            const msda_weights dots = table.weights[local * MSDA_PITCH + i % MSDA_CHUNK];
            const bool left = cell.x0 >= 0, right = cell.x0 + 1 < level.w;
            const bool top = cell.y0 >= 0, bottom = cell.y0 + 1 < level.h;
            const msda_acc d00 = top && left ? dots.at[0] : 0, d01 = top && right ? dots.at[1] : 0;
            const msda_acc d10 = bottom && left ? dots.at[2] : 0, d11 = bottom && right ? dots.at[3] : 0;
            const msda_acc upper = fma(cell.ax, d01 - d00, d00), lower = fma(cell.ax, d11 - d10, d10);
            grad_attention = fma(cell.ay, lower - upper, upper);
            grad_y = attention * (msda_acc)level.h * (lower - upper);
            grad_x = attention * (msda_acc)level.w * fma(cell.ay, (d11 - d10) - (d01 - d00), d01 - d00);
        }
        msda_store(grad_x, grad_locations[2 * index]);
        msda_store(grad_y, grad_locations[2 * index + 1]);
        msda_store(grad_attention, grad_weights[index]);
    }
}
#endif

extern "C" __global__ void __launch_bounds__(MSDA_THREADS, MSDA_MIN_BLOCKS) msda_backward(
        const msda_value* __restrict__ value, const __grid_constant__ msda_metadata metadata,
        const msda_location* __restrict__ locations, const msda_location* __restrict__ weights,
        const msda_value* __restrict__ grad_output, msda_acc* __restrict__ grad_value,
        msda_location* __restrict__ grad_locations, msda_location* __restrict__ grad_weights,
        long long N, long long S, long long Q) {
    extern __shared__ uint4 msda_shared[];
    msda_table& table = *reinterpret_cast<msda_table*>(msda_shared);

    msda_read_levels(metadata, S, table.levels);
    __syncthreads();

    const int local = threadIdx.x / MSDA_LANES, lane = threadIdx.x % MSDA_LANES;
    const long long tiles = N * MSDA_M * ((Q + MSDA_QUERIES - 1) / MSDA_QUERIES);

    for (long long index = blockIdx.x; index < tiles; index += gridDim.x) {
        const msda_tile tile = msda_tile_at(index, Q);
        msda_choose_queries(table, tile, Q);
        __syncthreads();
        const long long q = table.query[local];
        const long long image_offset = tile.n * S * (MSDA_M * MSDA_D);
#if MSDA_GRAD_SAMPLES
        const msda_address image = (msda_address)value + image_offset * sizeof(msda_value);
#endif
        // Lanes past the last query take part in the shuffles; query 0 stands in as an address they may read.
        const msda_value* incoming = grad_output + ((tile.n * Q + (q < 0 ? 0 : q)) * MSDA_M + tile.m) * MSDA_D;

        // Held in registers unless a head has very many channels.
        msda_acc held[MSDA_HOLD ? MSDA_TURNS : 1][MSDA_VEC];
#if MSDA_HOLD
#pragma unroll
        for (int turn = 0; turn < MSDA_TURNS; ++turn) msda_read_incoming(incoming, turn, lane, held[turn]);
#endif

        for (int k0 = 0; k0 < MSDA_K; k0 += MSDA_CHUNK) {
            msda_fill(table, tile, Q, k0, locations, weights);
            __syncthreads();
#pragma unroll MSDA_UNROLL
            for (int k = 0; k < MSDA_CHUNK; ++k) {
                const msda_offsets at = table.offsets[local * MSDA_PITCH + k];
#if MSDA_GRAD_VALUE
                const msda_weights scale = table.weights[local * MSDA_PITCH + k];
#endif
#if MSDA_GRAD_SAMPLES
                const msda_address base = at.at[0] < 0 ? msda_zeros_base() : image;
                msda_acc dot[4] = {0, 0, 0, 0};
#endif
#pragma unroll
                for (int turn = 0; turn < MSDA_TURNS; ++turn) {
                    const int channel = turn * MSDA_STEP + lane * MSDA_VEC;
                    if (MSDA_D % MSDA_STEP == 0 || channel < MSDA_D) {
                        msda_acc(&grad)[MSDA_VEC] = held[MSDA_HOLD ? turn : 0];
                        if (!MSDA_HOLD) msda_read_incoming(incoming, turn, lane, grad);
#pragma unroll
                        for (int c = 0; c < 4; ++c) {
#if MSDA_GRAD_SAMPLES
                            const msda_values row = msda_read(msda_at(base, at.at[c]) + channel * sizeof(msda_value));
#pragma unroll
                            for (int v = 0; v < MSDA_VEC; ++v) dot[c] = fma(grad[v], msda_load(row.element[v]), dot[c]);
#endif
#if MSDA_GRAD_VALUE
                            if (at.at[c] >= 0) {
                                msda_acc part[MSDA_VEC];
#pragma unroll
                                for (int v = 0; v < MSDA_VEC; ++v) part[v] = scale.at[c] * grad[v];
                                msda_add(grad_value + image_offset + at.at[c] + channel, part);
                            }
#endif
                        }
                    }
                }
#if MSDA_GRAD_SAMPLES
                msda_reduce(dot, lane);
                __syncwarp();   // every lane has read its weights
                msda_acc* target = table.weights[local * MSDA_PITCH + k].at;
#if MSDA_LANES == 1
                for (int c = 0; c < 4; ++c) target[c] = dot[c];
#elif MSDA_LANES == 2
                target[lane] = dot[0];
                target[lane + 2] = dot[2];
#else
                if (lane < 4) target[lane] = dot[0];
#endif
#endif
            }
            __syncthreads();
#if MSDA_GRAD_SAMPLES
            msda_write_samples(table, tile, Q, k0, locations, weights, grad_locations, grad_weights);
            __syncthreads();
#endif
        }
    }
}
