"""Reading what DLPack hands over, a capsule or a bare ``DLTensor``, without any framework.

The layouts are those of DLPack's ``dlpack.h`` (version 0.x, capsule name ``dltensor``), which every
framework still hands out when no ``max_version`` is asked for.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any, NamedTuple

CPU, CUDA, CUDA_HOST, CUDA_MANAGED = 1, 2, 3, 13
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


# The deleter stays with the capsule: it runs when the capsule is collected, so whoever reads an address
# keeps the capsule for as long as the address is used.
_get_pointer = ctypes.pythonapi.PyCapsule_GetPointer
_get_pointer.restype = ctypes.c_void_p
_get_pointer.argtypes = [ctypes.py_object, ctypes.c_char_p]


class DLTensor(NamedTuple):
    """What a capsule says: address, shape, strides in elements, dtype name, device."""

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
    strides, step = [], 1
    for size in reversed(shape):
        strides.append(step)
        step *= max(size, 1)
    return tuple(reversed(strides))


class _ExchangeApi(ctypes.Structure):
    """``DLPackExchangeAPI`` of DLPack 1.3: C functions that a framework's array type offers beside its methods."""

    _fields_ = [
        ("major", ctypes.c_uint32),
        ("minor", ctypes.c_uint32),
        ("previous", ctypes.c_void_p),
        ("managed_tensor_allocator", ctypes.c_void_p),
        ("managed_tensor_from_object", ctypes.c_void_p),
        ("managed_tensor_to_object", ctypes.c_void_p),
        ("tensor_from_object", ctypes.c_void_p),
        ("current_work_stream", ctypes.c_void_p),
    ]


TENSOR_BYTES = ctypes.sizeof(_Tensor)


def tensor_reader(array_type: type) -> Callable[[Any, int], int] | None:
    """The C function of `array_type` that writes the ``DLTensor`` of an array to an address, or None.

    Nothing is owned by what it writes: it holds as long as the array does. It costs a third of a capsule.
    """
    capsule = getattr(array_type, "__dlpack_c_exchange_api__", None)
    if capsule is None:
        return None
    api = _ExchangeApi.from_address(_get_pointer(capsule, b"dlpack_exchange_api"))
    if api.major != 1 or not api.tensor_from_object:
        return None
    return ctypes.PYFUNCTYPE(ctypes.c_int, ctypes.py_object, ctypes.c_void_p)(api.tensor_from_object)
