"""The recipes of docs/deployment.md and docs/several_gpus.md: Python and the command run, C and C++ compile."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers import emulator, exported_launcher

torch = pytest.importorskip("torch")
ROOT = Path(__file__).parent.parent.parent
DEPLOYMENT, SEVERAL_GPUS = ((ROOT / "docs" / name).read_text() for name in ("deployment.md", "several_gpus.md"))
INDUCTOR = "aoti"


def blocks(page, language):
    return re.findall(rf"```{language}\n(.*?)```", page, re.DOTALL)


def run_python(snippets):
    names = {"__name__": "page"}
    for snippet in snippets:
        exec(compile(snippet, "page", "exec"), names)
    return names


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("inductor", [False, pytest.param(True, marks=pytest.mark.long)], ids=["short", "AOTInductor"])
def test_python_of_the_deployment_page(tmp_path, monkeypatch, inductor):
    if inductor and emulator.COMPILER is None:
        pytest.skip("needs g++")
    monkeypatch.chdir(tmp_path)
    snippets = blocks(DEPLOYMENT, "python")
    chosen = [snippet for snippet in snippets if inductor or INDUCTOR not in snippet]
    assert len(snippets) == 7
    names = run_python(chosen)
    assert not any("cupy_msda" in str(node.target) for node in names["portable"].graph.nodes)
    written = {"layer.pt2", "layer.onnx", "tensorrt.onnx"} | ({"operator.pt2", "portable.pt2"} if inductor else set())
    assert written <= {path.name for path in tmp_path.iterdir()}


def test_the_command_writes_what_the_c_code_needs(tmp_path):
    pytest.importorskip("cupy_backends.cuda.libs.nvrtc", reason="needs CuPy and NVRTC")
    if exported_launcher.COMPILER is None:
        pytest.skip("needs a C compiler")
    (command,) = blocks(DEPLOYMENT, "sh")
    words = shlex.split(command)
    assert words[0] == "python"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, *words[1:]], cwd=tmp_path, check=True, env=environment, capture_output=True)
    folder = tmp_path / "kernels"
    (code,) = blocks(DEPLOYMENT, "c")
    (folder / "cupy_msda_page.c").write_text(code)
    assert len(exported_launcher.compile_objects(folder)) == 3


@pytest.mark.long
@pytest.mark.skipif(emulator.COMPILER is None, reason="needs g++")
def test_cplusplus_of_the_deployment_page_compiles(tmp_path):
    (code,) = blocks(DEPLOYMENT, "cpp")
    (tmp_path / "page.cpp").write_text(code)
    include = Path(torch.__file__).parent / "include"
    command = [emulator.COMPILER, "-std=c++20", "-fsyntax-only", f"-I{include}", "page.cpp"]
    subprocess.run(command, cwd=tmp_path, check=True)


@pytest.mark.filterwarnings("ignore")
def test_python_of_the_page_on_several_gpus():
    """In a process of its own, because of the process group."""
    assert len(blocks(SEVERAL_GPUS, "python")) == 2
    code = "\n".join(blocks(SEVERAL_GPUS, "python"))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
