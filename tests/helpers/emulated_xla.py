"""XLA on an emulated GPU: call frames as XLA makes them, with a table of functions, for the handlers of JAX."""

import ctypes

import numpy as np

from cupy_msda.jax import call_frame, cuda_calls, handler
from cupy_msda.jax.operation import Operation

_DTYPES = {name: number for number, name in call_frame.DTYPES.items()}
_KINDS = {
    "Error_Create": call_frame._ErrorArguments,
    "Error_Destroy": call_frame._FreeArguments,
    "Stream_Get": call_frame._StreamArguments,
    "DeviceMemory_Allocate": call_frame._AllocateArguments,
    "DeviceMemory_Free": call_frame._FreeArguments,
    "DeviceOrdinal_Get": call_frame._OrdinalArguments,
}
_ERROR = 0xE0


class EmulatedXla:
    """`error` is the last one that a handler made; `allocated` are the workspaces that have not been freed."""

    def __init__(self, gpu, device=0, sized=True):
        self.sized = sized
        self.gpu, self.device, self.error, self.allocated, self.requested = gpu, device, None, {}, 0
        self._functions = []
        self.api = call_frame._Api(struct_size=ctypes.sizeof(call_frame._Api))
        self.api.version.minor = 1
        for name, kind in _KINDS.items():
            answer = getattr(self, f"_{name}")
            function = call_frame.ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.POINTER(kind))(
                lambda given, answer=answer: answer(given.contents)
            )
            self._functions.append(function)
            setattr(self.api, name, ctypes.cast(function, ctypes.c_void_p).value)

    def _Error_Create(self, given):
        self.error = (given.code, given.message.decode())
        return _ERROR

    def _Error_Destroy(self, given):
        pass

    def _Stream_Get(self, given):
        given.stream = self.gpu.streams.current(self.device)

    def _DeviceOrdinal_Get(self, given):
        given.ordinal = self.device

    def _DeviceMemory_Allocate(self, given):
        memory = self.gpu.empty((given.size,), np.uint8, self.device)
        self.allocated[memory.ctypes.data] = memory
        self.requested += given.size
        given.data = memory.ctypes.data

    def _DeviceMemory_Free(self, given):
        assert len(self.allocated.pop(given.data)) == given.size

    def call(self, operation, arrays, results, target=handler.TARGET, platform="CUDA"):
        """Runs a handler for NumPy arrays over device memory."""
        run = {"CUDA": cuda_calls.run}[platform]
        arguments, made = _buffers(arrays), _buffers(results)
        known = [(array.shape, array.dtype.name) for array in arrays]
        text = operation.encode(known if self.sized else None).encode()
        attribute = call_frame._Bytes(ctypes.cast(ctypes.c_char_p(text), ctypes.c_void_p), len(text))
        pointers = (ctypes.c_void_p * 1)(ctypes.addressof(attribute))
        frame = call_frame._CallFrame(
            struct_size=ctypes.sizeof(call_frame._CallFrame),
            api=ctypes.addressof(self.api),
            stage=call_frame.EXECUTE,
        )
        frame.arguments.size, frame.arguments.pointers = len(arrays), ctypes.addressof(arguments.pointers)
        frame.results.size, frame.results.pointers = len(results), ctypes.addressof(made.pointers)
        frame.attributes.size, frame.attributes.pointers = 1, ctypes.addressof(pointers)
        self.error = None
        failed = handler._handler_of(run, target == handler.TARGET)(ctypes.addressof(frame))
        assert bool(failed) == (self.error is not None)
        self.gpu.check_device()


class _buffers:
    def __init__(self, arrays):
        self.dimensions = [(ctypes.c_int64 * max(array.ndim, 1))(*array.shape) for array in arrays]
        self.buffers = [
            call_frame._Buffer(
                dtype=_DTYPES[array.dtype.name],
                data=array.ctypes.data,
                rank=array.ndim,
                dimensions=ctypes.addressof(dimensions),
            )
            for array, dimensions in zip(arrays, self.dimensions, strict=True)
        ]
        self.pointers = (ctypes.c_void_p * len(arrays))(*map(ctypes.addressof, self.buffers))


def operation_of(inputs, lengths=None, wanted=None, traced=False, **options):
    """The operation of the inputs of a test, and its arrays by role, as NumPy arrays."""
    from cupy_msda.call import Variant, contiguous_starts

    references = getattr(inputs, "references", None)
    shapes = inputs.shapes
    starts = contiguous_starts(shapes.tolist()) if inputs.starts is None else inputs.starts.tolist()
    names = ("num_points", "interpolation", "padding_mode", "align_corners")
    variant = Variant(**{name: options.pop(name) for name in names if name in options})
    operation = Operation(
        L=len(shapes),
        levels=None if traced else tuple((h, w, s) for (h, w), s in zip(shapes.tolist(), starts, strict=True)),
        starts=traced and inputs.starts is not None,
        ragged=lengths is not None,
        coordinates=0 if references is None else references.shape[-1],
        packed=inputs.weights is None,
        variant=variant,
        **options,
    )
    if wanted is not None:
        operation = operation.backward(wanted)
    arrays = {
        "grad_output": inputs.grad_output,
        "value": inputs.value,
        "locations": inputs.locations,
        "weights": inputs.weights,
        "references": references,
        "shapes": _words(shapes),
        "starts": None if inputs.starts is None else _words(inputs.starts),
        "lengths": None if lengths is None else _words(np.array(lengths)),
    }
    return operation, {role: arrays[role] for role in operation.roles}


def _words(numbers):
    numbers = np.ascontiguousarray(numbers, np.int64)
    return numbers.view(np.int32).reshape(*numbers.shape, 2)
