"""Multi-scale deformable attention for NumPy, CuPy, torch, JAX and every other DLPack framework.

``import cupy_msda`` imports NumPy and no other framework. The differentiable torch operator is in ``cupy_msda.torch``,
which imports torch when it is first used; ``cupy_msda.plot`` draws with matplotlib.
"""

import importlib
from typing import TYPE_CHECKING

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

if TYPE_CHECKING:
    from . import plot as plot
    from . import torch as torch
else:

    def __getattr__(name):
        """``cupy_msda.torch`` and ``cupy_msda.plot`` without an import of their own, when they are first used."""
        if name == "plot":
            return importlib.import_module(".plot", __name__)
        if name != "torch":
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        try:
            return importlib.import_module(".torch", __name__)
        except ModuleNotFoundError as error:
            if error.name != "torch":
                raise
            raise AttributeError(f"module {__name__!r} has no attribute 'torch' here: {error}") from error
