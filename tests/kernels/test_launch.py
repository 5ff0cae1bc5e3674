"""A prepared launch packs the words of a kernel's parameters in their order."""

import ctypes
import types

import pytest

from cupy_msda.cuda import kernels, launch, plan
from cupy_msda.cuda.specs import CastSpec

SHARED = 64 * 1024


class Kernel:
    kernel = types.SimpleNamespace(ptr=77)
    max_dynamic_shared_size_bytes = 48 * 1024


@pytest.fixture
def launched(monkeypatch):
    """What the driver is asked to launch: a list of (function, grid and block, shared bytes, stream, words)."""
    calls = []

    def driver(function, x, y, z, threads, _, __, shared, stream, pointers, extra):
        of_parameters = (ctypes.c_void_p * 3).from_address(pointers)
        words = [ctypes.c_int64.from_address(pointer).value for pointer in of_parameters]
        calls.append((function, (x, y, z), threads, shared, stream, words))

    cupy = types.SimpleNamespace(cuda=types.SimpleNamespace(driver=types.SimpleNamespace(launchKernel=driver)))
    monkeypatch.setattr(launch, "import_module", lambda name: cupy)
    monkeypatch.setattr(kernels, "function", lambda spec, device: Kernel())
    return calls


def test_words_reach_the_driver_in_the_order_of_the_parameters(launched):
    prepared = launch.PreparedLaunch(plan.cast_gradient("float16", 5000), 0)
    run = prepared.taking("source", "target", "count")
    run(9, 2**40, 2**41, 5000)
    run(9, 1, 2, 3)
    assert launched == [(77, (5, 1, 1), 256, 0, 9, [2**40, 2**41, 5000]), (77, (5, 1, 1), 256, 0, 9, [1, 2, 3])]


def test_parameters_in_another_order_are_refused(launched):
    prepared = launch.PreparedLaunch(plan.cast_gradient("float16", 5000), 0)
    with pytest.raises(TypeError, match="cast: expected the parameters source, target, count, got target, source"):
        prepared.taking("target", "source", "count")


def test_more_shared_memory_than_the_default_is_opted_in_to(launched):
    planned = plan.Launch(CastSpec(value_dtype="float16"), (1, 1, 1), SHARED)
    prepared = launch.PreparedLaunch(planned, 0)
    assert prepared._kernel.max_dynamic_shared_size_bytes == SHARED
