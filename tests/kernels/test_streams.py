"""Side streams: what waits for what, and that no two calls have one at the same time."""

import pytest

from cupy_msda import arrays
from cupy_msda.cuda import steps, streams


class Runtime:
    """Stands in for CuPy's runtime and writes down what is queued where."""

    streamNonBlocking = eventDisableTiming = 1

    def __init__(self):
        self.made, self.queued = 0, []

    def _make(self, flags):
        self.made += 1
        return 100 + self.made

    streamCreateWithFlags = eventCreateWithFlags = _make

    def eventRecord(self, event, stream):
        self.queued.append(("record", event, stream))

    def streamWaitEvent(self, stream, event):
        self.queued.append(("wait", event, stream))


@pytest.fixture
def runtime(monkeypatch):
    class Cupy:
        class cuda:
            runtime = Runtime()

    monkeypatch.setattr(arrays, "require_cupy", lambda wanted: Cupy)
    monkeypatch.setattr(streams, "_idle", {})
    return Cupy.cuda.runtime


def concurrent(runtime, nested=None):
    def longer(stream, metadata, addresses):
        runtime.queued.append(("longer", stream, addresses))
        if nested:
            nested()

    def other(stream, metadata, addresses):
        runtime.queued.append(("other", stream, addresses))

    return steps._concurrent(longer, other, 0)


def test_the_other_step_is_between_fork_and_join(runtime):
    run = concurrent(runtime)
    (found,) = streams.idle(0)
    run(7, (), "addresses")
    begin, end = runtime.queued[0][1], runtime.queued[-1][1]
    assert runtime.queued == [
        ("record", begin, 7),
        ("wait", begin, found.stream),
        ("longer", 7, "addresses"),
        ("other", found.stream, "addresses"),
        ("record", end, found.stream),
        ("wait", end, 7),
    ]
    assert streams.idle(0) == [found]


def test_a_side_stream_is_created_first_and_used_again(runtime):
    runs = [concurrent(runtime) for _ in range(3)]
    made = runtime.made
    for run in runs:
        run(7, (), ())
    assert runtime.made == made == 3  # a stream and two events


def test_calls_at_the_same_time_have_one_side_stream_each(runtime):
    inner = concurrent(runtime)
    outer = concurrent(runtime, nested=lambda: inner(8, (), ()))
    outer(7, (), ())
    used = {entry[1] for entry in runtime.queued if entry[0] == "other"}
    assert len(used) == len(streams.idle(0)) == 2
