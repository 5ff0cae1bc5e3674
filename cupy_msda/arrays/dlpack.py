"""Reading a DLPack capsule without any framework.

The layouts are those of DLPack's ``dlpack.h`` (version 0.x, capsule name ``dltensor``), which every framework still
returns where no ``max_version`` is asked for.
"""

from __future__ import annotations

import ctypes
from typing import Any, NamedTuple

CPU, CUDA, CUDA_HOST, CUDA_MANAGED = 1, 2, 3, 13
# DLPack's number for CUDA's legacy default stream, whose address is 0.
LEGACY_STREAM = 1
# Stream addresses up to this one are CUDA's default streams, which cannot be captured.
LAST_DEFAULT_STREAM = 2
DEVICE_KINDS = {CPU: "cpu", CUDA: "cuda", CUDA_HOST: "cpu", CUDA_MANAGED: "cuda"}
_TYPE_CODES = {0: "int", 1: "uint", 2: "float", 4: "bfloat", 5: "complex"}


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


# The deleter stays with the capsule and runs when the capsule is collected. So the reader of an address keeps the
# capsule as long as the address is used.
_get_pointer = ctypes.pythonapi.PyCapsule_GetPointer
_get_pointer.restype = ctypes.c_void_p
_get_pointer.argtypes = [ctypes.py_object, ctypes.c_char_p]


class DLTensor(NamedTuple):
    """The contents of a capsule: address, shape, strides in elements, dtype name, device."""

    data: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: str
    device: tuple[str, int]


def read_capsule(capsule: Any) -> DLTensor:
    """Decode `capsule` (named ``dltensor``); raise ``TypeError`` for a device that is neither CPU nor CUDA."""
    tensor = _Tensor.from_address(_get_pointer(capsule, b"dltensor"))
    kind = DEVICE_KINDS.get(tensor.device.type)
    if kind is None:
        raise TypeError(f"expected an array on the CPU or a CUDA device, got DLPack device {tensor.device.type}")
    ndim = tensor.ndim
    shape = tuple(tensor.shape[:ndim])
    strides = tuple(tensor.strides[:ndim]) if tensor.strides else contiguous_strides(shape)
    code = _TYPE_CODES.get(tensor.dtype.code, f"code{tensor.dtype.code}_")
    device_id = tensor.device.id if kind == "cuda" else 0
    return DLTensor(
        (tensor.data or 0) + tensor.byte_offset, shape, strides, f"{code}{tensor.dtype.bits}", (kind, device_id)
    )


def contiguous_strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Strides, in elements, of a C-contiguous array of `shape`."""
    strides, stride = [], 1
    for size in reversed(shape):
        strides.append(stride)
        stride *= max(size, 1)
    return tuple(reversed(strides))
