"""From a KernelSpec to a compiled function: source, options, NVRTC. The only user of ``cupy.RawModule``."""

from __future__ import annotations

import functools
import re
import threading
from importlib import import_module
from pathlib import Path
from typing import Any

from .. import arrays
from . import gpu
from .kernel_spec import Axis, KernelSpec
from .specs import KERNELS

# Says what each member of ``struct config`` means, for a reader and for an editor. :func:`prelude` takes its place.
CONFIGURATION = "common/config.cuh"
_INCLUDE = re.compile(r'^[ \t]*#[ \t]*include[ \t]+"([^"\n]+)"[^\n]*\n', re.MULTILINE)
_PRAGMA_ONCE = re.compile(r"^[ \t]*#[ \t]*pragma[ \t]+once[^\n]*\n", re.MULTILINE)
_TYPES = {"float16": "float16", "bfloat16": "bfloat16", "float32": "float", "float64": "double"}
_lock = threading.Lock()
_functions: dict[tuple[KernelSpec, int], Any] = {}
_compiling: dict[tuple[KernelSpec, int], threading.Lock] = {}


# ---- source ----------------------------------------------------------------------------------------------------------


def source_folder() -> Path:
    """``cuda_src``: inside the package in a wheel, next to it in a checkout."""
    package = Path(__file__).resolve().parent.parent
    for folder in (package / "cuda_src", package.parent / "cuda_src"):
        if (folder / "forward.cu").is_file():
            return folder
    raise RuntimeError(f"the CUDA sources of cupy_msda are missing: expected them in {package / 'cuda_src'}")


@functools.cache
def source(kernel: str) -> str:
    """The text of a kernel without its configuration."""
    return source_in(source_folder(), kernel)


def source_in(folder: Path, kernel: str) -> str:
    """The text of a kernel out of `folder`: its file, with every file that it includes in its place, once."""
    return _with_includes(folder, KERNELS[kernel].file, set())


def _with_includes(folder: Path, name: str, included: set[str]) -> str:
    if name in included:
        return ""
    included.add(name)
    text = _PRAGMA_ONCE.sub("", (folder / name).read_text())
    if name == CONFIGURATION:
        text = "".join(include[0] for include in _INCLUDE.finditer(text))
    return _INCLUDE.sub(lambda include: _with_includes(folder, include[1], included), text)


def prelude(spec: KernelSpec) -> str:
    """The head of the source: ``struct config``, which is all that makes a specialisation."""
    members = "".join(f"    {_member(name, value)}\n" for name, value in spec.config().items())
    return (
        f"namespace msda {{\nstruct float16;\nstruct bfloat16;\nstruct config {{\n{members}}};\n}}  // namespace msda\n"
    )


def _member(name: str, value: Axis) -> str:
    """A member of the struct. Numbers are enumerators: NVRTC gives every constexpr variable memory on the device."""
    if isinstance(value, str):
        return f"using {name.removesuffix('dtype')}t = {_TYPES[value]};"
    if isinstance(value, bool):
        return f"enum : bool {{ {name} = {str(value).lower()} }};"
    if isinstance(value, int):
        return f"enum : {'int' if value < 2**31 else 'long long'} {{ {name} = {value} }};"
    # Of each level; empty where all have P points.
    table = f"constexpr int of[L] = {{{', '.join(map(str, value))}}}; return of[level];" if value else "return P;"
    return f"static __device__ constexpr int {name}(int level) {{ {table} }}"


def program(spec: KernelSpec) -> str:
    """One self-contained source: CuPy's disk cache hashes this text, but not files that it would include."""
    return prelude(spec) + source(spec.kernel)


OPTIONS = ("--std=c++17",)


# ---- compilation -----------------------------------------------------------------------------------------------------


def is_compiled(spec: KernelSpec, device: int) -> bool:
    """Whether :func:`function` would return at once."""
    return (spec, device) in _functions


def function(spec: KernelSpec, device: int) -> Any:
    """The compiled kernel for the current device, number `device`; compiled once per process and machine.

    Threads that ask for different kernels compile at the same time.
    """
    found = _functions.get((spec, device))
    if found is None:
        with _lock:
            lock = _compiling.setdefault((spec, device), threading.Lock())
        with lock:
            found = _functions.get((spec, device))
            if found is None:
                found = _functions[spec, device] = _compile(spec, gpu.of_device(device))
    return found


def _compile(spec: KernelSpec, on: gpu.Gpu) -> Any:
    try:
        kernel = _load(spec)
    except Exception as error:  # NVRTC or its library is missing or too old, or the driver refuses the kernel
        reason = " ".join(str(error).split()[:40])
        raise RuntimeError(
            f"the CUDA kernel {spec.kernel} cannot be compiled: {type(error).__name__}: {reason}. "
            "`python -m cupy_msda info` shows which NVRTC and driver CuPy finds"
        ) from error
    if spec.leaves_l1:
        # The driver's own choice leaves less L1 cache. docs/performance/decisions.md#forward-shared-memory-carveout
        kernel.preferred_shared_memory_carveout = on.carveout(spec.resident_blocks(on), spec.shared_bytes or 0)
    return kernel


def _load(spec: KernelSpec) -> Any:
    """The kernel, compiled. Without a disk cache where CuPy cannot read or write its folder, or a temporary one."""
    in_memory = arrays.cached_in_memory()  # before the attempt: another thread may change it meanwhile
    try:
        return _compiled_by_cupy(spec)
    except OSError as error:
        if in_memory:
            raise
        reason = error.strerror or str(error)
    arrays.cache_in_memory(reason)
    return _compiled_by_cupy(spec)


def _compiled_by_cupy(spec: KernelSpec) -> Any:
    module = import_module("cupy").RawModule(code=program(spec), options=OPTIONS, backend="nvrtc")
    kernel = module.get_function(spec.function)
    _ = kernel.kernel  # CuPy compiles only where this is read
    return kernel
