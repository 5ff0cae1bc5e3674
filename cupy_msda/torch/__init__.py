"""Multi-scale deformable attention as an operator of torch, on the CPU and on CUDA."""

from .functional import MSDeformAttnFunction, decomposed, ms_deform_attn

__all__ = ["MSDeformAttnFunction", "decomposed", "ms_deform_attn"]
