"""What cupy_msda uses of CuPy, on an emulated GPU."""

from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np


class _Strided:
    """What ``np.asarray`` needs; keeps the owner of the memory alive."""

    def __init__(self, pointer, shape, dtype, strides):
        self.pointer = pointer
        typestr, data = np.dtype(dtype).str, (pointer.ptr, False)
        self.__array_interface__ = {
            "version": 3, "shape": shape, "typestr": typestr, "data": data, "strides": strides,
        }  # fmt: skip


class MemoryPointer(NamedTuple):
    memory: Any
    offset: int

    @property
    def ptr(self):
        return self.memory.ptr + self.offset


class UnownedMemory(NamedTuple):
    ptr: int
    size: int
    owner: Any
    device_id: int


class Array:
    """``cupy.ndarray``: a NumPy array over device memory. Only :meth:`get` reads it as the host does."""

    gpu: Any  # of the subclass that a module has

    def __init__(self, shape, dtype, memptr, strides=None):
        self.host, device = np.asarray(_Strided(memptr, shape, dtype, strides)), memptr.memory.device_id
        self.device = SimpleNamespace(id=device)

    @classmethod
    def over(cls, host, device):
        made = object.__new__(cls)
        made.host, made.device = host, SimpleNamespace(id=device)
        return made

    shape = property(lambda self: self.host.shape)
    strides = property(lambda self: self.host.strides)
    dtype = property(lambda self: self.host.dtype)
    itemsize = property(lambda self: self.host.itemsize)

    @property
    def data(self):
        return SimpleNamespace(ptr=self.host.ctypes.data if self.host.size else 0)

    def view(self, dtype):
        return self.over(self.host.view(dtype), self.device.id)

    def reshape(self, shape):
        return self.over(self.host.reshape(shape), self.device.id)

    def transpose(self, *axes):
        return self.over(self.host.transpose(*axes), self.device.id)

    def __getitem__(self, index):
        return self.over(self.host[index], self.device.id)

    def __deepcopy__(self, memo):
        return self.gpu.put(self.host.copy(), self.device.id)

    def get(self):
        self.gpu.check_order()
        return self.host.copy()

    def set(self, array, stream=None):
        if stream is None:
            self.gpu.streams.arrive(self.device.id)
        else:
            self.gpu.streams.upload(stream.ptr, self.gpu.device, "set")
        self.gpu.memory.accessible(self.data.ptr, self.gpu.device, "set")
        self.host[...] = array


class _Event:
    """Knows the time at which it was recorded."""

    def __init__(self, gpu):
        self.gpu = gpu

    def record(self, stream):
        self.elapsed = self.gpu.elapsed

    def synchronize(self):
        pass


class _Graph:
    """Launches that were captured. They have run then; a replay takes their time."""

    def __init__(self, gpu, launches):
        self.gpu, self.launches = gpu, launches

    def launch(self, stream):
        self.gpu.elapsed += sum(map(self.gpu.milliseconds, self.launches))


class _Stream:
    def __init__(self, gpu):
        self.gpu, self.ptr = gpu, gpu.streams.create(gpu.device)

    def begin_capture(self):
        self.gpu.streams.capturing.add(self.ptr)
        self.before = len(self.gpu.launches)

    def end_capture(self):
        self.gpu.streams.capturing.discard(self.ptr)
        return _Graph(self.gpu, self.gpu.launches[self.before :])

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        pass

    def synchronize(self):
        self.gpu.streams.synchronise(self.ptr)


class _Device:
    def __init__(self, gpu, number):
        self.gpu, self.number = gpu, number
        self.compute_capability, self.attributes = gpu.described()

    def __enter__(self):
        self.before, self.gpu.device = self.gpu.device, self.number

    def __exit__(self, *exception):
        self.gpu.device = self.before


def _runtime(gpu):
    streams = gpu.streams
    return SimpleNamespace(
        is_hip=False,
        streamNonBlocking=1,
        eventDisableTiming=2,
        getDeviceCount=lambda: gpu.devices,
        getDeviceProperties=lambda number: {"name": b"Emulated GPU"},
        driverGetVersion=lambda: 13000,
        getDevice=lambda: gpu.device,
        setDevice=lambda number: setattr(gpu, "device", number),
        memsetAsync=gpu.fill,
        pointerGetAttributes=lambda address: SimpleNamespace(device=gpu.memory.at(address).device),
        streamCreateWithFlags=lambda flags: streams.create(gpu.device),
        eventCreateWithFlags=lambda flags: streams.create(gpu.device),
        eventRecord=streams.record,
        streamWaitEvent=streams.wait,
        streamSynchronize=streams.synchronise,
        deviceSynchronize=lambda: streams.synchronise_device(gpu.device),
        streamIsCapturing=lambda stream: stream in streams.capturing,
    )


def module(gpu):
    """The module `cupy` of a GPU. Arrays are made on the current device."""
    ndarray = type("ndarray", (Array,), {"gpu": gpu})

    def empty(shape, dtype):
        return ndarray.over(gpu.empty(shape, dtype, gpu.device), gpu.device)

    def array(source, dtype=None, order="K"):
        host = source.host if isinstance(source, ndarray) else np.asarray(source)
        axes = np.argsort(np.abs(host.strides), kind="stable")[::-1] if order == "K" else range(host.ndim)
        made = empty(tuple(host.shape[axis] for axis in axes), dtype or host.dtype)
        made = made.transpose(*(list(axes).index(axis) for axis in range(host.ndim)))
        made.host[...] = host
        return made

    def asarray(source):
        return source if isinstance(source, ndarray) else array(source)

    def contiguous(source, dtype):
        unchanged = source.dtype == dtype and source.host.flags.c_contiguous
        return source if unchanged else array(source, dtype, "C")

    cuda = SimpleNamespace(
        runtime=_runtime(gpu),
        driver=SimpleNamespace(launchKernel=gpu.launch),
        Device=lambda number: _Device(gpu, number),
        Stream=lambda non_blocking: _Stream(gpu),
        Event=lambda: _Event(gpu),
        get_elapsed_time=lambda begin, end: end.elapsed - begin.elapsed,
        get_current_stream=lambda device: SimpleNamespace(ptr=gpu.streams.current_of_cupy(device)),
        MemoryPointer=MemoryPointer,
        UnownedMemory=UnownedMemory,
    )
    return SimpleNamespace(
        ndarray=ndarray, empty=empty, array=array, asarray=asarray, ascontiguousarray=contiguous, cuda=cuda,
        RawModule=lambda code, options, backend: SimpleNamespace(get_function=lambda name: gpu.load(code, name)),
    )  # fmt: skip
