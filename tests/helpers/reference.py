"""Multi-scale deformable attention as plain float64 loops, written from the formula in the contract.

It shares no code with the package. It is slow on purpose: one Python statement for each step of the definition. NaN and
infinity are legal inputs: NumPy's warnings about them are off.
"""

import math

import numpy as np


def _coordinate(c, size, padding_mode, align_corners):
    """Pixel coordinate of the normalised `c`, and its derivative by `c`: None where that is clamped.

    None for both where the sample does not count.
    """
    slope = size - 1 if align_corners else size
    if padding_mode == "border":
        if math.isinf(c):
            return (size - 1 if c > 0 else 0), None
        p = c * slope if align_corners else c * slope - 0.5
        return min(max(p, 0), size - 1), (slope if 0 < p < size - 1 else None)
    p = c * slope if align_corners else c * slope - 0.5
    return (p, slope) if math.isfinite(c) and -1 < p < size else None


def _bilinear(x, y, H, W, padding_mode, align_corners):
    """Neighbours of the normalised (x, y): (pixel, weight, d weight/dpx, d weight/dpy) each; and dpx/dx, dpy/dy."""
    if math.isnan(x) or math.isnan(y):
        return [], (None, None)
    column, row = (_coordinate(c, n, padding_mode, align_corners) for c, n in ((x, W), (y, H)))
    if column is None or row is None:
        return [], (None, None)
    (px, slope_x), (py, slope_y) = column, row
    x0, y0 = math.floor(px), math.floor(py)
    ax, ay = px - x0, py - y0
    found = []
    for yi, wy, dy in ((y0, 1 - ay, -1.0), (y0 + 1, ay, 1.0)):
        for xi, wx, dx in ((x0, 1 - ax, -1.0), (x0 + 1, ax, 1.0)):
            if 0 <= yi < H and 0 <= xi < W:
                found.append((yi * W + xi, wx * wy, dx * wy, wx * dy))
    return found, (slope_x, slope_y)


def _nearest(x, y, H, W):
    if math.isnan(x) or math.isnan(y):
        return [], (None, None)
    column, row = (int(min(max(c * n + 0.5, 0), n - 1)) for c, n in ((x, W), (y, H)))
    return [(row * W + column, 1.0, 0.0, 0.0)], (None, None)


def _samples(
    shapes, starts, locations, num_points, interpolation="bilinear", padding_mode="zeros", align_corners=False
):
    """For every sample: its index in weights [N, Q, M, K], its neighbours and its slopes, as _bilinear gives them."""
    N, Q, M, K, _ = locations.shape
    level_of = [level for level, count in enumerate(num_points) for _ in range(count)]
    for n in range(N):
        for q in range(Q):
            for m in range(M):
                for k in range(K):
                    H, W = (int(size) for size in shapes[level_of[k]])
                    x, y = (float(c) for c in locations[n, q, m, k])
                    if interpolation == "nearest":
                        corners, slopes = _nearest(x, y, H, W)
                    else:
                        corners, slopes = _bilinear(x, y, H, W, padding_mode, align_corners)
                    start = int(starts[level_of[k]])
                    yield (n, q, m, k), [(start + pixel, w, dx, dy) for pixel, w, dx, dy in corners], slopes


def _in_one_dimension(shapes, locations, weights, num_points):
    """Locations [N, Q, M, K, 2] and weights [N, Q, M, K] in float64, and the points of each level."""
    if num_points is None:
        num_points = [locations.shape[4]] * len(shapes)
    N, Q, M = locations.shape[:3]
    K = sum(num_points)
    return (
        locations.astype(np.float64).reshape(N, Q, M, K, 2),
        weights.astype(np.float64).reshape(N, Q, M, K),
        num_points,
    )


def contiguous_starts(shapes):
    sizes = [int(h) * int(w) for h, w in shapes]
    return [sum(sizes[:level]) for level in range(len(sizes))]


@np.errstate(all="ignore")
def forward(value, shapes, starts, locations, weights, num_points=None, **variant):
    starts = contiguous_starts(shapes) if starts is None else starts
    value = value.astype(np.float64)
    locations, weights, num_points = _in_one_dimension(shapes, locations, weights, num_points)
    N, _, M, D = value.shape
    output = np.zeros((N, locations.shape[1], M, D))
    for (n, q, m, k), corners, _ in _samples(shapes, starts, locations, num_points, **variant):
        for pixel, w, _, _ in corners:
            output[n, q, m] += weights[n, q, m, k] * w * value[n, pixel, m]
    return output.reshape(N, -1, M * D)


@np.errstate(all="ignore")
def backward(value, shapes, starts, locations, weights, grad_output, num_points=None, **variant):
    starts = contiguous_starts(shapes) if starts is None else starts
    of_locations, of_weights = locations.shape, weights.shape
    value = value.astype(np.float64)
    locations, weights, num_points = _in_one_dimension(shapes, locations, weights, num_points)
    N, _, M, D = value.shape
    grad = grad_output.astype(np.float64).reshape(N, -1, M, D)
    grad_value, grad_locations = np.zeros_like(value), np.zeros(locations.shape)
    grad_weights = np.zeros(weights.shape)
    for index, corners, slopes in _samples(shapes, starts, locations, num_points, **variant):
        n, q, m = index[:3]
        a = weights[index]
        for pixel, w, dx, dy in corners:
            dot = float(np.dot(grad[n, q, m], value[n, pixel, m]))
            grad_value[n, pixel, m] += a * w * grad[n, q, m]
            grad_weights[index] += w * dot
            for axis, (slope, derivative) in enumerate(zip(slopes, (dx, dy), strict=True)):
                if slope is not None:  # else the gradient is 0, whatever is NaN
                    grad_locations[(*index, axis)] += a * slope * derivative * dot
    return grad_value, grad_locations.reshape(of_locations), grad_weights.reshape(of_weights)


def _references(shapes, references, points):
    """For every query and sample: k, the index of its reference point, and (W, H) and P of its level."""
    level_of = [level for level, count in enumerate(points) for _ in range(count)]
    N, Q, levels = references.shape[:3]
    for n in range(N):
        for q in range(Q):
            for k, level in enumerate(level_of):
                H, W = (int(size) for size in shapes[level])
                yield k, (n, q, level if levels > 1 else 0), (W, H), points[level]


@np.errstate(all="ignore")
def locations_and_weights(shapes, references, offsets, logits, points):
    """Locations [N, Q, M, K, 2] and weights [N, Q, M, K] of offsets from reference points, and of logits."""
    N, Q, M = logits.shape[:3]
    K = sum(points)
    offsets = offsets.astype(np.float64).reshape(N, Q, M, K, 2)
    logits = logits.astype(np.float64).reshape(N, Q, M, K)
    locations, weights = np.empty(offsets.shape), np.empty(logits.shape)
    for k, (n, q, at), size, P in _references(shapes, references, points):
        point = references[n, q, at].astype(np.float64)
        for m in range(M):
            for c in range(2):
                step = offsets[n, q, m, k, c]
                move = step / size[c] if len(point) == 2 else step / P * point[2 + c] * 0.5
                locations[n, q, m, k, c] = point[c] + move
    for index in np.ndindex(N, Q, M):
        exponentials = [math.exp(logit - max(logits[index])) for logit in logits[index]]
        weights[index] = [e / sum(exponentials) for e in exponentials]
    return locations, weights


def _product(grad, factor):
    """Part of a gradient; none where the sample does not count or is clamped, whatever the factor is."""
    return grad * factor if grad else 0.0


@np.errstate(all="ignore")
def fused_backward(shapes, references, offsets, weights, points, of_locations, of_weights):
    """Gradients of reference points, offsets and logits from those of locations and weights."""
    N, Q, M, K = weights.shape
    offsets = offsets.astype(np.float64).reshape(N, Q, M, K, 2)
    grad_references, grad_offsets = np.zeros(references.shape), np.empty(offsets.shape)
    grad_logits = np.empty(weights.shape)
    for k, (n, q, at), size, P in _references(shapes, references, points):
        point = references[n, q, at].astype(np.float64)
        for m in range(M):
            for c in range(2):
                grad, step = of_locations[n, q, m, k, c], offsets[n, q, m, k, c]
                grad_references[n, q, at, c] += grad
                if len(point) == 2:
                    grad_offsets[n, q, m, k, c] = grad / size[c]
                else:
                    grad_offsets[n, q, m, k, c] = _product(grad, point[2 + c] * 0.5 / P)
                    grad_references[n, q, at, 2 + c] += _product(grad, step * 0.5 / P)
    for index in np.ndindex(N, Q, M):
        inner = sum(weights[index] * of_weights[index])
        grad_logits[index] = [w * (g - inner) for w, g in zip(weights[index], of_weights[index], strict=True)]
    return grad_references, grad_offsets, grad_logits
