"""Typical calls of detectors and segmenters, by name: what is tuned where nothing else is asked for."""

from __future__ import annotations

from ..sizes import Sizes

_SCALES_800 = ((100, 167), (50, 84), (25, 42), (13, 21))
_SCALES_640 = ((80, 80), (40, 40), (20, 20))

WORKLOADS: dict[str, Sizes] = {
    "encoder_800x1333": Sizes(_SCALES_800, N=2),  # Deformable DETR, DINO
    "decoder_300": Sizes(_SCALES_800, N=2, Q=300),  # Deformable DETR
    "decoder_900": Sizes(_SCALES_800, N=8, Q=900),  # DINO, Grounding DINO, training
    "rtdetr_640": Sizes(_SCALES_640, N=16, Q=300),  # RT-DETR
    "mask2former_1024": Sizes(((128, 128), (64, 64), (32, 32))),  # Mask2Former
}
