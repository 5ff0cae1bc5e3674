// Forward: output[n, q, m] = sum over samples of attention * bilinear(value[n, :, m]).
//
// A warp takes MSDA_QUERIES queries of one head at a time. Its lanes first work out the samples, one each, into shared
// memory; then MSDA_LANES lanes a query read the four rows of each sample and accumulate MSDA_VEC channels each in
// registers. Where queries are not pixels, MSDA_SPLIT groups of lanes share the samples of a query, and add up their sums
// at the end. Warps share the levels and the list of queries, made once at the start, so
// none waits for another after that.

__device__ __forceinline__ void msda_accumulate(
        msda_acc (&sum)[MSDA_TURNS][MSDA_VEC], const msda_sample& sample, msda_address image, msda_address below,
        int lane) {
    msda_acc weight[4];
    msda_weights(sample, weight);
    const msda_address upper = image + msda_row(sample) * (MSDA_STRIDE * sizeof(msda_value)), lower = upper + below;
    const msda_address right = MSDA_STRIDE * sizeof(msda_value);
    const int inside = (int)sample.place;
#pragma unroll
    for (int turn = 0; turn < MSDA_TURNS; ++turn) {
        const int channel = turn * MSDA_STEP + lane * MSDA_VEC;
        if (MSDA_D % MSDA_STEP != 0 && channel >= MSDA_D) continue;
        const msda_address at = turn * MSDA_STEP * sizeof(msda_value);
        msda_values row[4];
#pragma unroll
        for (int c = 0; c < MSDA_CORNERS; ++c)
            row[c] = msda_read_if(inside >> c & 1, (c < 2 ? upper : lower) + (c % 2 ? right : 0) + at);
#pragma unroll
        for (int c = 0; c < MSDA_CORNERS; ++c) {
            msda_acc x[MSDA_VEC];
            msda_unpack(row[c], x);
#pragma unroll
            for (int v = 0; v < MSDA_VEC; ++v) sum[turn][v] = fma(weight[c], x[v], sum[turn][v]);
        }
    }
}

extern "C" __global__ void MSDA_BOUNDS msda_forward(
        const msda_value* __restrict__ value, const __grid_constant__ msda_metadata metadata,
        const msda_location* __restrict__ locations, const msda_location* __restrict__ weights,
        const msda_reference* __restrict__ references, const long long* __restrict__ lengths,
        msda_value* __restrict__ output, long long S, long long Q_,
        long long image_stride, long long head_stride) {
    MSDA_SHARED_MEMORY(msda_memory);
    msda_shared& shared = *reinterpret_cast<msda_shared*>(msda_memory);
    const msda_index Q = (msda_index)Q_;

    const msda_work work = msda_work_of_block(Q);
    msda_begin(shared, work, metadata, lengths, S, Q);
    locations += msda_first_element(work, Q_, MSDA_LOCATIONS_PITCH);
    weights += msda_first_element(work, Q_, MSDA_WEIGHTS_PITCH);
    if (MSDA_FRONT) references += work.image * Q_ * (MSDA_REFERENCES * MSDA_FRONT);
    const int group = threadIdx.x % 32 / MSDA_LANES, lane = threadIdx.x % 32 % MSDA_LANES;
    const int local = group / MSDA_SPLIT, turn_of_group = group % MSDA_SPLIT;
    msda_sample* samples = shared.samples[threadIdx.x / 32];
    const msda_address image =
        (msda_address)value +
        (work.image * image_stride + work.m * head_stride + lane * MSDA_VEC) * sizeof(msda_value);

    msda_raw raw;
    msda_load_raw(raw, shared, 0, 0, locations, weights, references);
#pragma unroll 1
    for (int round = 0; round < MSDA_ROUNDS; ++round) {
        const msda_index q = msda_query_of(shared, round, local);
        const bool active = q >= 0;
        msda_acc sum[MSDA_TURNS][MSDA_VEC];
#pragma unroll
        for (int turn = 0; turn < MSDA_TURNS; ++turn)
#pragma unroll
            for (int v = 0; v < MSDA_VEC; ++v) sum[turn][v] = 0;

#pragma unroll 1
        for (int k0 = 0; k0 < MSDA_K; k0 += MSDA_CHUNK) {
            msda_fill(samples, shared, raw, round, k0);
            __syncwarp();
            if (k0 + MSDA_CHUNK < MSDA_K) {
                msda_load_raw(raw, shared, round, k0 + MSDA_CHUNK, locations, weights, references);
            } else if (round + 1 < MSDA_ROUNDS) {
                msda_load_raw(raw, shared, round + 1, 0, locations, weights, references);
            }
            if (active) {
#pragma unroll msda_unroll
                for (int step = 0; step < MSDA_CHUNK; step += MSDA_SPLIT) {
                    const int k = step + turn_of_group;
                    if (MSDA_CHUNK % MSDA_SPLIT != 0 && k >= MSDA_CHUNK) break;
                    const int level = MSDA_CHUNK >= MSDA_K ? MSDA_LEVEL_OF(k) : min(MSDA_LEVEL_OF(k0 + k), MSDA_L - 1);
                    const msda_address below =
                        (msda_address)shared.levels[level].w * (MSDA_STRIDE * sizeof(msda_value));
                    msda_accumulate(sum, samples[local * MSDA_PITCH + k], image, below, lane);
                }
            }
            __syncwarp();
        }

#pragma unroll
        for (int mask = MSDA_LANES; mask < MSDA_LANES * MSDA_SPLIT; mask *= 2)
#pragma unroll
            for (int turn = 0; turn < MSDA_TURNS; ++turn)
#pragma unroll
                for (int v = 0; v < MSDA_VEC; ++v) sum[turn][v] += __shfl_xor_sync(0xffffffffu, sum[turn][v], mask);
        if (msda_number(q) >= 0 && turn_of_group == 0) {
            msda_value* target = output + ((work.image * Q + msda_number(q)) * MSDA_M + work.m) * MSDA_D;
#pragma unroll
            for (int turn = 0; turn < MSDA_TURNS; ++turn) {
                const int channel = turn * MSDA_STEP + lane * MSDA_VEC;
                if (MSDA_D % MSDA_STEP != 0 && channel >= MSDA_D) continue;
                msda_values out;
#pragma unroll
                for (int v = 0; v < MSDA_VEC; ++v) msda_store(sum[turn][v], out.element[v]);
                *reinterpret_cast<decltype(out.word)*>(target + channel) = out.word;
            }
        }
    }
}
