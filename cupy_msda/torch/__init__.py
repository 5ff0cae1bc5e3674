"""Multi-scale deformable attention as an operator of torch: by kernels on the CPU and CUDA, elsewhere by torch."""

import sys as _sys

from ..requirements import install as _install

try:
    import torch as _torch  # noqa: F401
except ModuleNotFoundError as error:
    if error.name != "torch":
        raise
    _reason = f"cupy_msda.torch needs torch, which is not installed: {_install('torch')}"
    # The command `python -m cupy_msda.torch.extension` shows no traceback.
    if _sys.argv[:1] == ["-m"] and "cupy_msda.torch.extension" in _sys.orig_argv:
        raise SystemExit(_reason) from None
    raise ModuleNotFoundError(_reason, name="torch") from error

from . import flops as _flops  # noqa: F401  (registers them with torch)
from .functional import MSDeformAttnFunction, decomposed, ms_deform_attn, ms_deform_attn_fused
from .inspection import inspect
from .modules import MSDeformAttn, MultiScaleDeformableAttention
from .patching import patch

__all__ = [
    "MSDeformAttn",
    "MSDeformAttnFunction",
    "MultiScaleDeformableAttention",
    "decomposed",
    "inspect",
    "ms_deform_attn",
    "ms_deform_attn_fused",
    "patch",
]
