// Gradients of the samples: from the products of grad_output with the rows of value, which the backward leaves in shared
// memory, to those of locations and weights, or with a front end of offsets, logits and reference points.

#if MSDA_GRAD_SAMPLES
struct msda_gradients {
    msda_acc x, y;          // of the location
    msda_acc attention;
};

// Of a sample, from its products.
__device__ __forceinline__ msda_gradients msda_gradients_of(
        const msda_point& point, const msda_level& level, const msda_acc* dot) {
    const msda_acc nothing = level.w > 0 ? (msda_acc)0 : msda_nan();
    const msda_cell cell = msda_locate(point.x, point.y, level);
    msda_gradients grad = {nothing, nothing, nothing};
    if (cell.counts) {
#if MSDA_GRAD_LOCATIONS
        const msda_acc upper = fma(cell.ax, dot[1] - dot[0], dot[0]);
        const msda_acc lower = fma(cell.ax, dot[3] - dot[2], dot[2]);
        grad.attention = fma(cell.ay, lower - upper, upper);
        const msda_acc slope_y = msda_slope(point.y, level.h);
        if (!MSDA_CLAMPED || slope_y != 0) grad.y = point.attention * slope_y * (lower - upper);
        const msda_acc across = fma(cell.ay, (dot[3] - dot[2]) - (dot[1] - dot[0]), dot[1] - dot[0]);
        const msda_acc slope_x = msda_slope(point.x, level.w);
        if (!MSDA_CLAMPED || slope_x != 0) grad.x = point.attention * slope_x * across;
#else
        grad.attention = dot[0];
#endif
    }
    return grad;
}

__device__ __forceinline__ void msda_write_pair(
        msda_location* __restrict__ grad_locations, msda_index q, int k, msda_acc x, msda_acc y) {
    msda_vector<msda_location, 2> xy;
    msda_store(x, xy.element[0]);
    msda_store(y, xy.element[1]);
    if (MSDA_IN_PAIRS)
        reinterpret_cast<decltype(xy.word)*>(grad_locations)[msda_in_image(q, k, MSDA_LOCATIONS_PITCH / 2)] = xy.word;
    else
        for (int i = 0; i < 2; ++i)
            grad_locations[msda_in_image(q, 2 * k + i, MSDA_LOCATIONS_PITCH)] = xy.element[i];
}

#if MSDA_FRONT
// Gradients of the warp's offsets and logits, `raw`, from the products in their places in shared memory: with s the sum
// of weight * gradient over the samples of a query, that of a logit is weight * (gradient - s).
__device__ __forceinline__ void msda_write_samples(
        msda_sample* samples, const msda_shared& shared, const msda_raw& raw, int round, int,
        msda_location* __restrict__ grad_locations, msda_location* __restrict__ grad_weights) {
#pragma unroll
    for (int first = 0; first < MSDA_FILLS; first += msda_fills_of_query) {
        const int local = (first * 32 + threadIdx.x % 32) / MSDA_SPAN;
        const msda_index q = msda_query_of(shared, round, local);
        msda_gradients grad[msda_fills_of_query];
        msda_acc sum = 0;
#pragma unroll
        for (int t = 0; t < msda_fills_of_query; ++t) {
            const int k = t * 32 + threadIdx.x % msda_lanes_of_query, level = min(MSDA_LEVEL_OF(k), MSDA_L - 1);
            grad[t] = {0, 0, 0};
            if (q < 0 || k >= MSDA_K) continue;
            const msda_point point = msda_point_of(raw, first + t, level, shared.levels[level]);
            msda_acc* dot = reinterpret_cast<msda_acc*>(samples + local * MSDA_PITCH + k);
            grad[t] = msda_gradients_of(point, shared.levels[level], dot);
            sum = fma(point.attention, grad[t].attention, sum);
        }
        sum = msda_sum_of_query(sum);
#pragma unroll
        for (int t = 0; t < msda_fills_of_query; ++t) {
            const int k = t * 32 + threadIdx.x % msda_lanes_of_query, level = min(MSDA_LEVEL_OF(k), MSDA_L - 1);
            if (msda_number(q) < 0 || k >= MSDA_K) continue;
            const bool counts = !MSDA_PADDED || q >= 0;
#if MSDA_GRAD_LOCATIONS
            const msda_reaches reach = msda_reaches_of(raw, first + t, level, shared.levels[level]);
            msda_write_pair(grad_locations, msda_number(q), k, counts ? grad[t].x * reach.x : 0,
                            counts ? grad[t].y * reach.y : 0);
#endif
#if MSDA_GRAD_WEIGHTS
            msda_store(counts ? raw.weight[first + t] * (grad[t].attention - sum) : 0,
                       grad_weights[msda_in_image(msda_number(q), k, MSDA_WEIGHTS_PITCH)]);
#endif
#if MSDA_GRAD_REFERENCES
            msda_acc* parts = reinterpret_cast<msda_acc*>(samples + local * MSDA_PITCH + k);
            parts[0] = grad[t].x;
            parts[1] = grad[t].y;
            parts[2] = counts ? grad[t].x * msda_load(raw.xy[first + t].element[0]) : 0;
            parts[3] = counts ? grad[t].y * msda_load(raw.xy[first + t].element[1]) : 0;
#endif
        }
    }
}

#if MSDA_GRAD_REFERENCES
// What the samples of a level of each query of the warp add to the gradient of its reference point: [Q, M, L, MSDA_FRONT]
// of this image and head, summed over heads by msda_references.cu.
__device__ __forceinline__ void msda_write_references(
        const msda_sample* samples, const msda_shared& shared, int round, msda_acc* __restrict__ grad_references) {
    __syncwarp();
#pragma unroll 1
    for (int i = threadIdx.x % 32; i < MSDA_QUERIES * MSDA_L; i += 32) {
        const int local = i / MSDA_L, l = i % MSDA_L;
        const msda_index q = msda_number(msda_query_of(shared, round, local));
        if (q < 0) continue;
        msda_acc sum[4] = {0, 0, 0, 0};
        for (int k = msda_first_of(l); k < msda_first_of(l + 1); ++k) {
            const msda_acc* parts = reinterpret_cast<const msda_acc*>(samples + local * MSDA_PITCH + k);
            for (int r = 0; r < MSDA_FRONT; ++r) sum[r] += parts[r];
        }
        const msda_level level = shared.levels[l];
        for (int r = 0; r < MSDA_FRONT; ++r) {
            const int size = r % 2 ? level.h : level.w;
            grad_references[(long long)q * (MSDA_M * MSDA_L * MSDA_FRONT) + l * MSDA_FRONT + r] =
                sum[r] * (r < 2 ? msda_scale(size) : msda_reach(1, size, l));
        }
    }
}
#endif
#else
// Gradients of the warp's samples [k0, k0 + MSDA_CHUNK), `raw`, from the products in their places in shared memory.
__device__ __forceinline__ void msda_write_samples(
        const msda_sample* samples, const msda_shared& shared, const msda_raw& raw, int round, int k0,
        msda_location* __restrict__ grad_locations, msda_location* __restrict__ grad_weights) {
#pragma unroll
    for (int fill = 0; fill < MSDA_FILLS; ++fill) {
        const int i = fill * 32 + threadIdx.x % 32;
        const int local = i / MSDA_SPAN, k = k0 + i % MSDA_SPAN;
        const msda_index q = msda_query_of(shared, round, local);
        if (msda_number(q) < 0 || k >= MSDA_K) continue;
        msda_gradients grad = {0, 0, 0};
        if (!MSDA_PADDED || q >= 0) {
            const int level = MSDA_LEVEL_OF(k);
            const msda_point point = msda_point_of(raw, fill, level, shared.levels[level]);
            const msda_sample* sample = samples + local * MSDA_PITCH + i % MSDA_SPAN;
            grad = msda_gradients_of(point, shared.levels[level], reinterpret_cast<const msda_acc*>(sample));
        }
#if MSDA_GRAD_LOCATIONS
        msda_write_pair(grad_locations, msda_number(q), k, grad.x, grad.y);
#endif
#if MSDA_GRAD_WEIGHTS
        msda_store(grad.attention, grad_weights[msda_in_image(msda_number(q), k, MSDA_WEIGHTS_PITCH)]);
#endif
    }
}
#endif

#if MSDA_FRONT && MSDA_MERGE
// Weights of a warp's samples from shared memory, where msda_fill_sorted has left them: a second softmax takes longer.
__device__ __forceinline__ void msda_recall_weights(msda_raw& raw, const msda_sample* samples) {
#pragma unroll
    for (int fill = 0; fill < MSDA_FILLS; ++fill) {
        const int i = fill * 32 + threadIdx.x % 32, local = i / MSDA_SPAN, k = i % MSDA_SPAN;
        raw.weight[fill] = local < MSDA_QUERIES && k < MSDA_K ? samples[local * MSDA_PITCH + k].attention : 0;
    }
    __syncwarp();
}
#endif
#endif
