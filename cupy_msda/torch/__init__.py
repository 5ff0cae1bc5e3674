"""Multi-scale deformable attention as an operator of torch, on the CPU and on CUDA."""

from .functional import MSDeformAttnFunction, decomposed, ms_deform_attn, ms_deform_attn_fused
from .modules import MSDeformAttn, MultiScaleDeformableAttention

__all__ = [
    "MSDeformAttn",
    "MSDeformAttnFunction",
    "MultiScaleDeformableAttention",
    "decomposed",
    "ms_deform_attn",
    "ms_deform_attn_fused",
]
