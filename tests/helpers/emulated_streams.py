"""CUDA streams and events that run nothing: they know which work is ordered after which, by vector clocks."""

import itertools
import threading
from collections import defaultdict

# Streams of the caller have these addresses, and the number of their device is added.
_CALLER, _SECOND_CALLER = 0x7000, 0x7100
_OF_CUPY = 0x6000


# Streams that are created have addresses from here on; a caller's have smaller ones.
_CREATED = 0x9000


class OrderError(AssertionError):
    """Work that nothing orders with what it needs, or on a stream of another device."""


class Streams:
    """Of all devices. Work is one count per stream; a clock holds how much of each stream came before."""

    def __init__(self):
        self._clocks, self._events, self._synchronised = defaultdict(dict), {}, {}
        self._after = {}  # what the host had waited for when it last waited for a device
        self._addresses = itertools.count(_CREATED, 16)
        self._thread = threading.local()
        self.devices = {}
        self.capturing = set()
        # Whether CuPy's current stream is another than that of the caller, whose arrays are another framework's.
        self.cupy_is_apart = False

    @property
    def _arrived(self):
        """The last work of this thread on each of the caller's streams: others may use the same stream."""
        return self._thread.__dict__.setdefault("arrived", {})

    def current(self, device):
        """The caller's current stream of a device, in this thread."""
        stream = getattr(self._thread, "first", _CALLER) + device
        self.devices[stream] = device
        return stream

    def current_of_cupy(self, device):
        """CuPy's current stream of a device."""
        if not self.cupy_is_apart:
            return self.current(device)
        self.devices[_OF_CUPY + device] = device
        return _OF_CUPY + device

    def use(self, second):
        """The caller's current streams of this thread are the second ones, or the first ones."""
        self._thread.first = _SECOND_CALLER if second else _CALLER

    def create(self, device):
        if self.capturing:
            raise OrderError("a stream or an event is created during a capture")
        address = next(self._addresses)
        self.devices[address] = device
        return address

    def queue(self, stream, device, what):
        """Work on `stream`, while `device` is current: that stream is the caller's, or waits for it."""
        if self.devices.get(stream) != device:
            raise OrderError(f"{what}: stream {stream:#x} is none of device {device}")
        caller = self.current(device)
        known = max(self._clocks[stream].get(caller, 0), self._after.get(caller, 0))
        if stream != caller and known < self._arrived.get(caller, 0):
            raise OrderError(f"{what}: stream {stream:#x} does not wait for the caller's")
        self._advance(stream)

    def arrive(self, device):
        """The caller writes arrays on the current stream."""
        caller = self.current(device)
        self._advance(caller)
        self._arrived[caller] = self._clocks[caller][caller]

    def _advance(self, stream):
        self._clocks[stream][stream] = self._clocks[stream].get(stream, 0) + 1

    def record(self, event, stream):
        self._events[event] = dict(self._clocks[stream])

    def wait(self, stream, event):
        clock = self._clocks[stream]
        for other, count in self._events.get(event, {}).items():
            clock[other] = max(clock.get(other, 0), count)

    def upload(self, stream, device, what):
        """A copy from the host, which needs nothing of the caller's streams."""
        if self.devices.get(stream) != device:
            raise OrderError(f"{what}: stream {stream:#x} is none of device {device}")
        self._advance(stream)

    def synchronise(self, stream):
        for other, count in self._clocks[stream].items():
            self._synchronised[other] = max(self._synchronised.get(other, 0), count)

    def synchronise_device(self, device):
        """The host waits for a device: what is queued there later comes after all that was before, on every stream."""
        for stream in [stream for stream, of in self.devices.items() if of == device]:
            self.synchronise(stream)
        self._after = dict(self._synchronised)

    def waited_for(self, stream):
        """Whether the host has waited for all work on a stream."""
        return self._synchronised.get(stream, 0) >= self._clocks[stream].get(stream, 0)

    def check(self):
        """All work on streams that are no caller's has been waited for, by the host or by a caller's stream."""
        callers = [stream for stream in self.devices if stream < _CREATED]
        for stream, clock in list(self._clocks.items()):
            known = [self._clocks[caller].get(stream, 0) for caller in callers]
            if stream not in callers and clock.get(stream, 0) > max(*known, self._synchronised.get(stream, 0), 0):
                raise OrderError(f"nothing waits for the work on stream {stream:#x}")
