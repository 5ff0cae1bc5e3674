"""On a GPU, the operator runs where CuPy cannot use its cache folder, with one warning."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import cupy_msda

ROOT = Path(cupy_msda.__file__).parent.parent
CALLS = """
import os, sys, warnings
import numpy as np
import cupy_msda
value, locations = np.ones((1, 6, 1, 4), "f4"), np.full((1, 3, 1, 1, 2, 2), 0.5, "f4")
weights, grad = np.full((1, 3, 1, 1, 2), 0.5, "f4"), np.ones((1, 3, 4), "f4")
with warnings.catch_warnings(record=True) as seen:
    warnings.simplefilter("always")
    if sys.argv[1] == "torch":
        import torch
        on_gpu = lambda array: torch.from_numpy(array).cuda()
    else:
        import cupy
        on_gpu = cupy.asarray
        os.rmdir(os.environ["CUPY_CACHE_DIR"])
        open(os.environ["CUPY_CACHE_DIR"], "w").close()
    value, locations, weights, grad = map(on_gpu, (value, locations, weights, grad))
    output = cupy_msda.ms_deform_attn(value, [(2, 3)], None, locations, weights)
    grads = cupy_msda.ms_deform_attn_backward(value, [(2, 3)], None, locations, weights, grad, 64)
print(float(output.sum()), float(grads[0].sum()), len([w for w in seen if "CUPY_CACHE_DIR" in str(w.message)]))
"""


def run(tmp_path, code, *arguments):
    variables = {"CUPY_CACHE_DIR": str(tmp_path / "cache"), "PYTHONPATH": str(ROOT), "CUPY_CACHE_IN_MEMORY": "0"}
    command = [sys.executable, *code, *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | variables, timeout=300)


@pytest.mark.gpu
@pytest.mark.parametrize("framework", ["torch", "cupy"])
def test_kernels_compile_without_a_cache_folder(tmp_path, framework):
    if framework == "torch":
        pytest.importorskip("torch")
        (tmp_path / "cache").touch()
    done = run(tmp_path, ("-c", CALLS), framework)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "12.0 12.0 1\n"


@pytest.mark.gpu
def test_check_runs_on_the_gpu_without_a_cache_folder(tmp_path):
    (tmp_path / "cache").touch()
    done = run(tmp_path, ("-m", "cupy_msda"), "check")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1].endswith("on cpu and cuda")
    assert done.stderr.count("CUPY_CACHE_DIR") == 1
