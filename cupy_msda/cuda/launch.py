"""From a planned launch to the driver: its parameters laid out once, so that a call fills in words and no more."""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Callable
from importlib import import_module

from . import kernels
from .heuristics import SHARED_WITHOUT_OPT_IN
from .plan import Launch

# Launches a kernel on the CUDA stream at an address, of the current device, with the 64-bit words of its parameters.
Run = Callable[..., None]


class PreparedLaunch:
    """A :class:`~cupy_msda.cuda.plan.Launch` with its compiled kernel, ready to be launched any number of times.

    Every parameter of the kernels is made of 64-bit words (addresses, sizes, and structs of several),
    so a call packs its words into one block that the driver reads. ``cupy.RawKernel`` looks at the type of each
    argument and takes twice as long: docs/performance/decisions.md#host-prepared-launch. Blocks are taken from a list
    and put back: threads that launch at the same time never share one.
    """

    def __init__(self, launch: Launch, device: int) -> None:
        """Compiles the kernel where that has not happened; `device` must be current."""
        self.spec = launch.spec
        self._kernel = kernels.function(launch.spec, device)  # keeps its module loaded
        if launch.shared_bytes > SHARED_WITHOUT_OPT_IN:  # long sorted runs; hundreds of levels and more
            most = max(launch.shared_bytes, self._kernel.max_dynamic_shared_size_bytes)
            self._kernel.max_dynamic_shared_size_bytes = most
        function, driver_launch = self._kernel.kernel.ptr, import_module("cupy").cuda.driver.launchKernel
        (x, y, z), threads, shared = launch.grid, launch.threads, launch.shared_bytes
        sizes = launch.spec.words()
        pack = struct.Struct(f"={sum(sizes)}q").pack_into
        blocks: list[_Block] = []

        # A closure, because its variables are found faster than attributes.
        def run(stream: int, *words: int) -> None:
            try:
                block = blocks.pop()
            except IndexError:
                block = _Block(sizes)
            pack(block.memory, 0, *words)
            driver_launch(function, x, y, z, threads, 1, 1, shared, stream, block.pointers, 0)
            blocks.append(block)

        #: Launch on the CUDA stream at an address, of the current device, with the words of all parameters.
        self.run: Run = run

    def taking(self, *names: str) -> Run:
        """:attr:`run`, for a caller that passes the parameters of these `names`, in this order."""
        expected = tuple(parameter.name for parameter in self.spec.parameters)
        if names != expected:
            raise TypeError(
                f"{self.spec.kernel}: expected the parameters {', '.join(expected)}, got {', '.join(names)}"
            )
        return self.run


class _Block:
    """Memory for the words of one launch, and the array of pointers to its parameters that the driver wants."""

    def __init__(self, words: tuple[int, ...]) -> None:
        self.memory = (ctypes.c_int64 * sum(words))()
        first = ctypes.addressof(self.memory)
        offsets = [8 * sum(words[:index]) for index in range(len(words))]
        self._pointers = (ctypes.c_void_p * len(words))(*(first + offset for offset in offsets))
        self.pointers = ctypes.addressof(self._pointers)
