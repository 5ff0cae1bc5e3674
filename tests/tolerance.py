"""Errors as ||out - ref|| / ||ref||, held against the one tolerance table."""

import numpy as np

from cupy_msda.golden import TOLERANCE


def relative_error(actual: np.ndarray, reference: np.ndarray) -> float:
    """NaN where either side has one, so that a NaN never passes a comparison."""
    assert actual.shape == reference.shape, f"{actual.shape} != {reference.shape}"
    actual = actual.astype(np.float64)
    scale = np.linalg.norm(reference)
    return float(np.linalg.norm(actual - reference) / (scale if scale > 0 else 1.0))


def assert_close(actual: np.ndarray, reference: np.ndarray, dtype: str, what: str = "output") -> None:
    error = relative_error(actual, reference)
    assert error <= TOLERANCE[dtype], f"{what}: error {error:.2e} exceeds {TOLERANCE[dtype]:.0e} for {dtype}"
