"""Fixtures, and the rules for tests that need a GPU.

A GPU test is marked `gpu` or has a parameter that is a CUDA backend. A machine without CuPy and a CUDA device skips it.
`python -m pytest -m gpu` runs the GPU tests alone, `python -m tests.gpu` runs them in parallel.
"""

import os

# JAX would take most of the GPU's memory for itself.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
# What somebody has tuned on this machine is no part of what is tested.
os.environ["CUPY_MSDA_TUNING"] = "off"

import pytest

from tests.helpers import backends

if backends.GPU and os.environ.get("CUPY_MSDA_TEST_EXACT_ALLOCATIONS"):
    import cupy

    cupy.cuda.set_allocator(None)


def pytest_addoption(parser):
    parser.addoption("--sanitizer", metavar="TOOL", help="run only what compute-sanitizer's TOOL can run")
    parser.addoption("--slice", metavar="I/N", help="run the I-th of N shares of what is selected")


def _backends_of(item):
    parameters = item.callspec.params.values() if hasattr(item, "callspec") else ()
    return [value for value in parameters if any(value is backend for backend in backends.BACKENDS)]


def _runs_under(tool, item):
    """JAX's own kernels would take longer than all others together; `no_sanitizer` names the tools, or none for all."""
    refused = [mark for mark in item.iter_markers("no_sanitizer") if tool in mark.args or not mark.args]
    jax = [backend for backend in _backends_of(item) if backend.name.startswith("jax")]
    return bool(item.get_closest_marker("sanitizer")) and not refused and not jax


@pytest.hookimpl(wrapper=True, tryfirst=True)  # before -m looks at the markers, and after it
def pytest_collection_modifyitems(config, items):
    skip = pytest.mark.skip(reason="needs CuPy and a CUDA device")
    for item in items:
        if any(backend in backends.CUDA_BACKENDS for backend in _backends_of(item)):
            item.add_marker("gpu")
        if backends.GPU and item.get_closest_marker("gpu_if_present"):
            item.add_marker("gpu")
        if not backends.GPU and item.get_closest_marker("gpu"):
            item.add_marker(skip)
    tool = config.getoption("--sanitizer")
    if tool:
        _keep(config, items, [item for item in items if _runs_under(tool, item)])
    yield
    number, count = map(int, (config.getoption("--slice") or "1/1").split("/"))
    _keep(config, items, items[number - 1 :: count])


def _keep(config, items, chosen):
    """Deselect all other items."""
    config.hook.pytest_deselected(items=list(set(items) - set(chosen)))
    items[:] = chosen


@pytest.fixture(autouse=True)
def _tier(request, monkeypatch):
    """The tier of the CPU path that a backend of the test names."""
    for backend in _backends_of(request.node):
        if getattr(backend, "tier", None):
            monkeypatch.setenv("CUPY_MSDA_CPU", backend.tier)


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
