"""Every kind of kernel compiles to machine code without a GPU, for the oldest and newest architecture."""

import pytest
from cases import DTYPE_PAIRS

from cupy_msda import kernels, plan
from cupy_msda.problem import Problem

nvrtc = pytest.importorskip("cupy_backends.cuda.libs.nvrtc", reason="needs CuPy and NVRTC")
LEVELS = ((100, 167, 0), (50, 84, 16700), (25, 42, 20900), (13, 21, 21950))


def compile_log(key, arch):
    program = nvrtc.createProgram(kernels.source(key.kind), f"msda_{key.kind}.cu", (), ())
    flags = (*kernels.options(key), f"-arch=sm_{arch}", "--ptxas-options=-v")
    try:
        nvrtc.compileProgram(program, flags)
    except nvrtc.NVRTCError:
        pytest.fail(f"{key}\n{nvrtc.getProgramLog(program)}")
    assert nvrtc.getCUBIN(program)
    log = nvrtc.getProgramLog(program)
    assert "warning" not in log, f"{key}\n{log}"
    return log


@pytest.mark.parametrize("arch", [75, 80, 86, 90, 100, 120])
@pytest.mark.parametrize("kind", ["forward", "backward"])
def test_compiles_for_every_architecture(kind, arch):
    problem = Problem(2, 22223, 8, 32, 4, 4, 22223, "bfloat16", "float32", ("cuda", 0), LEVELS)
    compile_log(getattr(plan, kind)(problem, 16).key, arch)


@pytest.mark.parametrize("pair", DTYPE_PAIRS, ids="-".join)
@pytest.mark.parametrize("D", [1, 32, 33])
@pytest.mark.parametrize("levels", [LEVELS, None], ids=["by value", "on the device"])
def test_compiles_without_spills(pair, D, levels):
    problem = Problem(2, 22223, 8, D, 4, 4, 300, *pair, ("cuda", 0), levels)
    for launch in (plan.forward(problem, 16), plan.backward(problem, 16)):
        assert " 0 bytes spill stores" in compile_log(launch.key, 90)


def test_compiles_with_64_bit_offsets():
    problem = Problem(1, 2**28, 1, 8, 1, 4, 10, "float16", "float32", ("cuda", 0), ((2**14, 2**14, 0),))
    for launch in (plan.forward(problem, 16), plan.backward(problem, 16)):
        assert launch.key.index_64
        compile_log(launch.key, 90)


@pytest.mark.parametrize("wanted", [(True, False), (False, True)])
def test_compiles_for_some_gradients(wanted):
    problem = Problem(2, 22223, 8, 32, 4, 4, 300, "float32", "float32", ("cuda", 0), LEVELS)
    compile_log(plan.backward(problem, 16, grad_value=wanted[0], grad_samples=wanted[1]).key, 90)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_rounding_compiles(dtype):
    compile_log(plan.round_gradient(dtype, 1000).key, 75)
