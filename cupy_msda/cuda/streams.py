"""Side streams, which run at the same time as the caller's between a fork and a join; and what may not be captured."""

from __future__ import annotations

from collections.abc import Callable

from .. import arrays


class SideStream:
    """A stream of our own, and the two events that order it with another. One call has it from the fork to the join."""

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


# By device. Never freed: as many as threads that were ever between a fork and a join at the same time.
_idle: dict[int, list[SideStream]] = {}


def idle(device: int) -> list[SideStream]:
    """The side streams of a device that no call has. A call takes one, or makes one, and puts it back."""
    return _idle.setdefault(device, [])


def create_first(device: int) -> None:
    """Create a side stream of `device`, which must be current, if it has none: the capture of a CUDA graph cannot."""
    if not idle(device):
        idle(device).append(SideStream())


def refuse_capture(stream: int, what: str) -> None:
    """RuntimeError where `stream` is being captured: `what` is not possible then."""
    runtime = arrays.require_cupy("an array on a CUDA device").cuda.runtime
    if stream > arrays.LAST_DEFAULT_STREAM and runtime.streamIsCapturing(stream):
        raise RuntimeError(
            f"this call has to {what}, which is not possible while its stream is being captured into a CUDA graph: "
            "make the same call once before the capture, or use cupy_msda.warmup"
        )
