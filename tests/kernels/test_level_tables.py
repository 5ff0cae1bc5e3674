"""Levels that are known on the host are copied to the device once, without waiting for the caller's work."""

from types import SimpleNamespace

import numpy as np
import pytest

from cupy_msda import arrays
from cupy_msda.cuda import level_tables

LEVELS = ((20, 30, 0), (10, 15, 600))


class Device:
    """Stands in for CuPy: memory is NumPy's, and what happens on a stream is listed."""

    def __init__(self, capturing):
        self.log, self.capturing = [], capturing
        self.cuda = SimpleNamespace(Stream=self.stream, runtime=SimpleNamespace(streamIsCapturing=self.is_capturing))

    def is_capturing(self, stream):
        return stream == self.capturing

    def stream(self, non_blocking):
        assert non_blocking, "the legacy default stream waits for the caller's work"
        log = self.log

        class Stream:
            def __enter__(self):
                return self

            def __exit__(self, *exception):
                pass

            def synchronize(self):
                log.append("wait")

        return Stream()

    def empty(self, count, dtype):
        log = self.log

        class Array(np.ndarray):
            data = property(lambda self: SimpleNamespace(ptr=self.ctypes.data))

            def set(self, numbers, stream):
                self[...] = numbers
                log.append("copy")

        return np.empty(count, dtype).view(Array)


@pytest.fixture
def device(monkeypatch):
    found = Device(capturing=99)
    monkeypatch.setattr(arrays, "require_cupy", lambda what: found)
    monkeypatch.setattr(level_tables, "_tables", {})
    monkeypatch.setattr(level_tables, "_memory", [])
    return found


def words_at(address, count):
    kept = next(array for array in level_tables._memory if 0 <= address - array.ctypes.data < array.nbytes)
    first = (address - kept.ctypes.data) // 8
    return np.asarray(kept)[first : first + count].tolist()


def test_a_table_holds_shapes_and_then_starts(device):
    table = level_tables.level_table(LEVELS, 0, 7)
    assert words_at(table.shapes, 4) == [20, 30, 10, 15]
    assert words_at(table.starts, 2) == [0, 600]
    assert device.log == ["copy", "wait"]


def test_a_list_of_levels_is_copied_once_per_device(device):
    first = level_tables.level_table(LEVELS, 0, 7)
    assert level_tables.level_table(LEVELS, 0, 8) == first
    level_tables.level_table(LEVELS, 1, 7)
    level_tables.level_table(LEVELS[:1], 0, 7)
    assert device.log.count("copy") == len(level_tables._memory) == 3


def test_no_levels_have_a_table(device):
    assert level_tables.level_table((), 0, 7).shapes


def test_a_capture_takes_a_table_that_is_there_and_refuses_another(device):
    table = level_tables.level_table(LEVELS, 0, 7)
    assert level_tables.level_table(LEVELS, 0, 99) == table
    with pytest.raises(RuntimeError, match=r"copy the sizes of the levels.*make the same call once before the capture"):
        level_tables.level_table(LEVELS[:1], 0, 99)
