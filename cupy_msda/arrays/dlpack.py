"""Reading a DLPack capsule without any framework.

The layouts are those of DLPack's ``dlpack.h``: version 1 (capsule name ``dltensor_versioned``) and version 0
(``dltensor``). Version 0 cannot say that memory is read-only, so producers refuse to export such memory by it.
"""

from __future__ import annotations

import ctypes
from typing import Any, NamedTuple

MAX_VERSION = (1, 0)
CPU, CUDA, CUDA_HOST, CUDA_MANAGED = 1, 2, 3, 13
# DLPack's number for CUDA's legacy default stream, whose address is 0.
LEGACY_STREAM = 1
# Stream addresses up to this one are CUDA's default streams, which cannot be captured.
LAST_DEFAULT_STREAM = 2
DEVICE_KINDS = {CPU: "cpu", CUDA: "cuda", CUDA_HOST: "cpu", CUDA_MANAGED: "cuda"}
_OTHER_DEVICES = {
    4: "OpenCL", 7: "Vulkan", 8: "Metal", 9: "VPI", 10: "ROCm", 11: "ROCm (host)", 14: "oneAPI", 15: "WebGPU",
    16: "Hexagon", 17: "MAIA",
}  # fmt: skip
_TYPE_CODES = {0: "int", 1: "uint", 2: "float", 4: "bfloat", 5: "complex"}
# The names of types that no path computes with; error messages have them.
_OTHER_TYPES = {
    3: "opaque handle", 6: "bool", 7: "float8_e3m4", 8: "float8_e4m3", 9: "float8_e4m3b11fnuz", 10: "float8_e4m3fn",
    11: "float8_e4m3fnuz", 12: "float8_e5m2", 13: "float8_e5m2fnuz", 14: "float8_e8m0fnu", 15: "float6_e2m3fn",
    16: "float6_e3m2fn", 17: "float4_e2m1fn",
}  # fmt: skip


class _Device(ctypes.Structure):
    _fields_ = [("type", ctypes.c_int32), ("id", ctypes.c_int32)]


class _DataType(ctypes.Structure):
    _fields_ = [("code", ctypes.c_uint8), ("bits", ctypes.c_uint8), ("lanes", ctypes.c_uint16)]


class _Tensor(ctypes.Structure):
    _fields_ = [
        ("data", ctypes.c_void_p),
        ("device", _Device),
        ("ndim", ctypes.c_int32),
        ("dtype", _DataType),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    ]


class _VersionedTensor(ctypes.Structure):
    _fields_ = [
        ("major", ctypes.c_uint32),
        ("minor", ctypes.c_uint32),
        ("manager", ctypes.c_void_p),
        ("deleter", ctypes.c_void_p),
        ("flags", ctypes.c_uint64),
        ("tensor", _Tensor),
    ]


# The deleter stays with the capsule and runs when the capsule is collected. So the reader of an address keeps the
# capsule as long as the address is used.
_get_pointer = ctypes.pythonapi.PyCapsule_GetPointer
_get_pointer.restype = ctypes.c_void_p
_get_pointer.argtypes = [ctypes.py_object, ctypes.c_char_p]
_get_name = ctypes.pythonapi.PyCapsule_GetName
_get_name.restype = ctypes.c_char_p
_get_name.argtypes = [ctypes.py_object]


class DLTensor(NamedTuple):
    """The contents of a capsule: address, shape, strides in elements, dtype name, device."""

    data: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: str
    device: tuple[str, int]


def capsule_of(array: Any, **options: Any) -> Any:
    """What ``array.__dlpack__`` exports, by the newest version that both sides know."""
    try:
        return array.__dlpack__(**options, max_version=MAX_VERSION)
    except TypeError:  # a producer of version 0, which has no such parameter
        return array.__dlpack__(**options)


def read_capsule(capsule: Any) -> DLTensor:
    """Decode `capsule`; raise ``TypeError`` for a device that is neither CPU nor CUDA."""
    tensor = _tensor_in(capsule)
    kind = DEVICE_KINDS.get(tensor.device.type)
    if kind is None:
        other = _OTHER_DEVICES.get(tensor.device.type, f"DLPack device {tensor.device.type}")
        raise TypeError(f"expected an array on the CPU or a CUDA device, got one on {other}: copy it to the CPU")
    ndim = tensor.ndim
    shape = tuple(tensor.shape[:ndim])
    strides = tuple(tensor.strides[:ndim]) if tensor.strides else contiguous_strides(shape)
    device_id = tensor.device.id if kind == "cuda" else 0
    return DLTensor(
        (tensor.data or 0) + tensor.byte_offset, shape, strides, _dtype_name(tensor.dtype), (kind, device_id)
    )


def _tensor_in(capsule: Any) -> _Tensor:
    if _get_name(capsule) == b"dltensor":
        return _Tensor.from_address(_get_pointer(capsule, b"dltensor"))
    versioned = _VersionedTensor.from_address(_get_pointer(capsule, b"dltensor_versioned"))
    if versioned.major > MAX_VERSION[0]:  # the layout after `major` is unknown
        raise TypeError(f"expected an export by DLPack 0 or 1, got one by {versioned.major}.{versioned.minor}")
    return versioned.tensor


def _dtype_name(dtype: _DataType) -> str:
    name = f"{_TYPE_CODES[dtype.code]}{dtype.bits}" if dtype.code in _TYPE_CODES else _OTHER_TYPES.get(dtype.code)
    if name is None:
        name = f"DLPack type {dtype.code} of {dtype.bits} bits"
    return name if dtype.lanes == 1 else f"{name} x {dtype.lanes}"


def contiguous_strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Strides, in elements, of a C-contiguous array of `shape`."""
    strides, stride = [], 1
    for size in reversed(shape):
        strides.append(stride)
        stride *= max(size, 1)
    return tuple(reversed(strides))
