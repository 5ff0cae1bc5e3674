"""Fixtures. Tests marked `gpu` need CuPy and a CUDA device and are skipped elsewhere."""

import os

# JAX would take most of the GPU's memory for itself.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import pytest

from tests.helpers import backends

if backends.GPU and os.environ.get("CUPY_MSDA_TEST_EXACT_ALLOCATIONS"):
    import cupy

    cupy.cuda.set_allocator(None)


def pytest_collection_modifyitems(items):
    if backends.GPU:
        return
    skip = pytest.mark.skip(reason="needs CuPy and a CUDA device")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


@pytest.fixture(params=backends.BACKENDS, ids=lambda b: b.name)
def backend(request):
    return request.param


@pytest.fixture(params=backends.MAIN_BACKENDS, ids=lambda b: b.name)
def main_backend(request):
    return request.param


@pytest.fixture(params=backends.CUDA_BACKENDS or [None], ids=lambda b: b.name if b else "none")
def cuda_backend(request):
    if request.param is None:
        pytest.skip("needs CuPy and a CUDA device")
    return request.param
