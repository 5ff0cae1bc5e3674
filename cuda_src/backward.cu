// Backward: gradients of value, sampling_locations and attention_weights, as far as MSDA_GRAD_VALUE, MSDA_GRAD_LOCATIONS
// and MSDA_GRAD_WEIGHTS ask for them.
//
// Warps, lanes and samples are those of the forward. For each sample the lanes sum the products of grad_output with the
// four rows of value, or, where locations need no gradient, with what is interpolated between them (msda_products.cuh).
// Those sums replace the sample in shared memory, and at the end of a chunk one lane a sample turns them into the gradients
// of location and weight (msda_gradients.cuh). On the way weight * grad_output is added to the four rows of grad_value, or,
// with MSDA_MERGE, a chunk of all queries of the block is added up before (msda_atomics.cuh).

#if MSDA_GRAD_SAMPLES || !MSDA_MERGE
// The products of grad_output with the rows of this lane's query's samples [k0, k0 + MSDA_CHUNK), into their places, and
// what each sample adds to grad_value unless that is merged. `value` and `grad_value` begin at row 0 of the image, at the
// channels of this lane. By all lanes of a warp.
__device__ __forceinline__ void msda_multiply_chunk(
        const msda_shared& shared, msda_sample* samples, int k0, const msda_value* incoming, msda_held& held,
        msda_address value, msda_address grad_value) {
    const int lane = threadIdx.x % 32 % MSDA_ROW_LANES;
#pragma unroll msda_unroll
    for (int k = 0; k < MSDA_CHUNK; ++k) {
        const msda_sample sample = samples[k];
        const int inside = (int)sample.place;
        const int level = MSDA_K % MSDA_CHUNK ? min(MSDA_LEVEL_OF(k0 + k), MSDA_L - 1) : MSDA_LEVEL_OF(k0 + k);
        // The upper row and the lower one, added in the index's own bits, and their addresses in registers: else 18 of 82
        // instructions more with matrices, and encoder_800x1333 in float32 takes 373 us instead of 368.
        const msda_index row = msda_row(sample), rows[2] = {row, row + shared.levels[level].w};
#if MSDA_GRAD_SAMPLES
        msda_address from[2];
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            from[i] = value + (long long)rows[i] * (MSDA_STRIDE * sizeof(msda_value));
            msda_keep(from[i]);
        }
#endif
#if MSDA_GRAD_VALUE && !MSDA_MERGE
        msda_acc weight[4];
        msda_weights(sample, weight);
#endif
#if MSDA_GRAD_SAMPLES
        msda_products products = {};
#endif
#pragma unroll
        for (int turn = 0; turn < MSDA_TURNS; ++turn) {
            const int channel = turn * MSDA_STEP;
            if (MSDA_D % MSDA_STEP != 0 && channel + lane * MSDA_ROW_VEC >= MSDA_D) continue;
#if MSDA_MATRIX
            msda_part x[MSDA_CORNERS];
#pragma unroll
            for (int c = 0; c < MSDA_CORNERS; ++c) {
                const msda_address right = ((c & 1) * MSDA_STRIDE + channel) * sizeof(msda_value);
                x[c] = msda_read_if<MSDA_ROW_VEC>(inside >> c & 1, from[c >> 1] + right);
            }
            msda_add_products(products, held, turn, x);
#else
            msda_acc(&grad)[MSDA_ROW_VEC] = held.grad[MSDA_HOLD ? turn : 0];
            if (!MSDA_HOLD) msda_read_incoming(incoming, turn, lane, grad);
#pragma unroll
            for (int c = 0; c < MSDA_CORNERS; ++c) {
                const bool present = inside >> c & 1;
#if MSDA_GRAD_SAMPLES
                const msda_address right = (c & 1) * MSDA_STRIDE + channel;
                const msda_address at = from[c >> 1] + right * sizeof(msda_value);
                msda_add_products(products, grad, c, msda_read_if<MSDA_ROW_VEC>(present, at));
#endif
#if MSDA_GRAD_VALUE && !MSDA_MERGE
                msda_acc part[MSDA_ROW_VEC];
#pragma unroll
                for (int v = 0; v < MSDA_ROW_VEC; ++v) part[v] = weight[c] * grad[v];
                const msda_address right_grad = (c & 1) * MSDA_GRAD_STRIDE + channel * sizeof(msda_acc);
                if (present) msda_add(grad_value + (long long)rows[c >> 1] * MSDA_GRAD_STRIDE + right_grad, part);
#endif
            }
#endif
        }
#if MSDA_GRAD_SAMPLES
        msda_write_products(reinterpret_cast<msda_acc*>(samples + k), products, sample);
#endif
    }
}
#endif

// Where the image and head of a block begin in each array.
struct msda_arrays {
    const msda_location* locations;
    const msda_location* weights;
    const msda_reference* references;
    msda_location* grad_locations;
    msda_location* grad_weights;
    msda_acc* grad_references;
    const msda_value* grad_output;
    msda_address value, grad_value;     // at the channels of a lane, of products and of sums
};

extern "C" __global__ void MSDA_BOUNDS msda_backward(
        const msda_value* __restrict__ value, const __grid_constant__ msda_metadata metadata,
        const msda_location* __restrict__ locations, const msda_location* __restrict__ weights,
        const msda_reference* __restrict__ references, const long long* __restrict__ lengths,
        const msda_value* __restrict__ grad_output, msda_acc* __restrict__ grad_value,
        msda_location* __restrict__ grad_locations, msda_location* __restrict__ grad_weights,
        msda_acc* __restrict__ grad_references, long long S, long long Q_, long long image_stride,
        long long head_stride, long long heads) {
    MSDA_SHARED_MEMORY(msda_memory);
    msda_shared& shared = *reinterpret_cast<msda_shared*>(msda_memory);
    const msda_index Q = (msda_index)Q_;

    if ((MSDA_JOINED == 1 || blockIdx.z) && msda_head_of_block() >= heads) return;   // in the first plane all have a head
    // In registers, else the addresses are worked out anew for each sample, 930 instructions instead of 802: decoder_900
    // 194 us in float32 instead of 192. With merging not the head, encoder_800x1333 396 us in float16 instead of 411, and
    // with a front end too neither, 412 instead of 426.
    msda_work work = msda_work_of_block();
    if (!(MSDA_MERGE && MSDA_FRONT)) msda_keep(work.image);
    if (!MSDA_MERGE) msda_keep(work.m);
    msda_begin(shared, work, metadata, lengths, S, Q);
    [[maybe_unused]] const int local = threadIdx.x % 32 / MSDA_LANES;
    const int lane = threadIdx.x % 32 % MSDA_LANES, row_lane = threadIdx.x % 32 % MSDA_ROW_LANES;
    msda_arrays block;
    block.locations = locations + msda_first_element(work, Q_, MSDA_LOCATIONS_PITCH);
    block.weights = weights + msda_first_element(work, Q_, MSDA_WEIGHTS_PITCH);
    block.references = MSDA_FRONT ? references + work.image * Q_ * (MSDA_REFERENCES * MSDA_FRONT) : nullptr;
    block.grad_locations = MSDA_GRAD_LOCATIONS ? grad_locations + (block.locations - locations) : nullptr;
    block.grad_weights = MSDA_GRAD_WEIGHTS ? grad_weights + (block.weights - weights) : nullptr;
    block.grad_references =
        MSDA_GRAD_REFERENCES ? grad_references + msda_first_element(work, Q_, MSDA_L * MSDA_FRONT) : nullptr;
    block.grad_output = grad_output + (work.image * Q_ * MSDA_M + work.m) * MSDA_D;
    block.value = (msda_address)value +
                  (work.image * image_stride + work.m * head_stride + row_lane * MSDA_ROW_VEC) * sizeof(msda_value);
    block.grad_value = (msda_address)grad_value +
                       (work.image * S * (MSDA_M * MSDA_D) + work.m * MSDA_D + lane * MSDA_VEC) * sizeof(msda_acc);

#if MSDA_MERGE
#pragma unroll 1
    for (int k0 = 0; k0 < MSDA_K; k0 += MSDA_CHUNK) {
        const unsigned count = msda_fill_sorted(shared, k0, block.locations, block.weights, block.references);
#pragma unroll 1
        for (int turn = 0; turn < MSDA_TURNS; ++turn) {
            const int channel = turn * MSDA_STEP + lane * MSDA_VEC;
            if (MSDA_D % MSDA_STEP != 0 && channel >= MSDA_D) continue;
            msda_add_merged(shared, count, k0, (msda_address)(block.grad_output + channel),
                            block.grad_value + turn * MSDA_STEP * sizeof(msda_acc));
        }
        __syncthreads();
#if MSDA_GRAD_SAMPLES
#pragma unroll 1
        for (int round = 0; round < MSDA_ROUNDS; round += MSDA_JOINED) {
            const int joined = threadIdx.x % 32 / MSDA_ROW_LANES, mine = joined % MSDA_QUERIES;
            const int round_of_mine = round + joined / MSDA_QUERIES;
            const msda_index q = msda_query_of(shared, round_of_mine, mine);
            const msda_value* incoming = block.grad_output + (long long)(q < 0 ? 0 : q) * (MSDA_M * MSDA_D);
            msda_held held = msda_hold(incoming, row_lane);
            // Of one round the raw samples are loaded before the products, which hide the wait (float32 368 us, after them
            // 372). Those of two would take registers from the products (front end, boxes in float16 355 us, not 341).
            msda_raw raw[MSDA_JOINED];
            msda_sample* samples[MSDA_JOINED];
#pragma unroll
            for (int j = 0; j < MSDA_JOINED; ++j) {
                if (MSDA_JOINED == 1)
                    msda_load_raw(raw[j], shared, round + j, k0, block.locations, block.weights, block.references);
                samples[j] = shared.samples[(round + j) * MSDA_WARPS + threadIdx.x / 32];
#if MSDA_FRONT
                msda_recall_weights(raw[j], samples[j]);
#endif
            }
            msda_sample* samples_of_mine =
                shared.samples[round_of_mine * MSDA_WARPS + threadIdx.x / 32] + mine * MSDA_PITCH;
            msda_multiply_chunk(shared, samples_of_mine, k0, incoming, held, block.value, block.grad_value);
            __syncwarp();
#pragma unroll
            for (int j = 0; j < MSDA_JOINED; ++j)
                if (MSDA_JOINED > 1)
                    msda_load_raw(raw[j], shared, round + j, k0, block.locations, block.weights, block.references);
#pragma unroll
            for (int j = 0; j < MSDA_JOINED; ++j) {
                msda_write_samples(samples[j], shared, raw[j], round + j, k0, block.grad_locations, block.grad_weights);
#if MSDA_GRAD_REFERENCES
                msda_write_references(samples[j], shared, round + j, block.grad_references);
#endif
            }
        }
        __syncthreads();
#endif
    }
#else
    msda_sample* samples = shared.samples[threadIdx.x / 32];
    msda_raw raw;
    msda_load_raw(raw, shared, 0, 0, block.locations, block.weights, block.references);
#pragma unroll 1
    for (int round = 0; round < MSDA_ROUNDS; ++round) {
        const msda_index q = msda_query_of(shared, round, local);
        // Lanes past the last query take part in the shuffles; query 0 stands in as an address they may read.
        const msda_value* incoming = block.grad_output + (long long)(q < 0 ? 0 : q) * (MSDA_M * MSDA_D);
        msda_held held = msda_hold(incoming, row_lane);

#pragma unroll 1
        for (int k0 = 0; k0 < MSDA_K; k0 += MSDA_CHUNK) {
            msda_fill(samples, shared, raw, round, k0);
            __syncwarp();
            msda_multiply_chunk(shared, samples + local * MSDA_PITCH, k0, incoming, held, block.value, block.grad_value);
            __syncwarp();
#if MSDA_GRAD_SAMPLES
            msda_write_samples(samples, shared, raw, round, k0, block.grad_locations, block.grad_weights);
#if MSDA_GRAD_REFERENCES
            msda_write_references(samples, shared, round, block.grad_references);
#endif
            __syncwarp();
#endif
            if (k0 + MSDA_CHUNK < MSDA_K) {
                msda_load_raw(raw, shared, round, k0 + MSDA_CHUNK, block.locations, block.weights, block.references);
            } else if (round + 1 < MSDA_ROUNDS) {
                msda_load_raw(raw, shared, round + 1, 0, block.locations, block.weights, block.references);
            }
        }
    }
#endif
}
