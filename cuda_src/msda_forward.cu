// Forward: output[n, q, m] = sum over samples of attention * bilinear(value[n, :, m]).
//
// A block takes MSDA_QUERIES queries of one head. Its threads first work out the samples, one thread a sample, into
// shared memory; then MSDA_LANES lanes a query read the four rows of each sample and accumulate MSDA_VEC channels
// each in registers.

extern "C" __global__ void __launch_bounds__(MSDA_THREADS, MSDA_MIN_BLOCKS) msda_forward(
        const msda_value* __restrict__ value, const __grid_constant__ msda_metadata metadata,
        const msda_location* __restrict__ locations, const msda_location* __restrict__ weights,
        msda_value* __restrict__ output, long long N, long long S, long long Q) {
    extern __shared__ uint4 msda_shared[];
    msda_table& table = *reinterpret_cast<msda_table*>(msda_shared);

    msda_read_levels(metadata, S, table.levels);
    __syncthreads();

    const int local = threadIdx.x / MSDA_LANES, lane = threadIdx.x % MSDA_LANES;
    const bool active = local < MSDA_QUERIES;
    const long long tiles = N * MSDA_M * ((Q + MSDA_QUERIES - 1) / MSDA_QUERIES);

    for (long long index = blockIdx.x; index < tiles; index += gridDim.x) {
        const msda_tile tile = msda_tile_at(index, Q);
        msda_choose_queries(table, tile, Q);
        __syncthreads();
        const long long q = active ? table.query[local] : -1;
        const msda_address image = (msda_address)value + tile.n * S * (MSDA_M * MSDA_D) * sizeof(msda_value);

        msda_acc sum[MSDA_TURNS][MSDA_VEC];
#pragma unroll
        for (int turn = 0; turn < MSDA_TURNS; ++turn)
#pragma unroll
            for (int v = 0; v < MSDA_VEC; ++v) sum[turn][v] = 0;

        for (int k0 = 0; k0 < MSDA_K; k0 += MSDA_CHUNK) {
            if (k0 > 0) __syncthreads();
            msda_fill(table, tile, Q, k0, locations, weights);
            __syncthreads();
            if (q >= 0) {
                const msda_offsets* offsets = table.offsets + local * MSDA_PITCH;
                const msda_weights* scales = table.weights + local * MSDA_PITCH;
#pragma unroll MSDA_UNROLL
                for (int k = 0; k < MSDA_CHUNK; ++k) {
                    const msda_offsets at = offsets[k];
                    const msda_weights scale = scales[k];
                    const msda_address base = at.at[0] < 0 ? msda_zeros_base() : image;
#pragma unroll
                    for (int turn = 0; turn < MSDA_TURNS; ++turn) {
                        const int channel = turn * MSDA_STEP + lane * MSDA_VEC;
                        if (MSDA_D % MSDA_STEP == 0 || channel < MSDA_D) {
                            msda_values row[4];
#pragma unroll
                            for (int c = 0; c < 4; ++c)
                                row[c] = msda_read(msda_at(base, at.at[c]) + channel * sizeof(msda_value));
#pragma unroll
                            for (int c = 0; c < 4; ++c)
#pragma unroll
                                for (int v = 0; v < MSDA_VEC; ++v)
                                    sum[turn][v] = fma(scale.at[c], msda_load(row[c].element[v]), sum[turn][v]);
                        }
                    }
                }
            }
        }

        if (q >= 0) {
            msda_value* target = output + ((tile.n * Q + q) * MSDA_M + tile.m) * MSDA_D;
#pragma unroll
            for (int turn = 0; turn < MSDA_TURNS; ++turn) {
                const int channel = turn * MSDA_STEP + lane * MSDA_VEC;
                if (MSDA_D % MSDA_STEP == 0 || channel < MSDA_D) {
                    msda_values out;
#pragma unroll
                    for (int v = 0; v < MSDA_VEC; ++v) msda_store(sum[turn][v], out.element[v]);
                    reinterpret_cast<msda_values*>(target + channel)->word = out.word;
                }
            }
        }
    }
}
