"""Arrays of any framework: read without a copy, results in the same framework, work on the caller's stream."""

from .convert import INSTALL_CUPY, cuda_unavailable, require_cupy, to_cupy, to_numpy
from .dlpack import LAST_DEFAULT_STREAM
from .frameworks import Framework, framework_of, tracks_gradient, view
from .views import Device, View, item_size

__all__ = [
    "INSTALL_CUPY",
    "LAST_DEFAULT_STREAM",
    "Device",
    "Framework",
    "View",
    "cuda_unavailable",
    "framework_of",
    "item_size",
    "require_cupy",
    "to_cupy",
    "to_numpy",
    "tracks_gradient",
    "view",
]
