"""Arrays of any framework: read in without a copy, handed back to the same framework, on the caller's stream."""

from .frameworks import (
    INSTALL_CUPY,
    LAST_DEFAULT_STREAM,
    Device,
    Framework,
    View,
    cuda_unavailable,
    framework_of,
    item_size,
    require_cupy,
    to_cupy,
    to_numpy,
    tracks_gradient,
    view,
)

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
