"""A command whose package is missing ends with a sentence, not with a traceback."""

import os
import subprocess
import sys

import pytest

from tests.helpers import pages


@pytest.mark.parametrize(
    ("command", "module", "words"),
    [
        (
            ["cupy_msda.torch.extension", "X"],
            "torch",
            "cupy_msda.torch needs torch, which is not",
        ),
        (["benchmarks.run"], "torch", "needs torch, which is not installed: pip install"),
        (["tests.gpu", "--out", "x"], "torch", "needs torch, which is not installed: pip install"),
        (["tests.packaging.check_release", "v1"], "yaml", "needs yaml, which is not installed: pip install"),
    ],
)
def test_a_missing_package_is_a_sentence(tmp_path, command, module, words):
    (tmp_path / f"{module}.py").write_text(f"raise ModuleNotFoundError('no {module}', name={module!r})\n")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, (tmp_path, pages.ROOT)))}
    done = subprocess.run(
        [sys.executable, "-m", *command], capture_output=True, text=True, env=environment, cwd=pages.ROOT
    )
    assert done.returncode == 1
    assert words in done.stderr
    assert done.stderr.count("\n") == 1


def test_gpu_tests_without_a_gpu_are_a_sentence(tmp_path):
    torch = pytest.importorskip("torch")
    if torch.cuda.is_available():
        pytest.skip("needs a machine without a GPU")
    done = subprocess.run(
        [sys.executable, "-m", "tests.gpu", "--out", str(tmp_path)], capture_output=True, text=True, cwd=pages.ROOT
    )
    assert done.returncode == 2
    assert "expected an NVIDIA GPU and a torch for CUDA, got none" in done.stderr
    assert "Traceback" not in done.stderr
