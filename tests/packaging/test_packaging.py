"""The wheel works in a clean environment with NumPy alone, and so does an editable install."""

import os
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

pytestmark = pytest.mark.network

ROOT = Path(__file__).parent.parent.parent
PROGRAM = """
import importlib.util
import numpy as np
import cupy_msda
from cupy_msda.cuda import kernels
assert not any(importlib.util.find_spec(name) for name in ("cupy", "torch", "jax"))
value = np.arange(12, dtype=np.float32).reshape(1, 6, 1, 2)
points, weights = np.full((1, 1, 1, 1, 1, 2), 0.5, np.float32), np.ones((1, 1, 1, 1, 1), np.float32)
output = cupy_msda.ms_deform_attn(value, [(2, 3)], None, points, weights)
grads = cupy_msda.ms_deform_attn_backward(value, [(2, 3)], None, points, weights, np.ones_like(output), 64)
print(cupy_msda.__file__, output.tolist(), float(grads[0].sum()), len(kernels.source("backward")) > 1000)
"""


def environment():
    """This one's, without what would make the checkout importable."""
    return {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "VIRTUAL_ENV", "CUPY_MSDA"))}


def run(*command, cwd):
    result = subprocess.run([str(c) for c in command], capture_output=True, text=True, cwd=cwd, env=environment())
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    run(sys.executable, "-m", "build", "--wheel", "--outdir", folder, ROOT, cwd=folder)
    return next(folder.glob("*.whl"))


@pytest.fixture
def clean_python(tmp_path):
    venv.create(tmp_path / "venv", with_pip=True)
    return tmp_path / "venv" / "bin" / "python"


def test_wheel_carries_sources_types_and_cases(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    wanted = {
        "py.typed",
        "data/chelsea.jpg",
        "golden_cases/encoder.npz",
        "torch/modules.py",
        *(f"cuda_src/{p.name}" for p in (ROOT / "cuda_src").iterdir()),
    }
    assert {f"cupy_msda/{name}" for name in wanted} <= names
    assert not any(name.startswith(("tests/", "benchmarks/")) for name in names)


def test_wheel_runs_with_numpy_alone(wheel, clean_python, tmp_path):
    run(clean_python, "-m", "pip", "install", "-q", wheel, cwd=tmp_path)
    where, rest = run(clean_python, "-c", PROGRAM, cwd=tmp_path).split(maxsplit=1)
    assert str(tmp_path) in where
    assert rest.strip() == "[[[5.0, 6.0]]] 2.0 True"
    assert "encoder" in run(clean_python, "-m", "cupy_msda", "check", cwd=tmp_path)
    assert "pip install" in run(clean_python, "-m", "cupy_msda", "info", cwd=tmp_path)


def test_editable_install_runs(clean_python, tmp_path):
    run(clean_python, "-m", "pip", "install", "-q", "-e", ROOT, cwd=tmp_path)
    where, rest = run(clean_python, "-c", PROGRAM, cwd=tmp_path).split(maxsplit=1)
    assert str(ROOT) in where
    assert rest.strip() == "[[[5.0, 6.0]]] 2.0 True"
