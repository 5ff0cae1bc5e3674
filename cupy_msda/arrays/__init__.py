"""Arrays of any framework: read without a copy, results in the same framework, work on the caller's stream."""

from .convert import to_cupy, to_numpy
from .cupy_module import (
    INSTALL_CUPY,
    cache_folder,
    cache_in_memory,
    cache_problem,
    cached_in_memory,
    cuda_unavailable,
    require_cupy,
)
from .dlpack import LAST_DEFAULT_STREAM
from .frameworks import Framework, framework_of, tracks_gradient, view, view_metadata
from .operators import operator_of
from .views import Device, View, item_size
from .xla import xla_wants_determinism

__all__ = [
    "INSTALL_CUPY",
    "LAST_DEFAULT_STREAM",
    "Device",
    "Framework",
    "View",
    "cache_folder",
    "cache_in_memory",
    "cache_problem",
    "cached_in_memory",
    "cuda_unavailable",
    "framework_of",
    "item_size",
    "operator_of",
    "require_cupy",
    "to_cupy",
    "to_numpy",
    "tracks_gradient",
    "view",
    "view_metadata",
    "xla_wants_determinism",
]
