"""What the launch choices need to know of a GPU, and the list of architectures that the tests compile for."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field, replace
from typing import Any

from .. import arrays
from .tuning.tuned import NONE, Choices


@dataclass(frozen=True)
class Gpu:
    """The limits of a CUDA device. Sizes are in bytes; `architecture` is 90 for sm_90.

    `shared_memory_per_block` is the most that a kernel may opt in to. The driver reserves `reserved_shared_memory` of
    each resident block for itself. `choices` are what has been measured on this device.
    """

    architecture: int
    multiprocessors: int
    threads_per_multiprocessor: int
    blocks_per_multiprocessor: int
    registers_per_multiprocessor: int
    shared_memory_per_multiprocessor: int
    shared_memory_per_block: int
    reserved_shared_memory: int
    l2_bytes: int
    choices: Choices = field(default=NONE, compare=False, repr=False)

    @property
    def untuned(self) -> Gpu:
        """The same device without measured choices."""
        return replace(self, choices=NONE)

    def resident_blocks(self, threads: int, shared_bytes: int = 0) -> int:
        """Blocks of so many threads and bytes that a multiprocessor holds at a time. Registers may allow fewer."""
        by_threads = self.threads_per_multiprocessor // threads
        by_memory = by_threads
        if shared_bytes:
            by_memory = self.shared_memory_per_multiprocessor // (shared_bytes + self.reserved_shared_memory)
        return max(1, min(by_threads, self.blocks_per_multiprocessor, by_memory))

    def carveout(self, blocks: int, shared_bytes: int) -> int:
        """Percentage of the largest shared memory that `blocks` resident blocks need. The rest of it is L1 cache."""
        needed = blocks * (shared_bytes + self.reserved_shared_memory)
        return min(100, -(-100 * needed // self.shared_memory_per_multiprocessor))


def _limits(
    architecture: int, multiprocessors: int, *, threads: int, blocks: int, shared_kib: int, reserved: int, l2_mib: int
) -> Gpu:
    shared = shared_kib << 10
    return Gpu(
        architecture,
        multiprocessors,
        threads_per_multiprocessor=threads,
        blocks_per_multiprocessor=blocks,
        registers_per_multiprocessor=1 << 16,
        shared_memory_per_multiprocessor=shared,
        shared_memory_per_block=shared - reserved,
        reserved_shared_memory=reserved,
        l2_bytes=l2_mib << 20,
    )


#: Every supported architecture: the kernel budget, the comparison of machine code and the launch tables go through this
#: list. The limits are those of the CUDA C++ Programming Guide; multiprocessors and L2 are those of the GPU that is
#: named. A device is always described by its own attributes, so an architecture that is not listed works as well.
ARCHITECTURES: dict[int, Gpu] = {
    gpu.architecture: gpu
    for gpu in (
        _limits(75, 40, threads=1024, blocks=16, shared_kib=64, reserved=0, l2_mib=4),  # T4
        _limits(80, 108, threads=2048, blocks=32, shared_kib=164, reserved=1024, l2_mib=40),  # A100
        _limits(86, 82, threads=1536, blocks=16, shared_kib=100, reserved=1024, l2_mib=6),  # RTX 3090
        _limits(87, 16, threads=1536, blocks=16, shared_kib=164, reserved=1024, l2_mib=4),  # Jetson AGX Orin
        _limits(89, 128, threads=1536, blocks=24, shared_kib=100, reserved=1024, l2_mib=72),  # RTX 4090
        _limits(90, 132, threads=2048, blocks=32, shared_kib=228, reserved=1024, l2_mib=50),  # H100, H200
        _limits(100, 148, threads=2048, blocks=32, shared_kib=228, reserved=1024, l2_mib=126),  # B200
        _limits(120, 170, threads=1536, blocks=24, shared_kib=100, reserved=1024, l2_mib=96),  # RTX 5090
    )
}
#: The GPU that the launch choices are measured on.
H100 = ARCHITECTURES[90]


# CUDA 13, with which the tests compile, has no Volta: 7.0 works with CUDA 12 and is compiled in no test.
_DESCRIBED = ARCHITECTURES | {
    70: _limits(70, 80, threads=2048, blocks=32, shared_kib=96, reserved=0, l2_mib=6),  # V100
}
#: The lowest architecture by the major version of NVRTC. The kernels need `__grid_constant__`; CUDA 13 has no Volta.
LOWEST = {12: 70, 13: 75}


def refusal(architecture: int, nvrtc: int) -> str | None:
    """Why a GPU of this architecture cannot run what this major version of NVRTC compiles, or None."""
    if architecture >= LOWEST.get(nvrtc, LOWEST[13]):
        return None
    found, newest, oldest = (f"{number / 10:.1f}" for number in (architecture, LOWEST[13], LOWEST[12]))
    return (
        f"a GPU of compute capability {found} is too old: expected {newest} or newer, or {oldest} with the extra "
        "cuda12; move the arrays to the CPU"
    )


def refusal_of(cupy: Any, architecture: int) -> str | None:
    """:func:`refusal` for the NVRTC that CuPy finds, which is asked only where its version matters."""
    if architecture >= LOWEST[13]:
        return None
    return refusal(architecture, cupy.cuda.nvrtc.getVersion()[0])


def described(architecture: int) -> Gpu:
    """A GPU that need not be here: the listed one of this architecture, or else the newest that is not newer.

    Raises
    ------
    ValueError
        For an architecture that no extra of this package supports.
    """
    if (reason := refusal(architecture, min(LOWEST))) is not None:
        raise ValueError(reason)
    nearest = max(number for number in _DESCRIBED if number <= architecture)
    return replace(_DESCRIBED[nearest], architecture=architecture)


def is_listed(architecture: int) -> bool:
    """Whether :func:`described` knows the limits of this architecture itself."""
    return architecture in _DESCRIBED


@functools.cache
def of_device(device: int) -> Gpu:
    """The description of a CUDA device, from its attributes. RuntimeError where it is too old."""
    cupy = arrays.require_cupy("an array on a CUDA device")
    found = cupy.cuda.Device(device)
    architecture = int(found.compute_capability)
    if (reason := refusal_of(cupy, architecture)) is not None:
        raise RuntimeError(reason)
    return from_attributes(architecture, found.attributes)


def from_attributes(architecture: int, attributes: dict[str, Any]) -> Gpu:
    """A description from the names that CuPy gives the attributes of a device."""
    return Gpu(
        architecture,
        multiprocessors=attributes["MultiProcessorCount"],
        threads_per_multiprocessor=attributes["MaxThreadsPerMultiProcessor"],
        blocks_per_multiprocessor=attributes["MaxBlocksPerMultiprocessor"],
        registers_per_multiprocessor=attributes["MaxRegistersPerMultiprocessor"],
        shared_memory_per_multiprocessor=attributes["MaxSharedMemoryPerMultiprocessor"],
        shared_memory_per_block=attributes["MaxSharedMemoryPerBlockOptin"],
        reserved_shared_memory=attributes["ReservedSharedMemoryPerBlock"],
        l2_bytes=attributes["L2CacheSize"],
    )
