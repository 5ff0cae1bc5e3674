"""``python -m cupy_msda info``: versions, GPU and kernel cache of this machine, and how to install what is missing."""

from __future__ import annotations

import functools
import importlib.util
import platform
from collections.abc import Callable
from importlib import metadata
from typing import Any

import numpy as np

from .. import __version__, arrays
from ..cpu import tier
from ..cuda import gpu
from ..cuda.tuning import storage
from ..requirements import install
from . import cuda_extra
from .output import one_line

# Distributions, of which one is enough, the name to print, and the command that installs one.
_OPTIONAL = (
    (("cupy-cuda13x", "cupy-cuda12x", "cupy"), "CuPy", arrays.INSTALL_CUPY),
    (("numba",), "numba", install("numba")),
    (("torch",), "torch", install("torch")),
    (("jax",), "JAX", install("jax")),
    (("ml_dtypes",), "ml_dtypes", install("ml_dtypes")),
    (("matplotlib",), "matplotlib", install("matplotlib")),
    (("pillow",), "Pillow", install("pillow")),
)


def describe() -> list[tuple[str, str]]:
    """The printed rows: (name, text)."""
    rows = [
        ("cupy_msda", __version__),
        ("Python", platform.python_version()),
        ("NumPy", np.__version__),
    ]
    for distributions, name, command in _OPTIONAL:
        versions = [f"{d} {v}" if d != name else v for d in distributions if (v := _version(d))]
        rows.append((name, ", ".join(versions) or f"missing: {command}"))
    rows.append(("extra for CUDA", cuda_extra.describe()))
    reason = arrays.cuda_unavailable()
    if reason is not None:
        rows.append(("GPU", f"not used: {reason}"))
    else:
        rows += _gpu_rows()
    rows.append(("CPU", tier.describe()))
    rows.append(("kernel cache", _kernel_cache()))
    rows.append(("tuning", _tuning()))
    return rows


def _tuning() -> str:
    """Where measured launch configurations are kept, and for which GPU models."""
    folder = storage.folder()
    if folder is None:
        return f"off ({storage.VARIABLE})"
    names = sorted(path.stem for path in folder.glob("*.json")) if folder.is_dir() else []
    return f"{folder}: {', '.join(names) or 'nothing is tuned'}"


def _kernel_cache() -> str:
    """Where compiled kernels are kept, and what to do where CuPy cannot write there."""
    folder = arrays.cache_folder()
    if not _is_installed("cupy"):
        return folder
    problem = arrays.cache_problem()
    if problem is not None:
        where = folder or "a folder without a name"
        return (
            f"in memory, because {where} cannot be used ({problem}): set CUPY_CACHE_DIR to a folder that can be written"
        )
    return "in memory (CUPY_CACHE_IN_MEMORY is set)" if arrays.cached_in_memory() else folder


def _gpu_rows() -> list[tuple[str, str]]:
    cupy = arrays.require_cupy("the GPU rows")
    runtime = cupy.cuda.runtime

    def device_row(device: int) -> str:
        properties = runtime.getDeviceProperties(device)
        memory = properties["totalGlobalMem"] / 2**30
        architecture = 10 * properties["major"] + properties["minor"]
        problem = gpu.refusal_of(cupy, architecture)
        row = f"{properties['name'].decode()}, sm_{architecture}, {memory:.0f} GiB"
        return row if problem is None else f"{row}: {problem}"

    devices = range(runtime.getDeviceCount())
    rows = [(f"GPU {device}", _or_error(functools.partial(device_row, device))) for device in devices]
    rows.append(("CUDA of the driver", _or_error(lambda: _cuda_version(runtime.driverGetVersion()))))
    rows.append(("CUDA runtime", _or_error(lambda: _cuda_version(runtime.runtimeGetVersion()))))
    rows.append(("NVRTC", _or_error(lambda: _nvrtc_version(cupy))))
    return rows


def _or_error(text: Callable[[], str]) -> str:
    """A row, or why there is none: a missing library, or a device in another mode."""
    try:
        return text()
    except Exception as error:
        return f"fails: {one_line(error)}"


def _nvrtc_version(cupy: Any) -> str:
    return ".".join(map(str, cupy.cuda.nvrtc.getVersion()))


def _cuda_version(number: int) -> str:
    return f"{number // 1000}.{number % 1000 // 10}"


def _is_installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ValueError:  # something put a module without a specification into sys.modules
        return True


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None
