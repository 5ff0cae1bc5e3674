"""Arrays of any framework in, arrays of the same framework out, on the caller's device and stream.

Frameworks are recognised through ``sys.modules``: whoever passes a tensor has imported its framework, so
nothing is imported here to find out. Inputs are handed over without a copy, as a :class:`View`: NumPy and
CuPy arrays by their own address, everything else through DLPack.
"""

from __future__ import annotations

import importlib
import sys
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import numpy as np

from .dlpack import DEVICE_KINDS, contiguous_strides, read_capsule

Device = tuple[str, int]
LEGACY_STREAM = 1  # DLPack's number for CUDA's default stream, which has address 0
LAST_DEFAULT_STREAM = 2  # addresses 0, 1, 2: the default streams, which cannot be captured
_ITEM_SIZE = {"float16": 2, "bfloat16": 2, "float32": 4, "float64": 8}
INSTALL_CUPY = "pip install 'cupy-msda[cuda13]' (or [cuda12], to match the driver)"


@dataclass(frozen=True)
class View:
    """One array as the computation sees it: an address and a layout. Strides count elements.

    `array` is the caller's; together with `capsule` it keeps the memory alive.
    """

    data: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: str
    device: Device
    framework: Framework
    array: Any = field(repr=False)
    capsule: Any = field(default=None, repr=False)

    @property
    def contiguous(self) -> bool:
        wanted = contiguous_strides(self.shape)
        sizes = zip(self.shape, self.strides, wanted, strict=True)
        return 0 in self.shape or all(n == 1 or have == want for n, have, want in sizes)


class Framework:
    """Where arrays come from and how results go back. This class serves every DLPack producer."""

    name = "DLPack"

    def view(self, array: Any) -> View:
        """The array's address and layout; a producer with streams of its own makes ours wait for it."""
        kind, device = array.__dlpack_device__()
        if DEVICE_KINDS.get(int(kind)) == "cuda":
            capsule = array.__dlpack__(stream=self.stream(("cuda", device)) or LEGACY_STREAM)
        else:
            capsule = array.__dlpack__()
        return View(*read_capsule(capsule), self, array, capsule)

    def stream(self, device: Device) -> int:
        """Address of the caller's current stream on `device`."""
        return require_cupy("this array").cuda.get_current_stream(device[1]).ptr

    def wants_determinism(self) -> bool:
        """Whether the framework's user has asked for deterministic algorithms everywhere."""
        return False

    def contiguous(self, view: View) -> View:
        """A C-contiguous copy of `view` on its own device, made on the caller's current stream."""
        cupy = require_cupy("this array")
        with cupy.cuda.Device(view.device[1]):
            copied = cupy.array(to_cupy(view), order="C")
        return View(copied.data.ptr, view.shape, contiguous_strides(view.shape), view.dtype, view.device, self, copied)

    def int64_on_cuda(self, metadata: View | np.ndarray, device: Device) -> tuple[int, Any]:
        """Integer metadata from anywhere as contiguous int64 on `device`: its address, and what keeps it alive."""
        cupy = require_cupy("this array")
        if isinstance(metadata, View):
            metadata = to_cupy(metadata) if metadata.device[0] == "cuda" else to_numpy(metadata)
        with cupy.cuda.Device(device[1]):
            array = cupy.ascontiguousarray(cupy.asarray(metadata), dtype=np.int64)
        return array.data.ptr, array

    def empty_cuda(self, shape: tuple[int, ...], dtype: str, device: Device) -> tuple[int, Any]:
        """Uninitialised device memory: its address, and the array that :meth:`finish` turns into a result."""
        cupy = require_cupy("this array")
        with cupy.cuda.Device(device[1]):
            array = cupy.empty(shape, _storage_dtype(dtype))
        return array.data.ptr, array

    def finish(self, array: Any, dtype: str, like: Any) -> Any:
        """Hand a result made by :meth:`empty_cuda` (CuPy) or by the NumPy path to the caller's framework."""
        from_dlpack = _namespace_of(like)
        if from_dlpack is None or dtype == "bfloat16":
            return array
        return from_dlpack(array)

    def from_numpy(self, array: np.ndarray, dtype: str, like: Any) -> Any:
        return self.finish(array, dtype, like)


class NumPyFramework(Framework):
    name = "NumPy"

    def view(self, array: Any) -> View:
        if not array.dtype.isnative:
            raise TypeError(f"expected an array in native byte order, got dtype {array.dtype.str}")
        size = max(array.itemsize, 1)
        if any(step % size for step in array.strides):
            array = np.ascontiguousarray(array)
        strides = tuple(step // size for step in array.strides)
        return View(array.ctypes.data, array.shape, strides, array.dtype.name, ("cpu", 0), self, array)

    def finish(self, array: Any, dtype: str, like: Any) -> Any:
        return array.view(like.dtype) if dtype == "bfloat16" else array


class CuPyFramework(Framework):
    name = "CuPy"

    def view(self, array: Any) -> View:
        strides = tuple(step // array.itemsize for step in array.strides)
        return View(array.data.ptr, array.shape, strides, array.dtype.name, ("cuda", array.device.id), self, array)

    def finish(self, array: Any, dtype: str, like: Any) -> Any:
        return array.view(like.dtype) if dtype == "bfloat16" else array


class TorchFramework(Framework):
    name = "torch"

    def view(self, array: Any) -> View:
        # to_dlpack has no stream handshake, and needs none: the work runs on torch's own current stream.
        torch = sys.modules["torch"]
        if array.device.type not in ("cpu", "cuda") or array.layout != torch.strided:
            raise TypeError(
                f"expected a strided tensor on the CPU or a CUDA device, got {array.layout} on {array.device}"
            )
        capsule = torch.utils.dlpack.to_dlpack(array.detach())
        return View(*read_capsule(capsule), self, array, capsule)

    def stream(self, device: Device) -> int:
        # What torch's own compiler calls; `torch.cuda.current_stream` makes a stream object, for 30 times the time.
        return sys.modules["torch"]._C._cuda_getCurrentRawStream(device[1])

    def wants_determinism(self) -> bool:
        return sys.modules["torch"].are_deterministic_algorithms_enabled()

    # Copies come from torch's own allocator, which keeps them right on side streams and inside CUDA graphs.
    def contiguous(self, view: View) -> View:
        torch = sys.modules["torch"]
        return self.view(view.array.detach().clone(memory_format=torch.contiguous_format))

    def int64_on_cuda(self, metadata: View | np.ndarray, device: Device) -> tuple[int, Any]:
        torch = sys.modules["torch"]
        if isinstance(metadata, View) and metadata.framework is not self:
            return super().int64_on_cuda(metadata, device)
        array = metadata.array if isinstance(metadata, View) else torch.from_numpy(metadata)
        array = array.to(torch.device(*device), torch.int64).contiguous()
        return array.data_ptr(), array

    def empty_cuda(self, shape: tuple[int, ...], dtype: str, device: Device) -> tuple[int, Any]:
        torch = sys.modules["torch"]
        array = torch.empty(shape, dtype=getattr(torch, dtype), device=torch.device(*device))
        return array.data_ptr(), array

    def finish(self, array: Any, dtype: str, like: Any) -> Any:
        return array

    def from_numpy(self, array: np.ndarray, dtype: str, like: Any) -> Any:
        torch = sys.modules["torch"]
        if dtype == "bfloat16":
            return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
        return torch.from_numpy(array)


class JaxFramework(Framework):
    name = "JAX"

    def view(self, array: Any) -> View:
        if isinstance(array, sys.modules["jax"].core.Tracer):
            raise TypeError("expected a concrete JAX array, got a tracer: call this outside jit, grad and vmap")
        return super().view(array)

    def finish(self, array: Any, dtype: str, like: Any) -> Any:
        jnp = sys.modules["jax"].numpy
        result = jnp.from_dlpack(array)
        return result.view(jnp.bfloat16) if dtype == "bfloat16" else result


_DLPACK = Framework()
# Top-level module of the framework, where its array type is found, and its Framework.
_KNOWN = (
    ("numpy", "ndarray", NumPyFramework()),
    ("torch", "Tensor", TorchFramework()),
    ("cupy", "ndarray", CuPyFramework()),
    ("jax", "Array", JaxFramework()),
)


def framework_of(array: Any) -> Framework | None:
    """The framework whose array this is, or None for something that is no array."""
    for module_name, type_name, framework in _KNOWN:
        array_type = getattr(sys.modules.get(module_name), type_name, None)
        if array_type is not None and isinstance(array, array_type):
            return framework
    if hasattr(array, "__dlpack__") and hasattr(array, "__dlpack_device__"):
        return _DLPACK
    return None


def view(name: str, array: Any) -> View:
    """The :class:`View` of the argument called `name`.

    Raises
    ------
    TypeError
        When it is no array of a DLPack framework, or lies on a device that is neither CPU nor CUDA.
    """
    framework = framework_of(array)
    if framework is None:
        raise TypeError(
            f"{name}: expected an array (NumPy, CuPy, torch, JAX or any with __dlpack__), got {type(array).__name__}"
        )
    try:
        return framework.view(array)
    except TypeError as error:
        raise TypeError(f"{name}: {error}") from error


def tracks_gradient(array: Any) -> bool:
    """True for a torch tensor that autograd would follow through this call."""
    torch = sys.modules.get("torch")
    return isinstance(array, getattr(torch, "Tensor", ())) and array.requires_grad and torch.is_grad_enabled()


def to_numpy(source: View) -> np.ndarray:
    """The array itself on the CPU, without a copy; bfloat16 as its uint16 bits. A CUDA array is read back."""
    if source.device[0] == "cuda":
        return to_cupy(source).get()
    if isinstance(source.array, np.ndarray):
        return source.array.view(np.uint16) if source.dtype == "bfloat16" else source.array
    dtype = _storage_dtype(source.dtype)
    if 0 in source.shape:
        return np.empty(source.shape, dtype)
    return np.asarray(_ArrayInterface(source, dtype))


def to_cupy(source: View) -> Any:
    """A CuPy array over the same device memory, without a copy; bfloat16 as its uint16 bits."""
    cupy = require_cupy("an array on a CUDA device")
    dtype = _storage_dtype(source.dtype)
    if isinstance(source.array, cupy.ndarray):
        return source.array.view(dtype) if source.dtype == "bfloat16" else source.array
    if 0 in source.shape:
        return cupy.empty(source.shape, dtype)
    span = sum((n - 1) * step for n, step in zip(source.shape, source.strides, strict=True)) + 1
    memory = cupy.cuda.UnownedMemory(source.data, span * dtype.itemsize, source.array, source.device[1])
    strides = tuple(step * dtype.itemsize for step in source.strides)
    return cupy.ndarray(source.shape, dtype, cupy.cuda.MemoryPointer(memory, 0), strides)


def require_cupy(what: str) -> ModuleType:
    """CuPy, or a ``RuntimeError`` that names the command that installs it."""
    try:
        return importlib.import_module("cupy")
    except ImportError as error:
        raise RuntimeError(f"{what} needs CuPy, which is not installed: {INSTALL_CUPY}") from error


def cuda_unavailable() -> str | None:
    """Why nothing can run on a GPU here, or None."""
    try:
        cupy = require_cupy("the CUDA path")
    except RuntimeError as error:
        return str(error)
    try:
        count = cupy.cuda.runtime.getDeviceCount()
    except cupy.cuda.runtime.CUDARuntimeError as error:
        return f"CuPy finds no usable CUDA device: {error}"
    return None if count else "CuPy finds no CUDA device"


def item_size(dtype: str) -> int:
    """Bytes of one element of a dtype that the operator supports."""
    return _ITEM_SIZE[dtype]


class _ArrayInterface:
    """What ``np.asarray`` needs to see foreign memory; keeps its owner alive."""

    def __init__(self, source: View, dtype: np.dtype) -> None:
        self.source = source
        self.__array_interface__ = {
            "version": 3,
            "shape": source.shape,
            "typestr": dtype.str,
            "data": (source.data, False),
            "strides": tuple(step * dtype.itemsize for step in source.strides),
        }


def _storage_dtype(dtype: str) -> np.dtype:
    return np.dtype(np.uint16 if dtype == "bfloat16" else dtype)


def _namespace_of(array: Any) -> Any:
    """``from_dlpack`` of the library that made `array`, or None where it does not say."""
    if hasattr(array, "__array_namespace__"):
        return getattr(array.__array_namespace__(), "from_dlpack", None)
    module = sys.modules.get(type(array).__module__.partition(".")[0])
    return getattr(module, "from_dlpack", None)
