"""``python -m tests.golden.make`` writes the golden cases again, by the NumPy path in float64."""

from pathlib import Path

import numpy as np

import cupy_msda

# name: levels, starts, S, N, Q (None: one query per pixel), M, D, P
CASES = {
    "encoder": (((6, 8), (3, 4), (2, 2), (1, 1)), None, None, 2, None, 2, 8, 4),
    "decoder": (((8, 5), (4, 3)), None, None, 2, 7, 4, 16, 4),
    "odd_channels": (((5, 6), (3, 3)), None, None, 1, 6, 3, 33, 3),
    "overlapping_levels": (((4, 5), (3, 3)), (2, 9), 24, 1, 5, 2, 4, 2),
    "one_pixel": (((1, 1),), None, None, 3, 4, 1, 1, 5),
}


def dyadic(rng, shape, limit):
    """Multiples of 1/64 below `limit` <= 4: exact in bfloat16 and float16."""
    return rng.integers(1 - limit * 64, limit * 64, shape) / 64


def locations(rng, shape, levels):
    """Multiples of 1/128 around [0, 1], redrawn until no sample is within 0.02 pixels of a kink."""
    size = np.array([[w, h] for h, w in levels]).reshape(len(levels), 1, 2)
    drawn = rng.integers(-40, 168, shape) / 128
    for _ in range(1000):
        pixel = drawn * size - 0.5
        at_kink = np.abs(pixel - np.round(pixel)) < 0.02
        if not at_kink.any():
            return drawn
        drawn = np.where(at_kink, rng.integers(-40, 168, shape) / 128, drawn)
    raise AssertionError("no locations away from the kinks")


def main():
    for seed, (name, (levels, starts, S, N, Q, M, D, P)) in enumerate(CASES.items()):
        rng = np.random.default_rng(seed)
        shapes = np.array(levels)
        sizes = shapes.prod(1)
        starts = np.cumsum(sizes) - sizes if starts is None else np.array(starts)
        S = S or int(sizes.sum())
        Q = Q or S
        arrays = {
            "value": dyadic(rng, (N, S, M, D), 2),
            "spatial_shapes": shapes,
            "level_start_index": starts,
            "sampling_loc": locations(rng, (N, Q, M, len(levels), P, 2), levels),
            "attn_weight": rng.integers(1, 64, (N, Q, M, len(levels), P)) / 64,
        }
        grad_output = dyadic(rng, (N, Q, M * D), 2)
        output = cupy_msda.ms_deform_attn_forward(*arrays.values(), 64)
        grads = cupy_msda.ms_deform_attn_backward(*arrays.values(), grad_output, 64)
        np.savez_compressed(
            Path(__file__).with_name(f"{name}.npz"),
            **{key: array.astype(np.float32) if array.dtype.kind == "f" else array for key, array in arrays.items()},
            grad_output=grad_output.astype(np.float32),
            output=output,
            grad_value=grads[0],
            grad_sampling_loc=grads[1],
            grad_attn_weight=grads[2],
        )


if __name__ == "__main__":
    main()
