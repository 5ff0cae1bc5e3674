"""Kernels compile where CuPy cannot use its cache folder, with one warning; what cannot be compiled is a sentence."""

import os
import subprocess
import sys
import threading
import warnings
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest

import cupy_msda
from cupy_msda.cuda import kernels
from cupy_msda.cuda.gpu import H100
from cupy_msda.cuda.specs import CastSpec

SPEC = CastSpec(value_dtype="float16")


class Compiler:
    """CuPy's rule: a kernel is compiled where `kernel` is read, and kept on the disk unless told otherwise."""

    def __init__(self, error):
        self.error, self.calls = error, []

    def RawModule(self, **_):
        return SimpleNamespace(get_function=lambda name: Kernel(self))

    def compile(self):
        in_memory = os.environ.get("CUPY_CACHE_IN_MEMORY") == "1"
        self.calls.append("memory" if in_memory else "disk")
        if self.error and not in_memory:
            raise self.error
        return "compiled"


class Kernel:
    def __init__(self, compiler):
        self.compiler = compiler

    @property
    def kernel(self):
        return self.compiler.compile()


@pytest.fixture
def compiler(monkeypatch):
    monkeypatch.setenv("CUPY_CACHE_IN_MEMORY", "0")  # restored afterwards
    monkeypatch.setenv("CUPY_CACHE_DIR", "/var/cache/kernels")
    found = Compiler(None)
    monkeypatch.setattr(kernels, "import_module", lambda name: found)
    return found


ERRORS = [
    PermissionError(13, "Permission denied"),
    OSError(30, "Read-only file system"),
    OSError(28, "No space left on device"),
    FileNotFoundError(2, "No usable temporary directory found"),
    NotADirectoryError(20, "Not a directory"),
]


def test_a_kernel_is_compiled_when_it_is_asked_for(compiler):
    kernels._compile(SPEC, H100)
    assert compiler.calls == ["disk"]


@pytest.mark.parametrize("error", ERRORS)
def test_a_kernel_compiles_in_memory_where_the_disk_fails(compiler, error):
    compiler.error = error
    with pytest.warns(RuntimeWarning, match="Set CUPY_CACHE_DIR to a folder that can be written") as seen:
        kernels._compile(SPEC, H100)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # no second warning
        kernels._compile(SPEC, H100)
    assert compiler.calls == ["disk", "memory", "memory"]
    assert len(seen) == 1
    assert f"CuPy cannot keep compiled kernels in /var/cache/kernels ({error.strerror})" in str(seen[0].message)


def test_threads_that_fail_at_once_warn_once(compiler, monkeypatch):
    compiler.error, both = ERRORS[0], threading.Barrier(4)
    compile_one = compiler.compile

    def compile_at_once():
        if len(compiler.calls) < 4:
            compiler.calls.append("waits")
            both.wait(10)
            raise compiler.error
        return compile_one()

    monkeypatch.setattr(compiler, "compile", compile_at_once)
    failures = []

    def work():
        try:
            kernels._compile(SPEC, H100)
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not failures
    assert len(seen) == 1


def test_an_error_of_the_disk_that_stays_is_raised(compiler, monkeypatch):
    monkeypatch.setenv("CUPY_CACHE_IN_MEMORY", "1")
    monkeypatch.setattr(compiler, "compile", lambda: (_ for _ in ()).throw(OSError(2, "libnvrtc.so.13")))
    with pytest.raises(RuntimeError, match=r"kernel cast cannot be compiled: FileNotFoundError: .*libnvrtc\.so\.13"):
        kernels._compile(SPEC, H100)


@pytest.mark.parametrize("error", [RuntimeError("CuPy failed to load libnvrtc.so.13:\nOSError"), ImportError("nvrtc")])
def test_what_cannot_be_compiled_is_a_sentence(compiler, error):
    compiler.error = error
    with pytest.raises(RuntimeError, match="the CUDA kernel cast cannot be compiled") as raised:
        kernels._compile(SPEC, H100)
    assert "\n" not in str(raised.value)
    assert "python -m cupy_msda info" in str(raised.value)
    assert raised.value.__cause__ is error


# CuPy's own compilation and cache, for a GPU that is not there.
WITHOUT_A_GPU = """
import os, shutil, sys, types, warnings
import cupy
from cupy.cuda import compiler
from cupy_msda.cuda import kernels
from cupy_msda.cuda.specs import CastSpec

class Module:
    def load(self, cubin): self.cubin = cubin
    def _set_mapping(self, mapping): pass

class RawModule:
    def __init__(self, **arguments): self.arguments = arguments
    def get_function(self, name): return self
    @property
    def kernel(self):
        code, options, backend = (self.arguments[name] for name in ("code", "options", "backend"))
        return compiler._compile_module_with_cache(code, options, backend=backend)

compiler._get_arch = lambda: "90"
compiler._get_arch_for_options_for_nvrtc = lambda arch=None: ("-arch=sm_90", "cubin")
compiler.function = types.SimpleNamespace(Module=Module)
cupy.RawModule = RawModule
folder = os.environ["CUPY_CACHE_DIR"]
if sys.argv[1] == "gone":
    shutil.rmtree(folder, ignore_errors=True)
    open(folder, "w").close()
with warnings.catch_warnings(record=True) as seen:
    warnings.simplefilter("always")
    for dtype in ("float16", "bfloat16"):
        kernel = kernels._load(CastSpec(value_dtype=dtype))
        assert kernel.kernel.cubin[:4] == b"\\x7fELF"
kept = sorted(os.listdir(folder)) if os.path.isdir(folder) else []
print(len(kept), [str(w.message) for w in seen if w.category is RuntimeWarning])
"""


@pytest.mark.skipif(find_spec("cupy") is None, reason="needs CuPy and NVRTC")
@pytest.mark.parametrize("state", ["there", "gone"])
def test_cupy_itself_compiles_without_its_folder(tmp_path, state):
    root = Path(cupy_msda.__file__).parent.parent
    variables = {"CUPY_CACHE_DIR": str(tmp_path / "cache"), "PYTHONPATH": str(root), "CUPY_CACHE_IN_MEMORY": "0"}
    command = [sys.executable, "-c", WITHOUT_A_GPU, state]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | variables, timeout=120)
    assert done.returncode == 0, done.stderr
    if state == "there":
        assert done.stdout == "2 []\n"
    else:
        assert done.stdout.startswith(
            f"0 ['CuPy cannot keep compiled kernels in {tmp_path / 'cache'} (Not a directory)"
        )
