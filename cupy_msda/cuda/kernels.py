"""From a KernelKey to a compiled function: source, options, NVRTC. The only user of ``cupy.RawModule``."""

from __future__ import annotations

import functools
import re
import threading
from importlib import import_module
from pathlib import Path
from typing import Any

from .plan import KernelKey, shared_bytes

_MACRO_OF_DTYPE = {"float16": "F16", "bfloat16": "BF16", "float32": "F32", "float64": "F64"}
# The file of each kind of kernel; the kernel is called msda_<name of the file>.
_FILE = {
    "forward": "forward.cu",
    "backward": "backward.cu",
    "round": "epilogue/cast.cu",
    "sort": "sorted/bucket_sort.cu",
    "count": "sorted/split_buckets.cu",
    "sum": "sorted/block_reduce.cu",
    "add": "sorted/warp_reduce.cu",
    "expand": "sorted/materialise.cu",
    "references": "epilogue/reduce_references.cu",
}
_INCLUDE = re.compile(r'^[ \t]*#[ \t]*include[ \t]+"([^"\n]+)"[^\n]*\n', re.MULTILINE)
_PRAGMA_ONCE = re.compile(r"^[ \t]*#[ \t]*pragma[ \t]+once[^\n]*\n", re.MULTILINE)
_lock = threading.Lock()
_functions: dict[tuple[KernelKey, int], Any] = {}
_compiling: dict[tuple[KernelKey, int], threading.Lock] = {}


def source_folder() -> Path:
    """``cuda_src``: inside the package in a wheel, beside it in a checkout."""
    package = Path(__file__).resolve().parent.parent
    for folder in (package / "cuda_src", package.parent / "cuda_src"):
        if (folder / "forward.cu").is_file():
            return folder
    raise RuntimeError(f"the CUDA sources of cupy_msda are missing: expected them in {package / 'cuda_src'}")


@functools.cache
def source(kind: str) -> str:
    """One self-contained source: CuPy's disk cache hashes this text, but not the files that it would include."""
    return source_in(source_folder(), kind)


def source_in(folder: Path, kind: str) -> str:
    """The source of a kernel out of `folder`: its file, with every file that it includes in its place, once."""
    return _with_includes(folder, _FILE[kind], set())


def _with_includes(folder: Path, name: str, included: set[str]) -> str:
    if name in included:
        return ""
    included.add(name)
    text = _PRAGMA_ONCE.sub("", (folder / name).read_text())
    return _INCLUDE.sub(lambda line: _with_includes(folder, line[1], included), text)


def entry(kind: str) -> str:
    """Name of the kernel in its source."""
    return f"msda_{Path(_FILE[kind]).stem}"


def options(key: KernelKey) -> tuple[str, ...]:
    """NVRTC options that turn the source into this specialisation."""
    macros = dict(key.macros())
    dtypes = {"VALUE": key.value_dtype, "LOCATION": key.location_dtype, "REFERENCE": key.reference_dtype}
    for role, dtype in dtypes.items():
        for name, macro in _MACRO_OF_DTYPE.items():
            macros[f"MSDA_{role}_{macro}"] = int(name == dtype)
    macros["MSDA_SHARED_BYTES"] = shared_bytes(key)
    return ("--std=c++17", *(f"-D{name}={number}" for name, number in macros.items()))


def is_compiled(key: KernelKey, device: int) -> bool:
    """Whether :func:`function` would return at once."""
    return (key, device) in _functions


def function(key: KernelKey, device: int) -> Any:
    """The compiled kernel for the current device, number `device`; compiled once a process and machine.

    Threads that ask for different kernels compile at the same time.
    """
    found = _functions.get((key, device))
    if found is None:
        with _lock:
            lock = _compiling.setdefault((key, device), threading.Lock())
        with lock:
            found = _functions.get((key, device))
            if found is None:
                found = _functions[key, device] = _compile(key)
    return found


def _compile(key: KernelKey) -> Any:
    cupy = import_module("cupy")
    module = cupy.RawModule(code=source(key.kind), options=options(key), backend="nvrtc")
    kernel = module.get_function(entry(key.kind))
    if key.kind in ("forward", "backward", "sum", "add"):
        # No more shared memory than the resident blocks need: the rest of the SM's memory is L1. What the driver
        # chooses by itself cost 1 to 3 % of the float32 forward on encoder_800x1333 and mask2former_1024 (H200). Not
        # for the sort: what it needs depends on S, which a key does not know.
        attributes = cupy.cuda.Device().attributes
        needed = key.min_blocks * (shared_bytes(key) + attributes["ReservedSharedMemoryPerBlock"])
        kernel.preferred_shared_memory_carveout = min(
            100, -(-100 * needed // attributes["MaxSharedMemoryPerMultiprocessor"])
        )
    return kernel
