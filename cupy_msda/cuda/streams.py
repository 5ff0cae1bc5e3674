"""Work beside the caller's stream: between a fork and a join, on a stream of our own."""

from __future__ import annotations

from collections.abc import Callable

from .. import arrays


class Aside:
    """A stream, and the two events that tie it to another. Whoever has it has it alone until the join is queued."""

    def __init__(self) -> None:
        """On the current device."""
        runtime = arrays.require_cupy("an array on a CUDA device").cuda.runtime
        record, wait = runtime.eventRecord, runtime.streamWaitEvent
        stream = runtime.streamCreateWithFlags(runtime.streamNonBlocking)
        begin, end = (runtime.eventCreateWithFlags(runtime.eventDisableTiming) for _ in range(2))

        def fork(of: int) -> None:
            record(begin, of)
            wait(stream, begin)

        def join(of: int) -> None:
            record(end, stream)
            wait(of, end)

        self.stream = stream
        #: What is queued on `stream` from now on waits for what is queued on the stream `of`.
        self.fork: Callable[[int], None] = fork
        #: What is queued on the stream `of` from now on waits for what is queued on `stream`.
        self.join: Callable[[int], None] = join


# By device. Kept for ever: as many as threads that were ever between a fork and a join at the same time.
_idle: dict[int, list[Aside]] = {}


def idle(device: int) -> list[Aside]:
    """Those of a device that nobody has: take one, or make one, and put it back."""
    return _idle.setdefault(device, [])


def make_ahead(device: int) -> None:
    """See to it that there is one of `device`, which must be current: not first in the capture of a CUDA graph."""
    if not idle(device):
        idle(device).append(Aside())
