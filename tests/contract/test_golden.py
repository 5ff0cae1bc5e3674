"""The golden files: every backend reproduces their outputs, and one command reproduces the files."""

import importlib.util
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

import cupy_msda
from cupy_msda.cli import check
from tests.helpers import reference
from tests.helpers.tolerance import TOLERANCE, assert_close

PATHS = sorted(check.folder().glob("*.npz"))


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("path", PATHS, ids=lambda p: p.stem)
def test_every_backend_reproduces_the_outputs(backend, path, dtype):
    if backend.name == "cupy" and dtype == "bfloat16":
        pytest.skip("this CuPy cannot make a bfloat16 array")
    real = ml_dtypes.bfloat16 if dtype == "bfloat16" else np.dtype(dtype)
    case = dict(np.load(path))
    value, locations, weights, grad_output = (
        backend.put(case[name].astype(real)) for name in ("value", "sampling_loc", "attn_weight", "grad_output")
    )
    metadata = (case["spatial_shapes"], case["level_start_index"])
    output = cupy_msda.ms_deform_attn_forward(value, *metadata, locations, weights, 64)
    grads = cupy_msda.ms_deform_attn_backward(value, *metadata, locations, weights, grad_output, 64)
    for name, result in zip(check.OUTPUTS, (output, *grads), strict=True):
        assert_close(backend.get(result), case[name], dtype, name)


@pytest.mark.parametrize("path", PATHS, ids=lambda p: p.stem)
def test_reference_reproduces_the_outputs(path):
    case = dict(np.load(path))
    names = ("value", "spatial_shapes", "level_start_index", "sampling_loc", "attn_weight")
    arguments = [case[name] for name in names]
    assert_close(reference.forward(*arguments), case["output"], "float64")
    for name, grad in zip(check.OUTPUTS[1:], reference.backward(*arguments, case["grad_output"]), strict=True):
        assert_close(grad, case[name], "float64", name)


def test_inputs_are_exact_in_every_dtype():
    for path in PATHS:
        case = dict(np.load(path))
        for name in ("value", "sampling_loc", "attn_weight", "grad_output"):
            for dtype in (np.float16, ml_dtypes.bfloat16):
                np.testing.assert_array_equal(case[name].astype(dtype).astype(np.float64), case[name])


def test_one_command_makes_the_files(monkeypatch, tmp_path):
    script = Path(__file__).parent.parent / "golden" / "make.py"
    spec = importlib.util.spec_from_file_location("make_golden", script)
    make = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(make)
    monkeypatch.setattr(make, "__file__", str(tmp_path / "make.py"))
    make.main()
    assert [p.name for p in sorted(tmp_path.glob("*.npz"))] == [p.name for p in PATHS]
    for path in PATHS:
        made, kept = dict(np.load(tmp_path / path.name)), dict(np.load(path))
        assert made.keys() == kept.keys()
        for name, array in kept.items():
            np.testing.assert_allclose(made[name], array, rtol=1e-12, atol=1e-14)
