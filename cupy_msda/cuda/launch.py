"""From a planned launch to the driver: its parameters laid out once, so that a call fills in addresses and no more."""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Callable
from importlib import import_module

from . import kernels
from .plan import SHARED_WITHOUT_OPT_IN, KernelKey, Launch

_PARAMETERS = {
    "forward": 12, "backward": 16, "round": 3, "sort": 14, "count": 6, "sum": 16, "add": 12, "expand": 10,
    "references": 3,
}  # fmt: skip
# The kernels that read levels, as their second parameter.
_WITH_METADATA = ("forward", "backward", "sort", "expand")


class PreparedLaunch:
    """A :class:`~cupy_msda.plan.Launch` with its compiled kernel, ready to be launched any number of times.

    Every parameter of the kernels is made of 64-bit words (addresses, sizes, and the levels as one struct of several),
    so a call packs its words into one block that the driver reads. It costs half of a call of ``cupy.RawKernel``, which
    looks at the type of each argument (benchmarks/NOTES.md). Blocks are taken from a list and put back: threads that
    launch at the same time never share one.
    """

    def __init__(self, launch: Launch, device: int) -> None:
        """Compiles the kernel where that has not happened; `device` must be current."""
        self.key = launch.key
        self._kernel = kernels.function(launch.key, device)  # keeps its module loaded
        if launch.shared > SHARED_WITHOUT_OPT_IN:  # long runs of the sort; hundreds of levels and more
            most = max(launch.shared, self._kernel.max_dynamic_shared_size_bytes)
            self._kernel.max_dynamic_shared_size_bytes = most
        function, driver_launch = self._kernel.kernel.ptr, import_module("cupy").cuda.driver.launchKernel
        (x, y, z), threads, shared = launch.grid, launch.block, launch.shared
        sizes = _words(launch.key)
        pack = struct.Struct(f"={sum(sizes)}q").pack_into
        blocks: list[_Block] = []

        # A closure: its variables are at hand faster than attributes.
        def run(stream: int, *words: int) -> None:
            try:
                block = blocks.pop()
            except IndexError:
                block = _Block(sizes)
            pack(block.memory, 0, *words)
            driver_launch(function, x, y, z, threads, 1, 1, shared, stream, block.pointers, 0)
            blocks.append(block)

        #: Launch on the CUDA stream at an address, of the current device, with the words of all parameters.
        self.run: Callable[..., None] = run


def _words(key: KernelKey) -> tuple[int, ...]:
    """64-bit words of each parameter: one, but for `msda_metadata`, which is two addresses or all the levels."""
    words = [1] * _PARAMETERS[key.kind]
    if key.kind in _WITH_METADATA:
        words[1] = 2 if key.levels_on_device else 3 * key.L
    return tuple(words)


class _Block:
    """Memory for the words of one launch, and the array of pointers to its parameters that the driver wants."""

    def __init__(self, words: tuple[int, ...]) -> None:
        self.memory = (ctypes.c_int64 * sum(words))()
        first = ctypes.addressof(self.memory)
        offsets = [8 * sum(words[:index]) for index in range(len(words))]
        self._pointers = (ctypes.c_void_p * len(words))(*(first + offset for offset in offsets))
        self.pointers = ctypes.addressof(self._pointers)
