"""``python -m cupy_msda check``: golden cases on every backend of this machine.

A golden case is a file of small inputs with float64 outputs and gradients. The inputs have 8 significant bits, which
are exact in every dtype, so that one file serves float16 to float64.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .. import api, arrays
from ..cpu import tier
from ..requirements import install
from .output import CommandError, one_line

# Limit of ||out - ref|| / ||ref|| for the output and each gradient, also in the tests and benchmarks.
TOLERANCE = {"float64": 1e-12, "float32": 5e-6, "float16": 6e-4, "bfloat16": 5e-3}
OUTPUTS = ("output", "grad_value", "grad_sampling_loc", "grad_attn_weight")


def folder() -> Path:
    """``golden_cases``: inside the package in a wheel, ``tests/golden`` in a checkout."""
    package = Path(__file__).resolve().parent.parent
    for found in (package / "golden_cases", package.parent / "tests" / "golden"):
        if any(found.glob("*.npz")):
            return found
    raise CommandError(f"the golden cases of cupy_msda are missing: expected them in {package / 'golden_cases'}")


def relative_error(out: np.ndarray, reference: np.ndarray) -> float:
    """||out - reference|| / ||reference||, which TOLERANCE limits; NaN where either has one."""
    scale = np.linalg.norm(reference)
    return float(np.linalg.norm(out.astype(np.float64) - reference) / (scale if scale > 0 else 1.0))


@dataclass(frozen=True)
class Backend:
    """Arrays that the operator runs on: `put` makes them from NumPy arrays, `get` makes NumPy arrays from them."""

    name: str
    device: str
    put: Callable[[np.ndarray], Any]
    get: Callable[[Any], np.ndarray]


@dataclass(frozen=True)
class Row:
    """Error of one golden case on one backend: the largest of the output and the three gradients.

    `worst` names that output, or says why there is no result.
    """

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
    computed = f"arrays of NumPy {np.__version__}, computed by {tier.describe()}"
    yield Backend("cpu", computed, lambda array: array, np.asarray)
    if arrays.cuda_unavailable() is None:
        cupy = arrays.require_cupy("the cuda backend")
        yield Backend("cuda", f"CuPy {cupy.__version__}, {_current_gpu(cupy)}", cupy.asarray, cupy.asnumpy)


def not_checked() -> list[str]:
    """What no golden case runs on here, and why."""
    reason = arrays.cuda_unavailable()
    found = [
        "" if reason is None else f"cuda: {reason}",
        _bfloat16_not_checked(cuda=reason is None),
        "the functions and layers of torch, which the test suite checks",
    ]
    return [text for text in found if text]


def _bfloat16_not_checked(*, cuda: bool) -> str:
    if _bfloat16() is None:
        return f"bfloat16, which is a dtype of ml_dtypes: {install('ml_dtypes')}"
    return "bfloat16 on cuda, which the test suite checks" if cuda else ""


def _bfloat16() -> Any:
    """The NumPy dtype of ml_dtypes, or None where that cannot be imported."""
    try:
        import ml_dtypes
    except Exception:  # a broken installation raises anything
        return None
    return np.dtype(ml_dtypes.bfloat16)


def dtypes_of(backend: Backend) -> list[str]:
    """What the golden cases run in. bfloat16 needs ml_dtypes, and runs on the CPU alone."""
    of_numpy = ["float64", "float32", "float16"]
    return [*of_numpy, "bfloat16"] if backend.name == "cpu" and _bfloat16() is not None else of_numpy


def run_case(path: Path, backend: Backend, dtype: str) -> Row:
    """Forward and backward of the case in `path`."""
    of_inputs = _bfloat16() if dtype == "bfloat16" else np.dtype(dtype)
    with np.load(path) as case:
        floats = {
            name: backend.put(case[name].astype(of_inputs))
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
    """Every golden case on every backend, in every dtype of the backend. A case that raises is a wrong result."""
    for backend in backends():
        for path in sorted(folder().glob("*.npz")):
            for dtype in dtypes_of(backend):
                try:
                    yield run_case(path, backend, dtype)
                except Exception as error:
                    reason = f"{type(error).__name__}: {one_line(error)}"
                    yield Row(path.stem, backend.name, dtype, float("inf"), reason)


def verdict(rows: Sequence[Row]) -> str:
    """The last line: whether all results are right, and where."""
    names = list(dict.fromkeys(row.backend for row in rows))
    wrong = [row for row in rows if not row.passed]
    if not wrong:
        return f"all right: {len(rows)} of {len(rows)} results are within their tolerance, on {' and '.join(names)}"
    where = ", ".join(f"{count} on {name}" for name in names if (count := sum(row.backend == name for row in wrong)))
    return f"WRONG: {len(wrong)} of {len(rows)} results are beyond their tolerance: {where}"


def _current_gpu(cupy: Any) -> str:
    try:
        runtime = cupy.cuda.runtime
        number, others = runtime.getDevice(), runtime.getDeviceCount() - 1
        name = runtime.getDeviceProperties(number)["name"].decode()
    except Exception as error:  # its cases then fail, and say more
        return f"a GPU that cannot be asked: {one_line(error)}"
    return f"GPU {number} ({name})" + (f", none of the {others} others" if others else "")
