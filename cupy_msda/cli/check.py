"""``python -m cupy_msda check``: golden cases on every backend of this machine.

A golden case is a file of small inputs with float64 outputs and gradients. The inputs have 8 significant bits, which
are exact in every dtype, so that one file serves float16 to float64.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .. import api, arrays

# Limit of ||out - ref|| / ||ref|| for the output and each gradient, also in the tests and benchmarks.
TOLERANCE = {"float64": 1e-12, "float32": 5e-6, "float16": 6e-4, "bfloat16": 5e-3}
OUTPUTS = ("output", "grad_value", "grad_sampling_loc", "grad_attn_weight")


def folder() -> Path:
    """``golden_cases``: inside the package in a wheel, ``tests/golden`` in a checkout."""
    package = Path(__file__).resolve().parent.parent
    for found in (package / "golden_cases", package.parent / "tests" / "golden"):
        if any(found.glob("*.npz")):
            return found
    raise RuntimeError(f"the golden cases of cupy_msda are missing: expected them in {package / 'golden_cases'}")


def relative_error(out: np.ndarray, reference: np.ndarray) -> float:
    """||out - reference|| / ||reference||, which TOLERANCE limits; NaN where either has one."""
    scale = np.linalg.norm(reference)
    return float(np.linalg.norm(out.astype(np.float64) - reference) / (scale if scale > 0 else 1.0))


@dataclass(frozen=True)
class Backend:
    """Arrays that the operator runs on: `put` makes them from NumPy arrays, `get` makes NumPy arrays from them."""

    name: str
    put: Callable[[np.ndarray], Any]
    get: Callable[[Any], np.ndarray]


@dataclass(frozen=True)
class Row:
    """Error of one golden case on one backend: the largest of the output and the three gradients."""

    case: str
    backend: str
    dtype: str
    error: float
    worst: str

    @property
    def passed(self) -> bool:
        return self.error <= TOLERANCE[self.dtype]


def backends() -> Iterator[Backend]:
    """NumPy, and CuPy where it is installed and sees a device."""
    yield Backend("cpu", lambda array: array, np.asarray)
    if arrays.cuda_unavailable() is None:
        cupy = arrays.require_cupy("the cuda backend")
        yield Backend("cuda", cupy.asarray, cupy.asnumpy)


def run_case(path: Path, backend: Backend, dtype: str) -> Row:
    """Forward and backward of the case in `path`. bfloat16 is no NumPy dtype: only the tests check it."""
    with np.load(path) as case:
        floats = {
            name: backend.put(case[name].astype(dtype))
            for name in ("value", "sampling_loc", "attn_weight", "grad_output")
        }
        levels = (case["spatial_shapes"], case["level_start_index"])
        value, samples = floats["value"], (floats["sampling_loc"], floats["attn_weight"])
        results = (
            api.ms_deform_attn_forward(value, *levels, *samples, im2col_step=64),
            *api.ms_deform_attn_backward(value, *levels, *samples, floats["grad_output"], 64),
        )
        errors = {}
        for name, result in zip(OUTPUTS, results, strict=True):
            error = relative_error(backend.get(result), case[name])
            errors[name] = float("inf") if np.isnan(error) else error  # max ignores NaN
    worst = max(errors, key=errors.__getitem__)
    return Row(path.stem, backend.name, dtype, errors[worst], worst)


def run_all() -> Iterator[Row]:
    """Every golden case on every backend, in float64, float32 and float16."""
    for backend in backends():
        for path in sorted(folder().glob("*.npz")):
            for dtype in ("float64", "float32", "float16"):
                yield run_case(path, backend, dtype)
