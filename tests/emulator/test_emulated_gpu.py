"""What the emulated GPU refuses: each is a fault that a GPU may not show."""

import contextlib
import ctypes

import numpy as np
import pytest

from cupy_msda.cuda import level_tables, session, streams
from cupy_msda.cuda.launch import PreparedLaunch
from cupy_msda.cuda.plan import cast_gradient
from tests.helpers import emulated_gpu
from tests.helpers.cases import Case
from tests.helpers.emulated_calls import run
from tests.helpers.emulated_memory import AccessError
from tests.helpers.emulated_streams import OrderError


@pytest.fixture
def gpu(monkeypatch):
    """Launches compute nothing."""
    return emulated_gpu.install(monkeypatch, run=lambda planned, words: None)


def launch(gpu, source, target, device=0):
    gpu.cupy.cuda.runtime.setDevice(device)
    PreparedLaunch(cast_gradient("float16", 4), device).run(gpu.streams.current(device), source, target, 4)


def test_memory_is_filled_with_nan_until_something_writes_it(gpu):
    assert np.isnan(gpu.cupy.empty((2, 3), np.float32).get()).all()


def test_a_launch_on_freed_memory_is_refused(gpu):
    array = gpu.put(np.zeros(4, np.float32))
    address = array.data.ptr
    launch(gpu, address, address)
    del array
    with pytest.raises(AccessError, match="freed"):
        launch(gpu, address, address)


def test_a_launch_on_memory_of_the_host_is_refused(gpu):
    array = np.zeros(4, np.float32)
    with pytest.raises(AccessError, match=r"cast: source: .* is no address of device memory"):
        launch(gpu, array.ctypes.data, 0)


def test_a_launch_on_memory_of_another_device_is_refused(gpu):
    array = gpu.put(np.zeros(4, np.float32), device=1)
    launch(gpu, array.data.ptr, array.data.ptr, device=1)
    with pytest.raises(AccessError, match="memory of device 1 on device 0"):
        launch(gpu, array.data.ptr, array.data.ptr)


def test_a_null_pointer_is_refused(gpu):
    array = gpu.put(np.zeros(4, np.float32))
    with pytest.raises(AssertionError, match="cast: target of 0x0: expected an address"):
        launch(gpu, array.data.ptr, 0)


def test_an_address_that_is_not_aligned_for_vectors_is_refused(gpu, monkeypatch):
    monkeypatch.setattr(session, "alignment_of", lambda *addresses: 16)
    inputs = Case("plain").inputs()
    whole = gpu.put(np.zeros(inputs.value.size + 2, np.float32))
    value = gpu.cupy.ndarray.over(whole.host[2:].reshape(inputs.value.shape), 0)
    with pytest.raises(AssertionError, match=r"forward: value of .* expected a multiple of 16"):
        run(gpu, inputs._replace(value=value))


def test_a_write_next_to_memory_is_found(gpu):
    array = gpu.put(np.zeros(4, np.float32))
    gpu.check()
    ctypes.memset(array.data.ptr + 16, 0, 1)
    with pytest.raises(AccessError, match="wrote next to an allocation of 16 bytes"):
        gpu.check()


def test_a_launch_on_a_stream_of_another_device_is_refused(gpu):
    gpu.streams.current(1)
    with pytest.raises(OrderError, match="none of device 0"):
        gpu.cupy.cuda.runtime.memsetAsync(gpu.put(np.zeros(4)).data.ptr, 0, 4, gpu.streams.current(1))


@pytest.mark.parametrize(
    ("missing", "message"), [("fork", "does not wait for the caller's"), ("join", "nothing waits for the work")]
)
def test_a_side_stream_without_order_is_found(gpu, monkeypatch, missing, message):
    class Unordered(streams.SideStream):
        def __init__(self):
            super().__init__()
            setattr(self, missing, lambda of: None)

    monkeypatch.setattr(streams, "SideStream", Unordered)

    def call():
        run(gpu, Case("plain").inputs(), deterministic=True)
        gpu.check()

    with pytest.raises(OrderError, match=message):
        call()


def test_a_device_that_stays_current_is_found(gpu, monkeypatch):
    def on_device(device):
        gpu.device = device
        return contextlib.nullcontext()

    monkeypatch.setattr(session, "on_device", on_device)
    with pytest.raises(AssertionError, match="device 1 is current"):
        run(gpu, Case("plain").inputs(), device=1)


def test_a_table_that_nothing_waits_for_is_found(gpu, monkeypatch):
    stream = type(gpu.cupy.cuda.Stream(True))
    monkeypatch.setattr(stream, "synchronize", lambda self: None)
    gpu.cupy.cuda.runtime.setDevice(0)
    level_tables.level_table(((2, 3, 0),), 0, gpu.streams.current(0))
    with pytest.raises(OrderError, match="nothing waits"):
        gpu.check()


def test_a_thread_that_has_never_set_its_device_launches_nothing(gpu):
    gpu.cupy.cuda.runtime.setDevice(0)
    prepared = PreparedLaunch(cast_gradient("float16", 4), 0)
    del gpu._thread.has_context
    with pytest.raises(AssertionError, match="never set its device"):
        prepared.run(gpu.streams.current(0), 0, 0, 0)
