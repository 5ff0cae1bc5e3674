"""Multi-scale deformable attention for NumPy, CuPy, torch, JAX and every other DLPack framework.

``import cupy_msda`` imports NumPy and no other framework. The differentiable torch operator is in ``cupy_msda.torch``.
"""

from .api import (
    ms_deform_attn,
    ms_deform_attn_backward,
    ms_deform_attn_forward,
    ms_deform_attn_fused,
    ms_deform_attn_fused_backward,
)
from .cuda.warmup import Sizes, warmup

__all__ = [
    "Sizes",
    "ms_deform_attn",
    "ms_deform_attn_backward",
    "ms_deform_attn_forward",
    "ms_deform_attn_fused",
    "ms_deform_attn_fused_backward",
    "warmup",
]
__version__ = "0.1.0"
