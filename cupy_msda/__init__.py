"""Multi-scale deformable attention for NumPy, CuPy, torch, JAX and every other DLPack framework.

``import cupy_msda`` imports NumPy and no other framework. The differentiable operators of torch and JAX are in
``cupy_msda.torch`` and ``cupy_msda.jax``, which import them when they are first used; ``cupy_msda.plot`` draws with
matplotlib.
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
from .cuda.recording import record
from .cuda.tuner.tune import tune
from .cuda.warmup import warmup
from .explanation import explain
from .sizes import Sizes
from .version import __version__ as __version__

__all__ = [
    "Sizes",
    "explain",
    "ms_deform_attn",
    "ms_deform_attn_backward",
    "ms_deform_attn_forward",
    "ms_deform_attn_fused",
    "ms_deform_attn_fused_backward",
    "record",
    "tune",
    "warmup",
]

if TYPE_CHECKING:
    from . import jax as jax
    from . import plot as plot
    from . import torch as torch
else:

    def __getattr__(name):
        """``cupy_msda.torch``, ``.jax`` and ``.plot`` without an import of their own, when they are first used."""
        if name not in ("jax", "plot", "torch"):
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        try:
            return importlib.import_module(f".{name}", __name__)
        except ModuleNotFoundError as error:
            if error.name != name:
                raise
            raise AttributeError(f"module {__name__!r} has no attribute {name!r} here: {error}") from error
