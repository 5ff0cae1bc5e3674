// Offsets and logits to locations, in pixels, and weights, for the kernels that sum grad_value without atomics.

extern "C" __global__ void MSDA_BOUNDS msda_expand(
        const msda_location* __restrict__ offsets, const __grid_constant__ msda_metadata metadata,
        const msda_location* __restrict__ logits, const msda_reference* __restrict__ references,
        const long long* __restrict__ lengths, msda_acc* __restrict__ locations, msda_acc* __restrict__ weights,
        long long S, long long Q_, long long heads) {
    MSDA_SHARED_MEMORY(msda_memory);
    msda_shared& shared = *reinterpret_cast<msda_shared*>(msda_memory);
    const msda_index Q = (msda_index)Q_;
    if (msda_head_of_block() >= heads) return;
    const msda_work work = msda_work_of_block();
    msda_begin(shared, work, metadata, lengths, S, Q);
    offsets += msda_first_element(work, Q_, MSDA_LOCATIONS_PITCH);
    logits += msda_first_element(work, Q_, MSDA_WEIGHTS_PITCH);
    references += work.image * Q_ * (MSDA_REFERENCES * MSDA_FRONT);
    locations += msda_first_element(work, Q_, 2 * MSDA_K);
    weights += msda_first_element(work, Q_, MSDA_K);

    msda_raw raw;
    msda_load_raw(raw, shared, 0, 0, offsets, logits, references);
    msda_softmax(raw);
#pragma unroll
    for (int fill = 0; fill < MSDA_FILLS; ++fill) {
        const int i = fill * 32 + threadIdx.x % 32, local = i / MSDA_SPAN, k = i % MSDA_SPAN;
        const msda_index q = msda_query_of(shared, 0, local);
        if (q < 0 || k >= MSDA_K) continue;
        const int level = MSDA_LEVEL_OF(k);
        const msda_point point = msda_point_of(raw, fill, level, shared.levels[level]);
        const msda_index place = msda_in_image(q, k, MSDA_K);
        locations[2 * place] = point.x;
        locations[2 * place + 1] = point.y;
        weights[place] = point.attention;
    }
}
