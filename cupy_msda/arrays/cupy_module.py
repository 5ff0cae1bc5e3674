"""CuPy, imported where a call first needs it, and the folder of its kernel cache."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import os
import sys
import tempfile
import threading
import warnings
from collections.abc import Iterator
from typing import Any

from ..requirements import install, quoted

# CuPy's wheels bring neither NVRTC nor the CUDA headers.
_OF_CUDA13 = ("cupy-cuda13x", "nvidia-cuda-nvrtc", "nvidia-cuda-runtime")
_OF_CUDA12 = ("cupy-cuda12x", "nvidia-cuda-nvrtc-cu12", "nvidia-cuda-runtime-cu12")
INSTALL_CUPY = f"{install(*_OF_CUDA13)} (with a driver older than 580: {quoted(*_OF_CUDA12)})"
# The variables through which CuPy is told where compiled kernels go.
_FOLDER, _IN_MEMORY = "CUPY_CACHE_DIR", "CUPY_CACHE_IN_MEMORY"
_lock = threading.RLock()


def require_cupy(what: str) -> Any:
    """The module CuPy, or a ``RuntimeError`` that says what is wrong with it and how to install it."""
    try:
        cupy = _import_cupy()
    except Exception as error:  # a broken installation raises anything
        if isinstance(error, ModuleNotFoundError) and error.name == "cupy":
            raise RuntimeError(f"{what} needs CuPy, which is not installed: {INSTALL_CUPY}") from error
        raise RuntimeError(f"{what} needs CuPy, whose import fails ({_first_cause(error)}). {_remedy()}") from error
    if not hasattr(cupy, "ndarray"):
        where = list(getattr(cupy, "__path__", ())) or [getattr(cupy, "__file__", "an unknown place")]
        raise RuntimeError(f"{what} needs CuPy, but the module cupy in {where[0]} is not CuPy: {INSTALL_CUPY}")
    return cupy


def cuda_unavailable() -> str | None:
    """Why nothing can run on a GPU here, or None."""
    try:
        cupy = require_cupy("the CUDA path")
    except RuntimeError as error:
        return str(error)
    try:
        if getattr(cupy.cuda.runtime, "is_hip", False):
            return "this CuPy is built for ROCm, and the kernels are CUDA"
        count = cupy.cuda.runtime.getDeviceCount()
    except Exception as error:  # the driver, or a library that cannot be loaded
        if _lacks_driver(cupy):
            return "this machine has no NVIDIA driver"
        return f"CuPy finds no usable CUDA device: {_one_line(error)}"
    return None if count else "CuPy finds no CUDA device"


def _lacks_driver(cupy: Any) -> bool:
    """Whether the CUDA runtime finds no driver. Its error is that of a driver that is too old."""
    try:
        return bool(cupy.cuda.runtime.driverGetVersion() == 0)
    except Exception:  # a library that cannot be loaded
        return False


def cache_folder() -> str:
    """The folder of CuPy's kernel cache, as CuPy finds it."""
    return os.environ.get(_FOLDER, os.path.expanduser("~/.cupy/kernel_cache"))


def cached_in_memory() -> bool:
    """Whether CuPy is told to write no kernel to the disk."""
    return os.environ.get(_IN_MEMORY, "").strip() == "1"


def cache_problem() -> str | None:
    """Why CuPy cannot keep kernels in its cache folder, or None. Creates the folder, as CuPy does."""
    try:
        os.makedirs(cache_folder(), exist_ok=True)
        with tempfile.TemporaryFile(dir=cache_folder()):
            return None
    except OSError as error:
        return error.strerror or _one_line(error)


def cache_in_memory(reason: str) -> None:
    """Make CuPy keep kernels in memory for the rest of this process, and warn once."""
    with _lock:
        if cached_in_memory():
            return
        os.environ[_IN_MEMORY] = "1"
    warnings.warn(
        f"{_unwritable(reason)}. They stay in memory, and every process compiles its own. "
        f"Set {_FOLDER} to a folder that can be written.",
        RuntimeWarning,
        stacklevel=3,
    )


def _import_cupy() -> Any:
    if "cupy" in sys.modules or importlib.util.find_spec("cupy") is None:
        return importlib.import_module("cupy")
    with _lock, _importable_cache_folder():
        return importlib.import_module("cupy")


@contextlib.contextmanager
def _importable_cache_folder() -> Iterator[None]:
    """CuPy 14 creates its cache folder on import. A second import after one that failed does not work."""
    try:
        os.makedirs(cache_folder(), exist_ok=True)
    except OSError as error:
        cache_in_memory(error.strerror or _one_line(error))
    else:
        yield
        return
    before = os.environ.get(_FOLDER)
    os.environ[_FOLDER] = os.sep  # exists everywhere; nothing is written there
    try:
        yield
    finally:
        if before is None:
            del os.environ[_FOLDER]
        else:
            os.environ[_FOLDER] = before


def _remedy() -> str:
    problem = cache_problem()
    if problem is None:
        return f"Reinstall it: {INSTALL_CUPY}"
    return f"{_unwritable(problem)}. Set {_FOLDER} to a folder that can be written, and start again."


def _unwritable(reason: str) -> str:
    return f"CuPy cannot keep compiled kernels in {cache_folder() or 'a folder without a name'} ({reason})"


def _first_cause(error: BaseException) -> str:
    """The exception behind the others, in one line: CuPy wraps it in a page of advice."""
    while error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__}: {_one_line(error)}"


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())
