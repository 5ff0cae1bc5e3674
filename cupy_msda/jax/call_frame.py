"""The C structs of XLA's foreign function interface: the members that a handler reads.

The layouts are those of ``xla/ffi/api/c_api.h``, versions 0.1 to 0.4 of the interface. XLA appends fields and keeps the
others in place, so what is read here is the same in each of them.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any, NamedTuple

_SPOKEN_VERSION = (0, 1)  # which XLA accepts as long as it keeps what is read here in its place
EXECUTE = 3  # the stage in which a handler computes
_METADATA = 1  # the extension by which XLA asks for a handler's metadata
_COMMAND_BUFFER_COMPATIBLE = 1
# XLA's number of each dtype.
DTYPES = {4: "int32", 5: "int64", 6: "uint8", 10: "float16", 11: "float32", 12: "float64", 16: "bfloat16"}
_INVALID_ARGUMENT, _RESOURCE_EXHAUSTED, _UNIMPLEMENTED, _INTERNAL = 3, 8, 12, 13
_CODES: tuple[tuple[type[BaseException], int], ...] = (
    (NotImplementedError, _UNIMPLEMENTED),
    (MemoryError, _RESOURCE_EXHAUSTED),
    (ValueError, _INVALID_ARGUMENT),
    (TypeError, _INVALID_ARGUMENT),
)

_address, _int, _size = ctypes.c_void_p, ctypes.c_int32, ctypes.c_int64


class _Struct(ctypes.Structure):
    """Every struct of the interface begins with its size and its extensions."""

    _fields_ = [("struct_size", _size), ("extension", _address)]


class _Buffers(_Struct):
    _fields_ = [("size", _size), ("types", _address), ("pointers", _address)]


class _Attributes(_Struct):
    _fields_ = [("size", _size), ("types", _address), ("names", _address), ("pointers", _address)]


class _CallFrame(_Struct):
    _fields_ = [
        ("api", _address),
        ("context", _address),
        ("stage", _int),
        ("arguments", _Buffers),
        ("results", _Buffers),
        ("attributes", _Attributes),
    ]


class _Buffer(_Struct):
    _fields_ = [("dtype", _int), ("data", _size), ("rank", _size), ("dimensions", _address)]


class _Bytes(ctypes.Structure):
    _fields_ = [("data", _address), ("size", _size)]


class _Version(_Struct):
    _fields_ = [("major", _int), ("minor", _int)]


class _Metadata(ctypes.Structure):
    _fields_ = [("struct_size", _size), ("version", _Version), ("traits", ctypes.c_uint32)]


class _MetadataExtension(ctypes.Structure):
    _fields_ = [("struct_size", _size), ("type", _int), ("next", _address), ("metadata", ctypes.POINTER(_Metadata))]


class _Api(_Struct):
    """The table of XLA's functions, by their names without ``XLA_FFI_``."""

    _fields_ = [
        ("version", _Version),
        ("internal", _address),
        ("Error_Create", _address),
        ("Error_GetMessage", _address),
        ("Error_Destroy", _address),
        ("Handler_Register", _address),
        ("Stream_Get", _address),
        ("Type_Register", _address),
        ("ExecutionContext_Get", _address),
        ("State_Set", _address),
        ("State_Get", _address),
        ("DeviceMemory_Allocate", _address),
        ("DeviceMemory_Free", _address),
        ("ThreadPool_Schedule", _address),
        ("ThreadPool_NumThreads", _address),
        ("Future_Create", _address),
        ("Future_SetAvailable", _address),
        ("Future_SetError", _address),
        ("RunId_Get", _address),
        ("DeviceOrdinal_Get", _address),
    ]


class _ErrorArguments(_Struct):
    _fields_ = [("message", ctypes.c_char_p), ("code", _int)]


class _StreamArguments(_Struct):
    _fields_ = [("context", _address), ("stream", _size)]


class _OrdinalArguments(_Struct):
    _fields_ = [("context", _address), ("ordinal", _int)]


class _AllocateArguments(_Struct):
    _fields_ = [("context", _address), ("size", _size), ("alignment", _size), ("data", _address)]


class _FreeArguments(_Struct):
    _fields_ = [("context", _address), ("size", _size), ("data", _address)]


class Buffer(NamedTuple):
    """Address, dtype and shape of one argument or result."""

    data: int
    dtype: str
    shape: tuple[int, ...]


class Functions:
    """XLA's functions at the address of their table."""

    def __init__(self, address: int) -> None:
        table = _Api.from_address(address)
        # These return at once: they keep the interpreter's lock.
        at_once, may_wait = ctypes.PYFUNCTYPE(_address, _address), ctypes.CFUNCTYPE(_address, _address)
        self.create_error = at_once(table.Error_Create)
        self.destroy_error = at_once(table.Error_Destroy)
        self.get_stream = at_once(table.Stream_Get)
        known = table.struct_size >= _Api.DeviceOrdinal_Get.offset + 8
        self.get_ordinal: Callable[[Any], Any] | None = at_once(table.DeviceOrdinal_Get) if known else None
        self.allocate = may_wait(table.DeviceMemory_Allocate)
        self.free = may_wait(table.DeviceMemory_Free)


_functions: dict[int, Functions] = {}


def _functions_at(address: int) -> Functions:
    found = _functions.get(address)
    if found is None:
        found = _functions[address] = Functions(address)
    return found


class _Request:
    """The arguments of the two functions that every call asks: laid out once, used by one call at a time."""

    def __init__(self) -> None:
        self.stream = _StreamArguments(struct_size=ctypes.sizeof(_StreamArguments))
        self.ordinal = _OrdinalArguments(struct_size=_OrdinalArguments.ordinal.offset + 4)
        self.at_stream, self.at_ordinal = ctypes.addressof(self.stream), ctypes.addressof(self.ordinal)


_requests: list[_Request] = []
# Of as many pointers as a call has arguments or results at most: made once, because that takes longer than to read one.
_ARRAYS = [_size * count for count in range(16)]


class CallFrame:
    """One call of a handler: its buffers, its attribute, and what XLA offers it."""

    __slots__ = ("_frame", "functions", "stage")

    def __init__(self, address: int) -> None:
        self._frame = frame = _CallFrame.from_address(address)
        self.stage = frame.stage
        self.functions = _functions.get(frame.api) or _functions_at(frame.api)

    def addresses(self) -> tuple[list[int], list[int]]:
        """Of the arguments, and of the results; 0 for an empty one."""
        frame, buffer = self._frame, _Buffer.from_address
        given, made = frame.arguments, frame.results
        return (
            [buffer(pointer).data for pointer in _ARRAYS[given.size].from_address(given.pointers)[:]],
            [buffer(pointer).data for pointer in _ARRAYS[made.size].from_address(made.pointers)[:]],
        )

    def arguments(self) -> list[Buffer]:
        return _described(self._frame.arguments)

    def results(self) -> list[Buffer]:
        return _described(self._frame.results)

    def attribute(self) -> bytes:
        """The one attribute, a string."""
        text = _Bytes.from_address(_size.from_address(self._frame.attributes.pointers).value)
        return ctypes.string_at(text.data, text.size)

    def stream_and_ordinal(self) -> tuple[int, int]:
        """Address of the CUDA stream that XLA runs this call on, and XLA's number of the device, or -1."""
        try:
            request = _requests.pop()
        except IndexError:
            request = _Request()
        functions, stream, ordinal = self.functions, request.stream, request.ordinal
        stream.context = ordinal.context = self._frame.context
        error = functions.get_stream(request.at_stream)
        if not error and functions.get_ordinal:
            error = functions.get_ordinal(request.at_ordinal)
        self._check(error, "stream and device")
        found = (stream.stream, ordinal.ordinal if functions.get_ordinal else -1)
        _requests.append(request)
        return found

    def allocate(self, nbytes: int) -> int:
        """Address of device memory from XLA's allocator, until :meth:`free`."""
        given = _AllocateArguments(
            struct_size=ctypes.sizeof(_AllocateArguments), context=self._frame.context, size=nbytes, alignment=256
        )
        if self._failed(self.functions.allocate(ctypes.addressof(given))):
            raise MemoryError(f"XLA has no {nbytes} bytes of device memory for the workspace of this backward")
        return given.data or 0

    def free(self, data: int, nbytes: int) -> None:
        given = _FreeArguments(
            struct_size=ctypes.sizeof(_FreeArguments), context=self._frame.context, size=nbytes, data=data
        )
        self._check(self.functions.free(ctypes.addressof(given)), "free")

    def error(self, exception: BaseException) -> int:
        """Address of an error of XLA with the message of `exception`."""
        code = next((code for kind, code in _CODES if isinstance(exception, kind)), _INTERNAL)
        message = (str(exception) or type(exception).__name__).encode()
        given = _ErrorArguments(struct_size=_ErrorArguments.code.offset + 4, message=message, code=code)
        return self.functions.create_error(ctypes.addressof(given))

    def _check(self, error: int | None, what: str) -> None:
        if error and self._failed(error):
            raise RuntimeError(f"XLA refused a handler's request: {what}")

    def _failed(self, error: int | None) -> bool:
        if not error:
            return False
        self.functions.destroy_error(ctypes.addressof(_FreeArguments(struct_size=24, context=error)))
        return True


def answer_metadata(address: int, in_command_buffers: bool) -> bool:
    """Whether the call of this frame asked for the handler's metadata, which are then given."""
    frame = _CallFrame.from_address(address)
    if not frame.extension:
        return False
    extension = _MetadataExtension.from_address(frame.extension)
    if extension.type != _METADATA:
        return False
    metadata = extension.metadata.contents
    metadata.version.major, metadata.version.minor = _SPOKEN_VERSION
    metadata.traits = _COMMAND_BUFFER_COMPATIBLE if in_command_buffers else 0
    return True


def _described(of: _Buffers) -> list[Buffer]:
    pointers = (_size * of.size).from_address(of.pointers) if of.size else ()
    return [_describe(_Buffer.from_address(pointer)) for pointer in pointers]


def _describe(buffer: _Buffer) -> Buffer:
    shape = tuple((_size * buffer.rank).from_address(buffer.dimensions)) if buffer.rank else ()
    return Buffer(buffer.data, DTYPES.get(buffer.dtype, f"XLA dtype {buffer.dtype}"), shape)
