// Forward: output[n, q, m] = sum over samples of attention * bilinear(value[n, :, m]).
//
// A warp takes MSDA_QUERIES queries of MSDA_HEADS neighbouring heads a round. Its lanes first work out the samples, some
// each, into shared memory; then MSDA_LANES lanes a query and head read the four rows of each sample and accumulate MSDA_VEC
// channels each in registers. Where queries are not pixels, MSDA_SPLIT groups of lanes share the samples of a query, and add
// up their sums at the end. No warp waits for another.
//
// A slot is a query and head of a warp. Lanes that are neighbours belong to different heads, whose rows lie in different
// parts of their cache lines and come in one clock.

static_assert(MSDA_ROUNDS == 1 || (MSDA_ALONE && MSDA_BAND), "several rounds only of queries that are pixels");

typedef msda_acc msda_sums[MSDA_TURNS][MSDA_VEC];

// Adds a sample. Of a neighbour outside, `row` becomes zeros; screened, it keeps a row that this query has read before,
// which costs nothing, and its weight is zero: infinity may so become NaN, but in no other query.
__device__ __forceinline__ void msda_accumulate(
        msda_sums& sum, msda_values (&row)[4], const msda_sample& sample, msda_address image, msda_address below,
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
#pragma unroll
        for (int c = 0; c < MSDA_CORNERS; ++c) {
            const msda_address from = (c < 2 ? upper : lower) + (c % 2 ? right : 0) + at;
            if (MSDA_SCREENED) {
                msda_read_over(row[c].word, inside & 1 << c, from);
            } else {
                row[c] = msda_read_if(inside >> c & 1, from);
            }
        }
#pragma unroll
        for (int c = 0; c < MSDA_CORNERS; ++c) {
            msda_acc x[MSDA_VEC];
            msda_unpack(row[c], x);
#pragma unroll
            for (int v = 0; v < MSDA_VEC; ++v) sum[turn][v] = fma(weight[c], x[v], sum[turn][v]);
        }
    }
}

// Adds up the sums of the groups of lanes that share the samples of a query.
__device__ __forceinline__ void msda_sum_groups(msda_sums& sum) {
#pragma unroll
    for (int mask = MSDA_LANES * MSDA_HEADS; mask < MSDA_LANES * MSDA_HEADS * MSDA_SPLIT; mask *= 2)
#pragma unroll
        for (int turn = 0; turn < MSDA_TURNS; ++turn)
#pragma unroll
            for (int v = 0; v < MSDA_VEC; ++v) sum[turn][v] += __shfl_xor_sync(0xffffffffu, sum[turn][v], mask);
}

extern "C" __global__ void MSDA_BOUNDS msda_forward(
        const msda_value* __restrict__ value, const __grid_constant__ msda_metadata metadata,
        const msda_location* __restrict__ locations, const msda_location* __restrict__ weights,
        const msda_reference* __restrict__ references, const long long* __restrict__ lengths,
        msda_value* __restrict__ output, long long S, long long Q_,
        long long image_stride, long long head_stride, long long heads) {
    MSDA_SHARED_MEMORY(msda_memory);
    msda_shared& shared = *reinterpret_cast<msda_shared*>(msda_memory);
    const msda_index Q = (msda_index)Q_;

    if (MSDA_ROUNDS == 1 && msda_head_of_block() >= heads) return;
    msda_levels levels;
#if MSDA_ALONE
    int rounds;
    const msda_work work = msda_work_alone(heads, rounds);
    const bool packed = MSDA_BAND && msda_begin_levels(levels, shared, metadata, S, Q);
#else
    const int rounds = 1;
    const msda_work work = msda_work_of_block();
    const msda_queries& queries = shared;
    levels = shared.levels;
    msda_begin(shared, work, metadata, lengths, S, Q);
#endif
    locations += msda_first_element(work, Q_, MSDA_LOCATIONS_PITCH);
    weights += msda_first_element(work, Q_, MSDA_WEIGHTS_PITCH);
    msda_keep(locations), msda_keep(weights);   // else their bases are added anew at each load
    if (MSDA_FRONT) references += work.image * Q_ * (MSDA_REFERENCES * MSDA_FRONT);
    const int group = threadIdx.x % 32 / MSDA_LANES, lane = threadIdx.x % 32 % MSDA_LANES;
    const int head = group % MSDA_HEADS, turn_of_group = group / MSDA_HEADS % MSDA_SPLIT;
    const int local = group / (MSDA_HEADS * MSDA_SPLIT), slot = local * MSDA_HEADS + head;
    msda_sample* samples = shared.samples[threadIdx.x / 32];
    const msda_address image =
        (msda_address)value +
        (work.image * image_stride + (work.m + head) * head_stride + lane * MSDA_VEC) * sizeof(msda_value);

#if MSDA_OWN
    msda_index next = msda_query_of_round(levels, work, 0, local, lengths, Q, packed);
#endif
#pragma unroll 1
    for (int round = 0; round < rounds; ++round) {
#if MSDA_OWN
        const msda_index q = next;
        msda_own raw;
        msda_load_own(raw, q, head, lane, locations, weights);
#else
#if MSDA_ALONE
        const msda_queries queries = {
            msda_query_of_round(levels, work, round, (int)(threadIdx.x % 32), lengths, Q, packed)};   // a lane each
#endif
        msda_raw raw;
        msda_load_raw(raw, queries, 0, 0, locations, weights, references);
        const msda_index q = msda_query_of(queries, 0, local);
#endif
#if MSDA_ALONE && !MSDA_BAND
        msda_begin_levels(levels, shared, metadata, S, Q);   // while the samples come
#endif
        const bool active = q >= 0;
        msda_sums sum;
#pragma unroll
        for (int turn = 0; turn < MSDA_TURNS; ++turn)
#pragma unroll
            for (int v = 0; v < MSDA_VEC; ++v) sum[turn][v] = 0;
        msda_values row[4];
#pragma unroll
        for (int c = 0; c < 4; ++c) row[c].word = decltype(row[c].word)();

#pragma unroll 1
        for (int k0 = 0; k0 < MSDA_K; k0 += MSDA_CHUNK) {
#if MSDA_OWN
            msda_fill_own(samples, slot, levels, raw, lane);
            __syncwarp();
            next = round + 1 < rounds ? msda_query_of_round(levels, work, round + 1, local, lengths, Q, packed) : -1;
#else
            msda_fill_marked(samples, levels, queries, raw, k0);
            __syncwarp();
            if (k0 + MSDA_CHUNK < MSDA_K)
                msda_load_raw(raw, queries, 0, k0 + MSDA_CHUNK, locations, weights, references);
#endif
            if (active) {
                const msda_sample* of_query = samples + slot * MSDA_PITCH;
                // Read early, so that the next rows do not wait for it.
                msda_sample ahead = of_query[msda_place(turn_of_group)];
#pragma unroll msda_unroll
                for (int step = 0; step < MSDA_CHUNK; step += MSDA_SPLIT) {
                    const int k = step + turn_of_group;
                    if (MSDA_CHUNK % MSDA_SPLIT != 0 && k >= MSDA_CHUNK) break;
                    const int level =
                        MSDA_CHUNK >= MSDA_K ? MSDA_LEVEL_OF(k) : min(MSDA_LEVEL_OF(k0 + k), MSDA_L - 1);
                    const msda_address below =
                        (msda_address)msda_width_in(levels, level) * (MSDA_STRIDE * sizeof(msda_value));
                    const msda_sample sample = MSDA_SCREENED ? ahead : of_query[msda_place(k)];
                    if (MSDA_SCREENED) ahead = of_query[msda_place(min(k + MSDA_SPLIT, MSDA_CHUNK - 1))];
                    msda_accumulate(sum, row, sample, image, below, lane);
                }
            }
            __syncwarp();
        }

        msda_sum_groups(sum);
        if (msda_number(q) >= 0 && turn_of_group == 0) {
            msda_value* target = output + ((work.image * Q + msda_number(q)) * MSDA_M + work.m + head) * MSDA_D;
#pragma unroll
            for (int turn = 0; turn < MSDA_TURNS; ++turn) {
                const int channel = turn * MSDA_STEP + lane * MSDA_VEC;
                if (MSDA_D % MSDA_STEP != 0 && channel >= MSDA_D) continue;
                msda_values out;
#pragma unroll
                for (int v = 0; v < MSDA_VEC; ++v) msda_store(sum[turn][v], out.element[v]);
                __stcs(reinterpret_cast<decltype(out.word)*>(target + channel), out.word);
            }
        }
    }
}
