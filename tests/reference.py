"""Multi-scale deformable attention as plain float64 loops, written from the formula in the contract.

Shares no code with the package. Slow on purpose: one Python statement for each step of the definition.
"""

import math

import numpy as np


def _corners(x, y, H, W):
    """The four neighbours of (x, y) in normalised units: (row, weight, d weight/dx, d weight/dy) each."""
    px, py = x * W - 0.5, y * H - 0.5
    if not (-1 < px < W and -1 < py < H):
        return []
    x0, y0 = math.floor(px), math.floor(py)
    ax, ay = px - x0, py - y0
    found = []
    for yi, wy, dy in ((y0, 1 - ay, -1.0), (y0 + 1, ay, 1.0)):
        for xi, wx, dx in ((x0, 1 - ax, -1.0), (x0 + 1, ax, 1.0)):
            if 0 <= yi < H and 0 <= xi < W:
                found.append((yi * W + xi, wx * wy, dx * W * wy, wx * dy * H))
    return found


def _samples(value, shapes, starts, locations):
    N, Q, M, L, P, _ = locations.shape
    for n in range(N):
        for q in range(Q):
            for m in range(M):
                for level in range(L):
                    H, W = int(shapes[level][0]), int(shapes[level][1])
                    for p in range(P):
                        x, y = (float(c) for c in locations[n, q, m, level, p])
                        corners = [(int(starts[level]) + pixel, w, dx, dy) for pixel, w, dx, dy in _corners(x, y, H, W)]
                        yield (n, q, m, level, p), corners


def packed_starts(shapes):
    sizes = [int(h) * int(w) for h, w in shapes]
    return [sum(sizes[:level]) for level in range(len(sizes))]


def forward(value, shapes, starts, locations, weights):
    starts = packed_starts(shapes) if starts is None else starts
    value, weights = value.astype(np.float64), weights.astype(np.float64)
    N, _, M, D = value.shape
    output = np.zeros((N, locations.shape[1], M, D))
    for (n, q, m, level, p), corners in _samples(value, shapes, starts, locations.astype(np.float64)):
        for row, w, _, _ in corners:
            output[n, q, m] += weights[n, q, m, level, p] * w * value[n, row, m]
    return output.reshape(N, -1, M * D)


def backward(value, shapes, starts, locations, weights, grad_output):
    starts = packed_starts(shapes) if starts is None else starts
    value, weights = value.astype(np.float64), weights.astype(np.float64)
    N, _, M, D = value.shape
    grad = grad_output.astype(np.float64).reshape(N, -1, M, D)
    grad_value, grad_locations = np.zeros_like(value), np.zeros(locations.shape)
    grad_weights = np.zeros(weights.shape)
    for index, corners in _samples(value, shapes, starts, locations.astype(np.float64)):
        n, q, m = index[:3]
        a = weights[index]
        for row, w, dx, dy in corners:
            dot = float(np.dot(grad[n, q, m], value[n, row, m]))
            grad_value[n, row, m] += a * w * grad[n, q, m]
            grad_weights[index] += w * dot
            grad_locations[index] += (a * dx * dot, a * dy * dot)
    return grad_value, grad_locations, grad_weights
