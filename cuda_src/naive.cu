// The operator in one screen per direction: what to read first, and what to run when a fast kernel is under suspicion.
//
// One thread per output channel, and no specialisation but the dtypes: sizes and variants are arguments. Gradients are
// atomic additions to arrays of zeros in the dtype of the arithmetic; epilogue/cast.cu casts them to 16 bits. A fused call
// makes its locations and weights first, and turns their gradients into its own at the end.
#pragma once
#include "common/arithmetic.cuh"
#include "common/types.cuh"

namespace msda {

using location_t = config::location_t;
using reference_t = config::reference_t;

// One struct for all kernels of this file. Every member has 64 bits, as the launch writes them.
struct naive_problem {
    const long long* shapes;                            // [L, 2]: H, W
    const long long* starts;                            // [L], or null: each level follows the one before it
    const long long* points;                            // [L]: points of each level
    const long long* lengths;                           // [N]: valid queries of each image, or null: all are
    long long N, S, M, D, K, Q;
    long long image_stride, pixel_stride, head_stride;  // elements of value
    long long nearest, border, align_corners;           // 0 or 1
    long long reference_coordinates, reference_levels, packed;
};

struct naive_level {
    long long number, h, w, start, points;              // h and w are 0 for a level that does not fit into value
};

// The level of sample k.
__device__ inline naive_level level_of(const naive_problem& p, long long k) {
    long long number = 0, start = 0, first = 0;
    for (; k >= first + p.points[number]; first += p.points[number++]) start += p.shapes[2 * number] * p.shapes[2 * number + 1];
    if (p.starts) start = p.starts[number];
    const long long h = p.shapes[2 * number], w = p.shapes[2 * number + 1];
    const bool fits = h > 0 && w > 0 && h <= p.S && w <= p.S && start >= 0 && start <= p.S && h * w <= p.S - start;
    return {number, fits ? h : 0, fits ? w : 0, start, p.points[number]};
}

// A coordinate on an axis of `size` pixels: the pixel at or before it, the weight of the next, and d(pixel) / d(location).
struct naive_axis {
    bool valid;
    long long pixel;
    acc_t fraction, slope;
};

__device__ inline naive_axis axis_of(const naive_problem& p, acc_t x, long long size) {
    const acc_t scale = p.align_corners ? size - 1 : size, shift = p.align_corners ? 0 : 0.5, last = size - 1;
    if (p.nearest) {
        const acc_t at = floor(multiply_unfused(x, scale) + (acc_t)0.5);
        return {at == at, (long long)fmin(fmax(at, (acc_t)0), last), 0, 0};
    }
    const acc_t at = fma(x, scale, -shift);     // NaN for infinity on one pixel with align_corners
    if (p.border && !(at > 0 && at < last)) return {x == x, at > 0 ? (long long)last : 0, 0, 0};
    const acc_t before = floor(at);
    if (!p.border && !(at > -1 && at < size)) return {false, 0, 0, 0};
    return {true, (long long)before, fma(x, scale, -shift - before), scale};
}

// The four neighbours of a sample: pixels of value, or -1 for a neighbour outside; weights, and their derivatives by the
// pixel coordinates.
struct naive_sample {
    bool fits;                  // its level fits into value
    acc_t slope_x, slope_y;     // d(pixel coordinate) / d(location): 0 where that is clamped
    long long pixel[4];
    acc_t weight[4], by_x[4], by_y[4];
};

__device__ inline naive_sample sample_of(const naive_problem& p, long long k, acc_t location_x, acc_t location_y) {
    const naive_level level = level_of(p, k);
    const naive_axis x = axis_of(p, location_x, level.w), y = axis_of(p, location_y, level.h);
    naive_sample sample = {level.w > 0, x.slope, y.slope};
    for (int c = 0; c < 4; ++c) {
        const int right = c & 1, below = c >> 1;
        const long long column = x.pixel + right, row = y.pixel + below;
        const bool inside = column >= 0 && column < level.w && row >= 0 && row < level.h;
        const bool taken = x.valid && y.valid && inside && !(p.nearest && c);
        const acc_t of_x = right ? x.fraction : 1 - x.fraction, of_y = below ? y.fraction : 1 - y.fraction;
        sample.pixel[c] = taken ? level.start + row * level.w + column : -1;
        sample.weight[c] = of_x * of_y;
        sample.by_x[c] = right ? of_y : -of_y;
        sample.by_y[c] = below ? of_x : -of_x;
    }
    return sample;
}

// Output channel `i` of all: image, query, head and channel, and the first of its K samples.
struct naive_channel {
    long long n, q, m, d, samples;
    bool valid;     // the query is one of the first `lengths[n]`
};

__device__ inline naive_channel channel_of(const naive_problem& p, long long i) {
    const long long head = i / p.D, query = head / p.M, n = query / p.Q, q = query % p.Q;
    return {n, q, head % p.M, i % p.D, head * p.K, !p.lengths || q < p.lengths[n]};
}

__device__ inline long long first_thread() { return (long long)blockIdx.x * blockDim.x + threadIdx.x; }
__device__ inline long long all_threads() { return (long long)gridDim.x * blockDim.x; }
__device__ inline acc_t not_a_number() { return (acc_t)__int_as_float(0x7fc00000); }

}  // namespace msda

using namespace msda;

extern "C" __global__ void msda_naive_forward(
        const naive_problem p, const config::value_t* value, const location_t* locations, const location_t* weights,
        config::value_t* output) {
    for (long long i = first_thread(); i < p.N * p.Q * p.M * p.D; i += all_threads()) {
        const naive_channel at = channel_of(p, i);
        const config::value_t* of_head = value + at.n * p.image_stride + at.m * p.head_stride + at.d;
        acc_t sum = 0;
        for (long long k = at.samples; at.valid && k < at.samples + p.K; ++k) {
            const naive_sample sample = sample_of(p, k - at.samples, widen(locations[2 * k]), widen(locations[2 * k + 1]));
            if (!sample.fits) sum = not_a_number();
            for (int c = 0; c < 4; ++c)
                if (sample.pixel[c] >= 0)
                    sum += widen(weights[k]) * sample.weight[c] * widen(of_head[sample.pixel[c] * p.pixel_stride]);
        }
        narrow(sum, output[i]);
    }
}

// Gradients that are not wanted are null.
extern "C" __global__ void msda_naive_backward(
        const naive_problem p, const config::value_t* value, const location_t* locations, const location_t* weights,
        const config::value_t* grad_output, acc_t* grad_value, acc_t* grad_locations, acc_t* grad_weights) {
    for (long long i = first_thread(); i < p.N * p.Q * p.M * p.D; i += all_threads()) {
        const naive_channel at = channel_of(p, i);
        const config::value_t* of_head = value + at.n * p.image_stride + at.m * p.head_stride + at.d;
        const acc_t grad = widen(grad_output[i]);
        for (long long k = at.samples; at.valid && k < at.samples + p.K; ++k) {
            const naive_sample sample = sample_of(p, k - at.samples, widen(locations[2 * k]), widen(locations[2 * k + 1]));
            const acc_t weight = widen(weights[k]), none = sample.fits ? 0 : not_a_number();
            acc_t interpolated = none, by_x = none, by_y = none;
            for (int c = 0; c < 4; ++c) {
                if (sample.pixel[c] < 0) continue;
                const acc_t x = widen(of_head[sample.pixel[c] * p.pixel_stride]);
                interpolated += sample.weight[c] * x;
                by_x += sample.by_x[c] * x;
                by_y += sample.by_y[c] * x;
                if (grad_value)
                    atomicAdd(grad_value + ((at.n * p.S + sample.pixel[c]) * p.M + at.m) * p.D + at.d,
                              weight * sample.weight[c] * grad);
            }
            const bool taken = !sample.fits || sample.pixel[0] >= 0 || sample.pixel[1] >= 0 || sample.pixel[2] >= 0 ||
                               sample.pixel[3] >= 0;
            if (!taken) continue;       // a NaN in grad_output or in the weight reaches no sample outside its level
            if (grad_weights) atomicAdd(grad_weights + k, grad * interpolated);
            if (!grad_locations || p.nearest) continue;
            // Where a location is clamped its gradient is 0, whatever is NaN.
            const bool clamps = p.border && sample.fits;
            if (!clamps || sample.slope_x != 0) atomicAdd(grad_locations + 2 * k, grad * weight * sample.slope_x * by_x);
            if (!clamps || sample.slope_y != 0) atomicAdd(grad_locations + 2 * k + 1, grad * weight * sample.slope_y * by_y);
        }
    }
}

namespace msda {

// Change of a location per offset of one: 1 / size for points, half the box over the level's points for boxes.
struct naive_reference {
    long long index;    // of its first number in reference_points
    acc_t x, y, by_x, by_y;
};

__device__ inline naive_reference reference_of(
        const naive_problem& p, const reference_t* references, long long query, const naive_level& level) {
    const long long number = p.reference_levels > 1 ? level.number : 0;
    const long long index = (query * p.reference_levels + number) * p.reference_coordinates;
    const reference_t* point = references + index;
    const bool box = p.reference_coordinates == 4;
    const acc_t share = (acc_t)0.5 / (acc_t)level.points;
    return {index, widen(point[0]), widen(point[1]), box ? widen(point[2]) * share : 1 / (acc_t)level.w,
            box ? widen(point[3]) * share : 1 / (acc_t)level.h};
}

// A gradient of a location times what depends on a box or an offset, either of which may be infinite or NaN. A sample that
// is out of bounds or clamped has no part.
__device__ inline acc_t gradient_times(acc_t grad, acc_t factor) { return grad == 0 ? 0 : grad * factor; }

}  // namespace msda

// Locations and weights of a fused call: one thread per query and head. `logits` begin at the first logit.
extern "C" __global__ void msda_naive_materialise(
        const naive_problem p, const reference_t* references, const location_t* offsets, const location_t* logits,
        acc_t* locations, acc_t* weights) {
    for (long long i = first_thread(); i < p.N * p.Q * p.M; i += all_threads()) {
        const location_t* offset = offsets + i * (p.packed ? 3 : 2) * p.K;
        const location_t* logit = logits + i * (p.packed ? 3 : 1) * p.K;
        acc_t largest = widen(logit[0]), sum = 0;
        for (long long k = 1; k < p.K; ++k) largest = fmax(largest, widen(logit[k]));
        for (long long k = 0; k < p.K; ++k) sum += exponential(widen(logit[k]) - largest);
        for (long long k = 0; k < p.K; ++k) {
            const naive_reference at = reference_of(p, references, i / p.M, level_of(p, k));
            weights[i * p.K + k] = exponential(widen(logit[k]) - largest) / sum;
            locations[2 * (i * p.K + k)] = at.x + widen(offset[2 * k]) * at.by_x;
            locations[2 * (i * p.K + k) + 1] = at.y + widen(offset[2 * k + 1]) * at.by_y;
        }
    }
}

// From the gradients of locations and weights to those of a fused call: one thread per query. With s the sum of
// weight * gradient over the samples of a head, the gradient of a logit is weight * (gradient - s).
extern "C" __global__ void msda_naive_fused_backward(
        const naive_problem p, const reference_t* references, const location_t* offsets, const acc_t* weights,
        const acc_t* of_locations, const acc_t* of_weights, reference_t* grad_references, location_t* grad_offsets,
        location_t* grad_logits) {
    for (long long query = first_thread(); query < p.N * p.Q; query += all_threads()) {
        const bool valid = !p.lengths || query % p.Q < p.lengths[query / p.Q];
        for (long long i = query * p.M; i < (query + 1) * p.M; ++i) {
            acc_t sum = 0;
            for (long long k = i * p.K; grad_logits && valid && k < (i + 1) * p.K; ++k) sum += weights[k] * of_weights[k];
            for (long long k = 0; k < p.K; ++k) {
                const long long at = i * p.K + k, pitch = p.packed ? 3 * p.K : 2 * p.K;
                const naive_reference by = reference_of(p, references, query, level_of(p, k));
                if (grad_offsets) {
                    narrow(valid ? gradient_times(of_locations[2 * at], by.by_x) : 0, grad_offsets[i * pitch + 2 * k]);
                    narrow(valid ? gradient_times(of_locations[2 * at + 1], by.by_y) : 0, grad_offsets[i * pitch + 2 * k + 1]);
                }
                if (grad_logits)
                    narrow(valid ? weights[at] * (of_weights[at] - sum) : 0, grad_logits[i * (p.packed ? 3 : 1) * p.K + k]);
            }
        }
        for (long long r = 0; grad_references && r < p.reference_levels; ++r) {
            acc_t sum[4] = {0, 0, 0, 0};
            for (long long i = query * p.M * p.K; valid && i < (query + 1) * p.M * p.K; ++i) {
                const naive_level level = level_of(p, i % p.K);
                if (p.reference_levels > 1 && level.number != r) continue;
                const location_t* offset = offsets + i / p.K * (p.packed ? 3 : 2) * p.K + 2 * (i % p.K);
                for (int axis = 0; axis < 2; ++axis) {
                    sum[axis] += of_locations[2 * i + axis];
                    const acc_t by_size = widen(offset[axis]) * ((acc_t)0.5 / (acc_t)level.points);
                    sum[2 + axis] += gradient_times(of_locations[2 * i + axis], by_size);
                }
            }
            for (long long c = 0; c < p.reference_coordinates; ++c)
                narrow(sum[c], grad_references[(query * p.reference_levels + r) * p.reference_coordinates + c]);
        }
    }
}
