"""Kernels as cubins for an architecture that this machine need not have: NVRTC without a GPU."""

from __future__ import annotations

from importlib import import_module

from .. import arrays
from . import kernels
from .kernel_spec import KernelSpec


def compile_cubin(spec: KernelSpec, architecture: int) -> bytes:
    """The machine code of `spec` for an architecture, such as 90.

    Raises
    ------
    RuntimeError
        Without CuPy or NVRTC, or where NVRTC does not know the architecture.
    """
    arrays.require_cupy("compiling kernels")
    nvrtc = import_module("cupy_backends.cuda.libs.nvrtc")
    # CuPy compiles with flushed denormals too.
    options = (*kernels.OPTIONS, f"-arch=sm_{architecture}", "-ftz=true")
    try:
        program = nvrtc.createProgram(kernels.program(spec), f"{spec.function}.cu", (), ())
        try:
            nvrtc.compileProgram(program, options)
            return bytes(nvrtc.getCUBIN(program))
        finally:
            nvrtc.destroyProgram(program)
    except Exception as error:  # NVRTC's, or that of a library that cannot be loaded
        reason = " ".join(str(error).split()[:40])
        raise RuntimeError(
            f"the CUDA kernel {spec.kernel} cannot be compiled for sm_{architecture}: {type(error).__name__}: "
            f"{reason}. `python -m cupy_msda info` shows which NVRTC CuPy finds"
        ) from error
