"""From a KernelKey to a compiled function: source, options, NVRTC. The only user of ``cupy.RawModule``."""

from __future__ import annotations

import functools
import threading
from importlib import import_module
from pathlib import Path
from typing import Any

from .plan import KernelKey, shared_bytes

_MACRO_OF_DTYPE = {"float16": "F16", "bfloat16": "BF16", "float32": "F32", "float64": "F64"}
_TYPES = ("common/dtypes.cuh",)
_COMMON = (*_TYPES, *(f"common/{name}.cuh" for name in ("levels", "tiling", "bilinear", "work", "samples")))
_SORTED = (*_COMMON, "sorted/buckets.cuh")
# What each kernel is made of, in this order.
_FILES = {
    "forward": (
        *_COMMON, "common/warp_work.cuh", "common/masked_samples.cuh", "common/vector_samples.cuh", "forward.cu"
    ),
    "backward": (
        *_COMMON, "common/atomics.cuh", "common/products.cuh", "common/sample_gradients.cuh", "backward.cu"
    ),
    "round": (*_TYPES, "epilogue/cast.cu"),
    "sort": (*_SORTED, "sorted/bucket_sort.cu"),
    "count": (*_SORTED, "sorted/split_buckets.cu"),
    "sum": (*_SORTED, "sorted/block_reduce.cu"),
    "add": (*_SORTED, "sorted/warp_reduce.cu"),
    "expand": (*_COMMON, "sorted/materialise.cu"),
    "references": (*_TYPES, "epilogue/reduce_references.cu"),
}  # fmt: skip
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


def source_files(folder: Path, kind: str) -> list[Path]:
    """The files in `folder` that a kernel is made of, in their order."""
    return [folder / name for name in _FILES[kind]]


@functools.cache
def source(kind: str) -> str:
    """One self-contained source: CuPy's disk cache hashes this text, but not the files that it would include."""
    return "\n".join(file.read_text() for file in source_files(source_folder(), kind))


def options(key: KernelKey) -> tuple[str, ...]:
    """NVRTC options that turn the source into this specialisation."""
    macros = dict(key.macros())
    dtypes = {"VALUE": key.value_dtype, "LOCATION": key.location_dtype, "REFERENCE": key.reference_dtype}
    for role, dtype in dtypes.items():
        for name, macro in _MACRO_OF_DTYPE.items():
            macros[f"MSDA_{role}_{macro}"] = int(name == dtype)
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
    kernel = module.get_function(f"msda_{key.kind}")
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
