// Backward: gradients of value, sampling_locations and attention_weights, as far as MSDA_GRAD_VALUE, MSDA_GRAD_LOCATIONS
// and MSDA_GRAD_WEIGHTS ask for them.
//
// Warps, lanes and samples are those of the forward. For each sample the lanes sum the products of grad_output with the
// four rows of value, or, where locations need no gradient, with what is interpolated between them. Those sums replace the
// sample in shared memory, and at the end of a chunk one lane a sample turns them into the gradients of location and weight
// (msda_gradients.cuh). On the way weight * grad_output is added to the four rows of grad_value, or, with MSDA_MERGE, a
// chunk of all queries of the block is added up before (msda_atomics.cuh).

#define MSDA_HOLD (MSDA_TURNS <= 4)

__device__ __forceinline__ void msda_read_incoming(
        const msda_value* incoming, int turn, int lane, msda_acc (&grad)[MSDA_VEC]) {
    const int channel = turn * MSDA_STEP + lane * MSDA_VEC;
    if (MSDA_D % MSDA_STEP != 0 && channel >= MSDA_D) return;
    msda_unpack(msda_read((msda_address)(incoming + channel)), grad);
}

#if MSDA_GRAD_SAMPLES
__device__ __forceinline__ msda_acc msda_shuffle(msda_acc x, int mask) {
    return __shfl_xor_sync(0xffffffffu, x, mask);
}

// Sums `dot` over the lanes of a query, all lanes get it.
__device__ __forceinline__ msda_acc msda_reduce(msda_acc dot) {
#pragma unroll
    for (int mask = 1; mask < MSDA_LANES; mask *= 2) dot += msda_shuffle(dot, mask);
    return dot;
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
#endif

// grad_output of one query at the channels of a lane: held in registers unless a head has very many channels.
struct msda_held {
    msda_acc grad[MSDA_HOLD ? MSDA_TURNS : 1][MSDA_VEC];
};

__device__ __forceinline__ msda_held msda_hold(const msda_value* incoming, int lane) {
    msda_held held;
#if MSDA_HOLD
#pragma unroll
    for (int turn = 0; turn < MSDA_TURNS; ++turn) msda_read_incoming(incoming, turn, lane, held.grad[turn]);
#else
#pragma unroll
    for (int v = 0; v < MSDA_VEC; ++v) held.grad[0][v] = 0;
#endif
    return held;
}

#if MSDA_GRAD_SAMPLES || !MSDA_MERGE
// The products of grad_output with the rows of the warp's samples [k0, k0 + MSDA_CHUNK), into the places of the samples,
// and what each sample adds to grad_value unless that is merged. `value` and `grad_value` begin at row 0 of the image, at
// the channels of this lane.
__device__ __forceinline__ void msda_multiply_chunk(
        const msda_shared& shared, msda_sample* samples, int k0, const msda_value* incoming, msda_held& held,
        msda_address value, msda_address grad_value) {
    const int local = threadIdx.x % 32 / MSDA_LANES, lane = threadIdx.x % 32 % MSDA_LANES;
#pragma unroll msda_unroll
    for (int k = 0; k < MSDA_CHUNK; ++k) {
        const msda_sample sample = samples[local * MSDA_PITCH + k];
        const int inside = (int)sample.place;
        const int level = min(MSDA_LEVEL_OF(k0 + k), MSDA_L - 1);
        // Of the upper rows, and what the lower ones are further on.
        const long long row = msda_row(sample), width = shared.levels[level].w;
        [[maybe_unused]] const msda_address upper = value + row * (MSDA_STRIDE * sizeof(msda_value));
        [[maybe_unused]] const msda_address below = width * (MSDA_STRIDE * sizeof(msda_value));
        [[maybe_unused]] const msda_address upper_grad = grad_value + row * MSDA_GRAD_STRIDE;
        [[maybe_unused]] const msda_address below_grad = width * MSDA_GRAD_STRIDE;
#if MSDA_GRAD_VALUE && !MSDA_MERGE
        msda_acc weight[4];
        msda_weights(sample, weight);
#endif
#if MSDA_GRAD_SAMPLES
        msda_acc dot[4] = {0, 0, 0, 0};
#endif
#pragma unroll
        for (int turn = 0; turn < MSDA_TURNS; ++turn) {
            const int channel = turn * MSDA_STEP;
            if (MSDA_D % MSDA_STEP != 0 && channel + lane * MSDA_VEC >= MSDA_D) continue;
            msda_acc(&grad)[MSDA_VEC] = held.grad[MSDA_HOLD ? turn : 0];
            if (!MSDA_HOLD) msda_read_incoming(incoming, turn, lane, grad);
#pragma unroll
            for (int c = 0; c < MSDA_CORNERS; ++c) {
                const bool present = inside >> c & 1;
#if MSDA_GRAD_SAMPLES
                const msda_address right = (c & 1) * MSDA_STRIDE + channel;
                msda_acc x[MSDA_VEC];
                msda_unpack(msda_read_if(present, upper + (c >> 1) * below + right * sizeof(msda_value)), x);
#pragma unroll
                for (int v = 0; v < MSDA_VEC; ++v) dot[c] = fma(grad[v], x[v], dot[c]);
#endif
#if MSDA_GRAD_VALUE && !MSDA_MERGE
                msda_acc part[MSDA_VEC];
#pragma unroll
                for (int v = 0; v < MSDA_VEC; ++v) part[v] = weight[c] * grad[v];
                const msda_address right_grad = (c & 1) * MSDA_GRAD_STRIDE + channel * sizeof(msda_acc);
                msda_add_if(present, upper_grad + (c >> 1) * below_grad + right_grad, part);
#endif
            }
        }
#if MSDA_GRAD_SAMPLES
#if MSDA_GRAD_LOCATIONS
        msda_reduce(dot, lane);
#else
        msda_sample alone = sample;
        alone.attention = 1;
        msda_acc share[4];
        msda_weights(alone, share);
        msda_acc interpolated = 0;
#pragma unroll
        for (int c = 0; c < MSDA_CORNERS; ++c) interpolated = fma(share[c], dot[c], interpolated);
        interpolated = msda_reduce(interpolated);
#endif
        __syncwarp();   // every lane has read the sample
        msda_acc* target = reinterpret_cast<msda_acc*>(samples + local * MSDA_PITCH + k);
#if !MSDA_GRAD_LOCATIONS
        if (lane == 0) target[0] = interpolated;
#elif MSDA_LANES == 1
        for (int c = 0; c < 4; ++c) target[c] = dot[c];
#elif MSDA_LANES == 2
        target[lane] = dot[0];
        target[lane + 2] = dot[2];
#else
        if (lane < 4) target[lane] = dot[0];
#endif
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
    msda_address value, grad_value;     // at the channels of a lane
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

    if (msda_head_of_block() >= heads) return;
    // In registers, else the addresses are worked out anew for each sample, 930 instructions instead of 802: decoder_900
    // 194 us in float32 instead of 192. With merging not the head, encoder_800x1333 396 us in float16 instead of 411, and
    // with a front end too neither, 412 instead of 426.
    msda_work work = msda_work_of_block();
    if (!(MSDA_MERGE && MSDA_FRONT)) msda_keep(work.image);
    if (!MSDA_MERGE) msda_keep(work.m);
    msda_begin(shared, work, metadata, lengths, S, Q);
    [[maybe_unused]] const int local = threadIdx.x % 32 / MSDA_LANES;
    const int lane = threadIdx.x % 32 % MSDA_LANES;
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
                  (work.image * image_stride + work.m * head_stride + lane * MSDA_VEC) * sizeof(msda_value);
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
            msda_add_merged(shared, count, k0, block.grad_output + channel,
                            block.grad_value + turn * MSDA_STEP * sizeof(msda_acc));
        }
        __syncthreads();
#if MSDA_GRAD_SAMPLES
#pragma unroll 1
        for (int round = 0; round < MSDA_ROUNDS; ++round) {
            const msda_index q = msda_query_of(shared, round, local);
            const msda_value* incoming = block.grad_output + (long long)(q < 0 ? 0 : q) * (MSDA_M * MSDA_D);
            msda_held held = msda_hold(incoming, lane);
            msda_raw raw;
            msda_load_raw(raw, shared, round, k0, block.locations, block.weights, block.references);
            msda_sample* samples = shared.samples[round * MSDA_WARPS + threadIdx.x / 32];
#if MSDA_FRONT
            msda_recall_weights(raw, samples);
#endif
            msda_multiply_chunk(shared, samples, k0, incoming, held, block.value, block.grad_value);
            __syncwarp();
            msda_write_samples(samples, shared, raw, round, k0, block.grad_locations, block.grad_weights);
#if MSDA_GRAD_REFERENCES
            msda_write_references(samples, shared, round, block.grad_references);
#endif
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
        msda_held held = msda_hold(incoming, lane);

#pragma unroll 1
        for (int k0 = 0; k0 < MSDA_K; k0 += MSDA_CHUNK) {
            msda_fill(samples, shared, raw, round, k0);
            __syncwarp();
            msda_multiply_chunk(shared, samples, k0, incoming, held, block.value, block.grad_value);
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
