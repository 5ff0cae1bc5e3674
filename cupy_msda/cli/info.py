"""``python -m cupy_msda info``: versions, GPU and kernel cache of this machine, and how to install what is missing."""

from __future__ import annotations

import os
import platform
from importlib import metadata
from pathlib import Path

from .. import __version__, arrays

# Distributions, of which one is enough, the name to print, and the command that installs one.
_OPTIONAL = (
    (("cupy-cuda13x", "cupy-cuda12x", "cupy"), "CuPy", arrays.INSTALL_CUPY),
    (("torch",), "torch", "pip install 'cupy-msda[torch]'"),
    (("jax",), "JAX", "pip install jax"),
    (("ml_dtypes",), "ml_dtypes", "pip install ml_dtypes"),
    (("matplotlib",), "matplotlib", "pip install 'cupy-msda[demo]'"),
    (("pillow",), "Pillow", "pip install 'cupy-msda[demo]'"),
)


def describe() -> list[tuple[str, str]]:
    """The printed rows: (name, text)."""
    rows = [
        ("cupy_msda", __version__),
        ("Python", platform.python_version()),
        ("NumPy", metadata.version("numpy")),
    ]
    for distributions, name, command in _OPTIONAL:
        versions = [f"{d} {v}" if d != name else v for d in distributions if (v := _version(d))]
        rows.append((name, ", ".join(versions) or f"missing: {command}"))
    reason = arrays.cuda_unavailable()
    if reason is not None:
        rows.append(("GPU", f"not used: {reason}"))
    else:
        rows += _gpu_rows()
    cache = os.environ.get("CUPY_CACHE_DIR", str(Path.home() / ".cupy" / "kernel_cache"))
    rows.append(("kernel cache", cache))
    return rows


def _gpu_rows() -> list[tuple[str, str]]:
    cupy = arrays.require_cupy("the GPU rows")
    runtime = cupy.cuda.runtime
    rows = []
    for device in range(runtime.getDeviceCount()):
        properties = runtime.getDeviceProperties(device)
        name = properties["name"].decode()
        memory = properties["totalGlobalMem"] / 2**30
        rows.append((f"GPU {device}", f"{name}, sm_{properties['major']}{properties['minor']}, {memory:.0f} GiB"))
    rows.append(("CUDA of the driver", _cuda_version(runtime.driverGetVersion())))
    rows.append(("CUDA runtime", _cuda_version(runtime.runtimeGetVersion())))
    rows.append(("NVRTC", ".".join(map(str, cupy.cuda.nvrtc.getVersion()))))
    return rows


def _cuda_version(number: int) -> str:
    return f"{number // 1000}.{number % 1000 // 10}"


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None
