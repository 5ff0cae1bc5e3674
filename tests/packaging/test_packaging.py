"""The wheel works in a clean environment with NumPy alone, and so does an editable install."""

import configparser
import os
import subprocess
import venv
from pathlib import Path

import pytest

network = pytest.mark.network

ROOT = Path(__file__).parent.parent.parent
# Every module of the package and every CUDA or C source, as named in the wheel.
MODULES = {str(path.relative_to(ROOT)) for path in (ROOT / "cupy_msda").rglob("*.py")}
SOURCES = {f"cupy_msda/{path.relative_to(ROOT)}" for path in (ROOT / "cuda_src").rglob("*.*")}
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


@pytest.fixture
def clean_python(tmp_path):
    venv.create(tmp_path / "venv", with_pip=True)
    return tmp_path / "venv" / "bin" / "python"


def test_setup_lists_every_package_and_source():
    """The same as the wheel's test, without building one."""
    options = configparser.ConfigParser()
    options.read(ROOT / "setup.cfg")
    packages = options["options"]["packages"].split()
    assert {name.rpartition("/")[0].replace("/", ".") for name in MODULES} <= set(packages)
    patterns = options["options.package_data"]["cupy_msda.cuda_src"].split(",")
    folder = ROOT / "cuda_src"
    listed = {f"cupy_msda/{path.relative_to(ROOT)}" for pattern in patterns for path in folder.glob(pattern.strip())}
    assert listed == SOURCES


@network
def test_wheel_runs_with_numpy_alone(builds, clean_python, tmp_path):
    run(clean_python, "-m", "pip", "install", "-q", builds[0].wheel, cwd=tmp_path)
    where, rest = run(clean_python, "-c", PROGRAM, cwd=tmp_path).split(maxsplit=1)
    assert str(tmp_path) in where
    assert rest.strip() == "[[[5.0, 6.0]]] 2.0 True"
    assert "encoder" in run(clean_python, "-m", "cupy_msda", "check", cwd=tmp_path)
    assert "pip install" in run(clean_python, "-m", "cupy_msda", "info", cwd=tmp_path)


@network
def test_editable_install_runs(clean_python, tmp_path):
    run(clean_python, "-m", "pip", "install", "-q", "-e", ROOT, cwd=tmp_path)
    where, rest = run(clean_python, "-c", PROGRAM, cwd=tmp_path).split(maxsplit=1)
    assert str(ROOT) in where
    assert rest.strip() == "[[[5.0, 6.0]]] 2.0 True"
