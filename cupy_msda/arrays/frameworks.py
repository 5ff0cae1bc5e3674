"""One class per framework: how its arrays are read, where its results go, and which stream its work runs on.

A framework is recognised through ``sys.modules``: the caller who has an array of it has imported it. So nothing is
imported here. NumPy and CuPy arrays are read by their own address, all others through DLPack.
"""

from __future__ import annotations

import sys
from typing import Any

import numpy as np

from .convert import require_cupy, storage_dtype, to_cupy, to_numpy
from .dlpack import DEVICE_KINDS, LEGACY_STREAM, capsule_of, contiguous_strides, read_capsule
from .views import Device, View
from .xla import xla_wants_determinism


class Framework:
    """How the arrays of one framework are read and made. This class serves every DLPack producer."""

    name = "DLPack"

    def view(self, array: Any) -> View:
        """The array's address and layout. The caller's current stream waits for that of the producer, if any."""
        kind, device = array.__dlpack_device__()
        if DEVICE_KINDS.get(int(kind)) == "cuda":
            capsule = capsule_of(array, stream=self.stream(("cuda", device)) or LEGACY_STREAM)
        else:
            capsule = capsule_of(array)
        return View(*read_capsule(capsule), self, array, capsule)

    def metadata(self, array: Any) -> Any:
        """Metadata, which the caller may have on any device, where it can be read."""
        return array

    def stream(self, device: Device) -> int:
        """Address of the caller's current stream on `device`."""
        return require_cupy("this array").cuda.get_current_stream(device[1]).ptr

    def wants_determinism(self) -> bool:
        """Whether the framework's own switch asks for deterministic algorithms."""
        return False

    def threads(self) -> int | None:
        """How many threads the framework would use on the CPU, where it has a setting of its own."""
        return None

    def contiguous(self, view: View) -> View:
        """A C-contiguous copy of `view` on its own device, made on the caller's current stream."""
        cupy = require_cupy("this array")
        with cupy.cuda.Device(view.device[1]):
            copied = cupy.array(to_cupy(view), order="C")
        return View(copied.data.ptr, view.shape, contiguous_strides(view.shape), view.dtype, view.device, self, copied)

    def int64_on_cuda(self, metadata: View | np.ndarray, device: Device) -> tuple[int, Any]:
        """Integer metadata of any framework as contiguous int64 on `device`: its address, and who owns the memory."""
        cupy = require_cupy("this array")
        if isinstance(metadata, View):  # by the host from another GPU, whose memory a kernel may not read
            metadata = to_cupy(metadata) if metadata.device == device else to_numpy(metadata)
        with cupy.cuda.Device(device[1]):
            array = cupy.ascontiguousarray(cupy.asarray(metadata), dtype=np.int64)
        return array.data.ptr, array

    def empty_cuda(self, shape: tuple[int, ...], dtype: str, device: Device) -> tuple[int, Any]:
        """Uninitialised device memory: its address, and the array that :meth:`finish` turns into a result."""
        cupy = require_cupy("this array")
        with cupy.cuda.Device(device[1]):
            array = cupy.empty(shape, storage_dtype(dtype))
        return array.data.ptr, array

    def finish(self, array: Any, dtype: str, like: Any) -> Any:
        """The result that :meth:`empty_cuda` allocated, as an array of the framework of `like`."""
        from_dlpack = _from_dlpack_of(like)
        if from_dlpack is None or dtype == "bfloat16":
            return array
        return from_dlpack(array)

    def from_numpy(self, array: np.ndarray, dtype: str, like: Any) -> Any:
        """The result of the NumPy path as an array of the framework of `like`; bfloat16 comes as its uint16 bits."""
        return self.finish(array, dtype, like)


class NumPyFramework(Framework):
    name = "NumPy"

    def view(self, array: Any) -> View:
        masked = sys.modules.get("numpy.ma")
        if masked is not None and isinstance(array, masked.MaskedArray):
            raise TypeError("expected an array without a mask, got a MaskedArray: fill it and pass numpy.asarray of it")
        array = np.asarray(array)  # without the arithmetic of a subclass
        if not array.dtype.isnative:
            raise TypeError(f"expected an array in native byte order, got dtype {array.dtype.str}")
        size = max(array.itemsize, 1)
        if any(stride % size for stride in array.strides):
            array = np.ascontiguousarray(array)
        strides = tuple(stride // size for stride in array.strides)
        return View(array.ctypes.data, array.shape, strides, array.dtype.name, ("cpu", 0), self, array)

    def finish(self, array: Any, dtype: str, like: Any) -> Any:
        return array.view(like.dtype) if dtype == "bfloat16" else array


class CuPyFramework(Framework):
    name = "CuPy"

    def view(self, array: Any) -> View:
        if sys.modules["cupy"].cuda.runtime.is_hip:
            raise TypeError("expected an array on a CUDA device, got one on a GPU of ROCm: copy it with .get()")
        strides = tuple(stride // array.itemsize for stride in array.strides)
        return View(array.data.ptr, array.shape, strides, array.dtype.name, ("cuda", array.device.id), self, array)

    def finish(self, array: Any, dtype: str, like: Any) -> Any:
        return array.view(like.dtype) if dtype == "bfloat16" else array


class TorchFramework(Framework):
    name = "torch"

    def view(self, array: Any) -> View:
        # `to_dlpack` synchronises no streams, and need not: the work runs on torch's own current stream.
        torch = _torch()
        if not self._reads(array.device):
            where = f"{array.device} (ROCm)" if array.is_cuda else array.device
            raise TypeError(
                f"expected a tensor on the CPU or a CUDA device, got one on {where}: copy it with .cpu(), or call the "
                "function of cupy_msda.torch, which takes tensors on any device"
            )
        if array.layout != torch.strided or array.is_nested:
            layout = "nested" if array.is_nested else array.layout
            raise TypeError(f"expected a strided tensor, got one of layout {layout}: make it dense before the call")
        if type(array).__torch_dispatch__ is not torch.Tensor.__torch_dispatch__:
            raise TypeError(
                f"expected a tensor with memory of its own, got {type(array).__name__}: call the function of "
                "cupy_msda.torch, or pass the tensors that it is made of"
            )
        try:
            capsule = torch.utils.dlpack.to_dlpack(self._elements_of(array.detach()))
        except BufferError as error:
            raise TypeError(f"expected a tensor of numbers, got {array.dtype}: {error}") from error
        tensor = read_capsule(capsule)._replace(dtype=str(array.dtype).removeprefix("torch."))
        return View(*tensor, self, array, capsule)

    def metadata(self, array: Any) -> Any:
        return array if self._reads(array.device) or array.is_meta else array.cpu()

    def _reads(self, device: Any) -> bool:
        """Whether kernels read the memory of a device of torch, which calls the GPUs of ROCm "cuda" too."""
        return device.type == "cpu" or (device.type == "cuda" and _torch().version.hip is None)

    @staticmethod
    def _elements_of(array: Any) -> Any:
        """`array` in memory that holds its elements: without a pending negation, and no symbolic zeros."""
        refusal = TypeError(
            "expected a tensor with memory, got one inside a transformation (torch.func or torch.compile): call the "
            "function of cupy_msda.torch"
        )
        array = array.resolve_neg()
        try:
            if array.data_ptr() or not array.numel():
                return array
            array = array.clone()
            if array.data_ptr():
                return array
        except RuntimeError as error:
            raise refusal from error
        raise refusal

    def stream(self, device: Device) -> int:
        # The private function is the one that torch's own compiler calls. The public one makes a stream object in each
        # call, which is slower.
        torch = _torch()
        raw_stream = getattr(torch._C, "_cuda_getCurrentRawStream", None)
        return raw_stream(device[1]) if raw_stream else torch.cuda.current_stream(device[1]).cuda_stream

    def wants_determinism(self) -> bool:
        return _torch().are_deterministic_algorithms_enabled()

    def threads(self) -> int | None:
        return _torch().get_num_threads()

    # Memory comes from torch's own allocator, which is correct on side streams and inside CUDA graphs.
    def contiguous(self, view: View) -> View:
        torch = _torch()
        return self.view(view.array.detach().clone(memory_format=torch.contiguous_format))

    def int64_on_cuda(self, metadata: View | np.ndarray, device: Device) -> tuple[int, Any]:
        torch = _torch()
        if isinstance(metadata, View) and metadata.framework is not self:
            return super().int64_on_cuda(metadata, device)
        array = metadata.array if isinstance(metadata, View) else torch.from_numpy(metadata)
        array = array.to(torch.device(*device), torch.int64).contiguous()
        return array.data_ptr(), array

    def empty_cuda(self, shape: tuple[int, ...], dtype: str, device: Device) -> tuple[int, Any]:
        torch = _torch()
        array = torch.empty(shape, dtype=getattr(torch, dtype), device=torch.device(*device))
        return array.data_ptr(), array

    def finish(self, array: Any, dtype: str, like: Any) -> Any:
        return array

    def from_numpy(self, array: np.ndarray, dtype: str, like: Any) -> Any:
        torch = _torch()
        if dtype == "bfloat16":
            return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
        return torch.from_numpy(array)


class JaxFramework(Framework):
    name = "JAX"

    def view(self, array: Any) -> View:
        if isinstance(array, sys.modules["jax"].core.Tracer):
            raise TypeError("expected a concrete JAX array, got a tracer: call the function of cupy_msda.jax")
        if not hasattr(array, "__dlpack__"):
            raise TypeError(f"expected a JAX array of numbers, got dtype {array.dtype}")
        if array.is_deleted():
            raise TypeError("expected a JAX array with data, got one whose buffer was donated or deleted")
        return super().view(array)

    def wants_determinism(self) -> bool:
        return xla_wants_determinism()

    def finish(self, array: Any, dtype: str, like: Any) -> Any:
        jnp = sys.modules["jax"].numpy
        result = jnp.from_dlpack(array)
        return result.view(jnp.bfloat16) if dtype == "bfloat16" else result


_DLPACK = Framework()
# Top-level module, name of its array type, and the Framework.
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
        When it is no array of a DLPack framework, or is on a device that is neither CPU nor CUDA.
    """
    framework = framework_of(array)
    if framework is None:
        raise TypeError(
            f"{name}: expected an array (NumPy, CuPy, torch, JAX or any with __dlpack__), got {type(array).__name__}"
        )
    try:
        return framework.view(array)
    except (TypeError, BufferError) as error:
        raise TypeError(f"{name}: {error}") from error


def view_metadata(name: str, array: Any) -> View:
    """The :class:`View` of metadata, after a copy to the host from a device without kernels."""
    framework = framework_of(array)
    return view(name, array if framework is None else framework.metadata(array))


def tracks_gradient(array: Any) -> bool:
    """True for a torch tensor through which autograd would record this call."""
    if not isinstance(framework_of(array), TorchFramework):
        return False
    return array.requires_grad and _torch().is_grad_enabled()


def _torch() -> Any:
    """The module torch, which the caller has imported."""
    return sys.modules["torch"]


def _from_dlpack_of(array: Any) -> Any:
    """``from_dlpack`` of the library that made `array`, or None where it does not say."""
    if hasattr(array, "__array_namespace__"):
        return getattr(array.__array_namespace__(), "from_dlpack", None)
    module = sys.modules.get(type(array).__module__.partition(".")[0])
    return getattr(module, "from_dlpack", None)
