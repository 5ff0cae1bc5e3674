"""Device memory in host memory: filled with NaN, between guards, and filled with NaN again once it is freed.

So what no kernel writes, a write beyond an allocation, and a launch on freed memory are all seen.
"""

import bisect
import threading
import weakref
from dataclasses import dataclass

import numpy as np

# As the allocators of CuPy and torch align.
ALIGNMENT = 256
_GUARD = 4096
_POISON = 0xFF


class AccessError(AssertionError):
    """An access that a GPU would refuse, or worse, would not."""


class _Owner:
    """What arrays keep alive: memory is freed when the last array of it is gone."""

    def __init__(self, address, nbytes):
        shape, data = (nbytes,), (address, False)
        self.__array_interface__ = {"version": 3, "shape": shape, "typestr": "|u1", "data": data}


@dataclass
class Allocation:
    """`whole` has the guards too. It stays until the end, so that no other array gets its addresses."""

    address: int
    nbytes: int
    device: int
    whole: np.ndarray
    alive: bool = True

    @property
    def bytes(self):
        at = self.address - self.whole.ctypes.data
        return self.whole[at : at + self.nbytes]

    @property
    def guarded(self):
        """Whether the guards are as they were."""
        at = self.address - self.whole.ctypes.data
        return all((guard == _POISON).all() for guard in (self.whole[:at], self.whole[at + self.nbytes :]))


class Memory:
    """Of all devices."""

    def __init__(self):
        self._addresses, self._allocations, self._lock = [], [], threading.RLock()
        self._living, self._damaged = {}, []

    def allocate(self, nbytes, device):
        """New memory as an array of bytes; it is freed with the last array that is made of it."""
        whole = np.full(nbytes + 2 * _GUARD + ALIGNMENT, _POISON, np.uint8)
        address = -(-(whole.ctypes.data + _GUARD) // ALIGNMENT) * ALIGNMENT
        allocation, owner = Allocation(address, nbytes, device, whole), _Owner(address, nbytes)
        with self._lock:
            place = bisect.bisect(self._addresses, address)
            self._addresses.insert(place, address)
            self._allocations.insert(place, allocation)
            self._living[address] = allocation
        weakref.finalize(owner, self._free, allocation).atexit = False
        return np.asarray(owner)

    def _free(self, allocation):
        del self._living[allocation.address]
        if not allocation.guarded:
            self._damaged.append(allocation)
        allocation.alive = False
        allocation.bytes[...] = _POISON

    def at(self, address):
        """The allocation that has this address, or None."""
        with self._lock:
            place = bisect.bisect(self._addresses, address) - 1
            allocation = self._allocations[place] if place >= 0 else None
        if allocation is None or address - allocation.address > max(allocation.nbytes - 1, 0):
            return None
        return allocation

    def accessible(self, address, device, what):
        """The allocation that work of `device` reads or writes at this address."""
        allocation = self.at(address)
        if allocation is None:
            raise AccessError(f"{what}: {address:#x} is no address of device memory")
        if not allocation.alive:
            raise AccessError(f"{what}: the memory at {address:#x} has been freed")
        if allocation.device != device:
            raise AccessError(f"{what}: memory of device {allocation.device} on device {device}")
        return allocation

    def check(self):
        """Nothing wrote next to an allocation."""
        damaged = self._damaged + [one for one in list(self._living.values()) if not one.guarded]
        if damaged:
            raise AccessError(f"something wrote next to an allocation of {damaged[0].nbytes} bytes")
