"""AOTInductor on a CPU: packages that hold the operator, loaded in Python, and decomposed ones, loaded in C++."""

import subprocess
from pathlib import Path

import pytest
import torch

from cupy_msda.torch import decomposed, ms_deform_attn
from tests.helpers import emulator
from tests.helpers.torch_calls import LEVELS, PIXELS

inductor = pytest.importorskip("torch._inductor")
if not hasattr(inductor, "aoti_load_package"):
    pytest.skip("this torch packages nothing", allow_module_level=True)
pytestmark = [
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.skipif(emulator.COMPILER is None, reason="needs g++"),
]
PROGRAM = Path(__file__).parent.parent / "helpers" / "run_package.cpp"


class Net(torch.nn.Module):
    def forward(self, value, locations, weights):
        return ms_deform_attn(value, LEVELS, None, locations, weights)


def inputs_of(queries):
    """Those that run_package.cpp makes."""
    shapes = [(2, PIXELS, 2, 4), (2, queries, 2, 2, 3, 2), (2, queries, 2, 2, 3)]
    return tuple(torch.arange(torch.Size(shape).numel(), dtype=torch.float32).sin().view(shape) for shape in shapes)


def package(path):
    Q = torch.export.Dim("Q", min=2, max=1000)
    program = torch.export.export(Net(), inputs_of(5), dynamic_shapes=({}, {1: Q}, {1: Q}))
    return program, inductor.aoti_compile_and_package(program, package_path=str(path))


def test_a_package_holds_the_operator_and_runs_in_python(tmp_path):
    program, path = package(tmp_path / "operator.pt2")
    assert any("cupy_msda" in str(node.target) for node in program.graph.nodes)
    run = inductor.aoti_load_package(path)
    for queries in (5, 9):
        inputs = inputs_of(queries)
        torch.testing.assert_close(run(*inputs), Net()(*inputs))


@pytest.mark.long
def test_a_decomposed_package_runs_in_a_program_in_cplusplus(tmp_path):
    with decomposed():
        program, path = package(tmp_path / "decomposed.pt2")
    assert not any("cupy_msda" in str(node.target) for node in program.graph.nodes)
    root = Path(torch.__file__).parent
    command = [
        emulator.COMPILER, "-std=c++20", PROGRAM, f"-I{root / 'include'}", f"-L{root / 'lib'}", "-ltorch",
        "-ltorch_cpu", "-lc10", f"-Wl,-rpath,{root / 'lib'}", "-o", tmp_path / "program",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    done = subprocess.run([tmp_path / "program", path], capture_output=True, text=True, env={})
    assert done.returncode == 0, done.stderr
    have = torch.tensor([float(line) for line in done.stdout.split()])
    want = torch.cat([Net()(*inputs_of(queries)).flatten() for queries in (5, 9)])
    torch.testing.assert_close(have, want, rtol=1e-4, atol=1e-5)
