"""GPUs without a GPU: the host code of the CUDA path runs unchanged on a stub of CuPy, its launches in the emulator.

Device memory is that of this process. Kernels run at once, and streams only say whether their order was given.
"""

import ctypes
import itertools
import sys
import threading
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np

from cupy_msda.arrays import frameworks
from cupy_msda.cuda import gpu as gpus
from cupy_msda.cuda import kernels, level_tables, run, streams
from cupy_msda.cuda.gpu import H100
from cupy_msda.cuda.heuristics import SHARED_WITHOUT_OPT_IN
from cupy_msda.cuda.kernel_spec import KernelSpec
from cupy_msda.cuda.tuning import loaded
from tests.helpers import emulated_cupy, emulated_parameters, emulator
from tests.helpers.emulated_memory import Memory
from tests.helpers.emulated_streams import Streams

# The emulator's libraries have one launch at a time.
_one_launch = threading.Lock()


class Launch(NamedTuple):
    """A launch as the driver got it. `words` are all of them, in the order of the parameters.

    `integers` are the numbers that its metadata and query lengths had, up to the end of their memory.
    """

    spec: KernelSpec
    grid: tuple[int, int, int]
    threads: int
    shared_bytes: int
    stream: int
    device: int
    words: tuple[int, ...]
    integers: tuple[tuple[int, ...], ...]


class Fill(NamedTuple):
    """A memset."""

    address: int
    nbytes: int
    stream: int
    device: int


@dataclass
class _Kernel:
    """A loaded kernel, as CuPy has it: its handle is an address."""

    spec: KernelSpec
    device: int
    kernel: SimpleNamespace
    requirements: dict
    max_dynamic_shared_size_bytes: int = 0
    preferred_shared_memory_carveout: int = field(default=-1)


class EmulatedGpu:
    """`run` computes a launch: the emulator's unless given. `launches` and `fills` are all that were."""

    devices = 2

    def __init__(self, run=emulator.run, limits=H100):
        self.memory, self.streams = Memory(), Streams()
        self.launches, self.fills, self._kernels, self._thread = [], [], {}, threading.local()
        self._run, self._limits, self._handles = run, limits, itertools.count(0xC0DE0000)
        self.home = 0
        # The time of the replays of graphs, by the time of a launch.
        self.elapsed, self.milliseconds = 0.0, lambda launch: 0.01

    @property
    def device(self):
        """The current device of this thread."""
        return getattr(self._thread, "device", 0)

    @device.setter
    def device(self, number):
        assert 0 <= number < self.devices
        self._thread.device, self._thread.has_context = number, True

    def described(self):
        """Compute capability and attributes, as CuPy names them."""
        limits = self._limits
        names = {
            "MultiProcessorCount": limits.multiprocessors,
            "MaxThreadsPerMultiProcessor": limits.threads_per_multiprocessor,
            "MaxBlocksPerMultiprocessor": limits.blocks_per_multiprocessor,
            "MaxRegistersPerMultiprocessor": limits.registers_per_multiprocessor,
            "MaxSharedMemoryPerMultiprocessor": limits.shared_memory_per_multiprocessor,
            "MaxSharedMemoryPerBlockOptin": limits.shared_memory_per_block,
            "ReservedSharedMemoryPerBlock": limits.reserved_shared_memory,
            "L2CacheSize": limits.l2_bytes,
            "MemoryClockRate": 2619000,
            "GlobalMemoryBusWidth": 5120,
            "ClockRate": 1980000,
        }
        return str(limits.architecture), names

    def empty(self, shape, dtype, device):
        """A NumPy array over new memory of a device."""
        shape = (shape,) if isinstance(shape, int) else tuple(shape)
        nbytes = int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize
        return self.memory.allocate(nbytes, device).view(dtype).reshape(shape)

    def load(self, spec, name):
        """The kernel, on the current device."""
        assert name == spec.function
        assert not self.streams.capturing, "a kernel is loaded during a capture"
        handle = next(self._handles)
        required = emulated_parameters.requirements(spec)
        self._kernels[handle] = _Kernel(spec, self.device, SimpleNamespace(ptr=handle), required)
        return self._kernels[handle]

    def fill(self, address, byte, nbytes, stream):
        """``cupy.cuda.runtime.memsetAsync``."""
        self.streams.queue(stream, self.device, "memset")
        allocation = self.memory.accessible(address, self.device, "memset")
        at = address - allocation.address
        assert at + nbytes <= allocation.nbytes, "memset: beyond the allocation"
        allocation.bytes[at : at + nbytes] = byte
        self.fills.append(Fill(address, nbytes, stream, self.device))

    def launch(self, function, x, y, z, threads, threads_y, threads_z, shared_bytes, stream, pointers, extra):
        """``cupy.cuda.driver.launchKernel``."""
        kernel = self._kernels[function]
        spec = kernel.spec
        assert getattr(self._thread, "has_context", False), "this thread has never set its device"
        assert kernel.device == self.device, f"{spec.kernel}: loaded on another device"
        assert (threads_y, threads_z, extra) == (1, 1, 0)
        assert shared_bytes <= max(SHARED_WITHOUT_OPT_IN, kernel.max_dynamic_shared_size_bytes)
        assert shared_bytes <= self._limits.shared_memory_per_block
        self.streams.queue(stream, self.device, spec.kernel)
        words, integers = self._words(kernel, pointers)
        self.launches.append(Launch(spec, (x, y, z), threads, shared_bytes, stream, self.device, words, integers))
        planned = SimpleNamespace(spec=spec, grid=(x, y, z), threads=threads, shared_bytes=shared_bytes)
        with _one_launch:
            self._run(planned, words)

    def _words(self, kernel, pointers):
        """The words of all parameters, those of arrays addresses of this device or 0; and what is read of integers."""
        spec, words, integers = kernel.spec, [], []
        sizes = spec.words()
        addresses = (ctypes.c_void_p * len(sizes)).from_address(pointers)
        for parameter, address, size in zip(spec.parameters, addresses, sizes, strict=True):
            found = (ctypes.c_int64 * size).from_address(address)[:]
            what = f"{spec.kernel}: {parameter.name}"
            if parameter.is_array:
                kernel.requirements[parameter.name].check(what, *found)
            # Of several words, the addresses come first, and sizes are small.
            for word in found if parameter.is_array else [word for word in found if word >= 2**32]:
                if not word:
                    continue
                allocation = self.memory.accessible(word, self.device, what)
                if parameter.name in ("metadata", "lengths"):
                    integers.append(tuple(allocation.bytes[word - allocation.address :].view(np.int64).tolist()))
            words += found
        return tuple(words), tuple(integers)

    def check(self):
        """After all calls: :meth:`check_device` and :meth:`check_order`."""
        self.check_device()
        self.check_order()

    def check_device(self):
        """After a call: the caller's device is current in this thread."""
        assert self.device == self.home, f"device {self.device} is current, and the caller's was {self.home}"

    def check_order(self):
        """The host reads: all work is ordered, and nothing wrote beyond its memory."""
        self.streams.check()
        self.memory.check()

    def put(self, array, device=0):
        """A ``cupy.ndarray`` with the numbers of a NumPy array, in the same layout; None stays None."""
        if array is None:
            return None
        span = sum((n - 1) * step for n, step in zip(array.shape, array.strides, strict=True)) + array.itemsize
        whole = self.memory.allocate(span if array.size else 0, device)
        host = np.ndarray(array.shape, array.dtype, whole, strides=array.strides)
        host[...] = array
        self.streams.arrive(device)
        return self.cupy.ndarray.over(host, device)


def install(monkeypatch, **options):
    """An :class:`EmulatedGpu` in the place of CuPy, without anything that earlier calls have left."""
    gpu = EmulatedGpu(**options)
    gpu.cupy = emulated_cupy.module(gpu)
    monkeypatch.setitem(sys.modules, "cupy", gpu.cupy)
    monkeypatch.setattr(kernels, "program", lambda spec: spec)  # a launch finds its kernel by it
    monkeypatch.setattr(gpus, "of_device", gpus.functools.cache(gpus.of_device.__wrapped__))
    for module, name in (
        (kernels, "_functions"), (kernels, "_compiling"), (run, "_prepared"), (level_tables, "_tables"),
        (streams, "_idle"), (loaded, "_choices"),
    ):  # fmt: skip
        monkeypatch.setattr(module, name, {})
    monkeypatch.setattr(level_tables, "_memory", [])
    read = frameworks.read_capsule

    def read_capsule(capsule):
        tensor = read(capsule)
        allocation = gpu.memory.at(tensor.data)
        return tensor if allocation is None else tensor._replace(device=("cuda", allocation.device))

    monkeypatch.setattr(frameworks, "read_capsule", read_capsule)
    return gpu


def fixture(monkeypatch):
    """For ``pytest.fixture``: checked once more at the end."""
    gpu = install(monkeypatch)
    yield gpu
    gpu.check()
