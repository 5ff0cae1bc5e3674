"""Lower bounds of the time on a device, from counted bytes and measured rates."""

from __future__ import annotations

import math
from typing import Any

import torch

from .cases import Workload

L1_BYTES_PER_CLOCK = 128


def copy_bandwidth() -> float:
    """Bytes per second of a large device-to-device copy, read plus written."""
    source = torch.empty(1 << 30, dtype=torch.uint8, device="cuda").random_()
    target = torch.empty_like(source)
    times = []
    for _ in range(12):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        target.copy_(source)
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) * 1e-3)
    return 2 * source.numel() / sorted(times)[len(times) // 2]


def floors(workload: Workload, itemsize: int, bandwidth: float, device: dict[str, Any]) -> dict[str, float]:
    """Bounds in microseconds: HBM traffic for forward and backward, L1 traffic for the forward.

    HBM: every input is read once and every output is written once. Of value, only the vectors count that samples are
    expected to reach when they spread evenly over their level.
    L1: four value vectors per sample, 128 bytes per clock and multiprocessor. Two vectors of 64 bytes take one clock if
    they lie in different halves of their cache lines.
    """
    channels = workload.M * workload.D * itemsize
    pixels = [h * w for h, w in workload.levels]
    reached = sum(n * -math.expm1(-4 * workload.Q * workload.P / n) for n in pixels)
    value, output = workload.N * reached * channels, workload.N * workload.Q * channels
    points = workload.samples * 3 * itemsize
    grad_value = workload.N * workload.S * channels
    clock = float(device["max_clock_mhz"]) * 1e6
    clocks = workload.samples * 4 * workload.D * itemsize / L1_BYTES_PER_CLOCK
    return {
        "forward_hbm_us": (value + points + output) / bandwidth * 1e6,
        "forward_l1_us": clocks / (device["multiprocessors"] * clock) * 1e6,
        "backward_hbm_us": (value + 2 * points + output + grad_value) / bandwidth * 1e6,
    }
