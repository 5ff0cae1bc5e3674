// Before the sorted backward of a fused call: makes locations, in pixels, and weights from offsets and logits. Only where
// the bucket sort does not do it itself (docs/performance/decisions.md#sorted-materialise).
#include "common/block_size.cuh"
#include "common/tile_samples.cuh"

namespace msda {

// A warp takes one tile of queries, and all samples of each.
extern "C" __global__ void __launch_bounds__(threads_per_block, config::min_blocks) msda_materialise(
        const location_t* __restrict__ offsets, const __grid_constant__ level_metadata metadata,
        const location_t* __restrict__ logits, const reference_t* __restrict__ references,
        const long long* __restrict__ lengths, acc_t* __restrict__ locations, acc_t* __restrict__ weights,
        long long S, long long Q_, long long heads) {
    MSDA_SHARED_MEMORY(shared_memory);
    using shared_t = block_shared<config::warps>;
    static_assert(sizeof(shared_t) == config::shared_bytes, "the planner and the kernel disagree");
    shared_t& shared = *reinterpret_cast<shared_t*>(shared_memory);
    const index_t Q = (index_t)Q_;
    if (first_head_of_block() >= heads) return;
    const assignment work = assignment_of_block();
    load_block<false>(shared, work, metadata, lengths, S, Q);
    offsets += first_element(work, Q_, locations_pitch);
    logits += first_element(work, Q_, weights_pitch);
    references += work.image * Q_ * (config::reference_levels * config::reference_coordinates);
    locations += first_element(work, Q_, 2 * K);
    weights += first_element(work, Q_, K);

    lane_samples raw;
    load_samples<false>(raw, shared, 0, 0, offsets, logits, references);
    softmax(raw);
#pragma unroll
    for (int step = 0; step < samples_per_lane; ++step) {
        const int i = step * 32 + threadIdx.x % 32, local = i / sample_slots, k = i % sample_slots;
        const index_t q = encoded_query(shared, 0, local);
        if (q < 0 || k >= K) continue;
        const int level = level_of(k);
        const sampling_point point = sampling_point_of(raw, step, level, shared.levels[level]);
        const index_t element = element_in_image(q, k, K);
        locations[2 * element] = point.x;
        locations[2 * element + 1] = point.y;
        weights[element] = point.attention;
    }
}

}  // namespace msda
