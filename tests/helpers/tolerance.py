"""Errors as ||out - ref|| / ||ref||, compared with the one tolerance table."""

import numpy as np

from cupy_msda.cli.check import TOLERANCE, relative_error


def assert_close(actual: np.ndarray, reference: np.ndarray, dtype: str, what: str = "output") -> None:
    assert actual.shape == reference.shape, f"{what}: {actual.shape} != {reference.shape}"
    error = relative_error(actual, reference)  # NaN, which never passes, where either side has one
    assert error <= TOLERANCE[dtype], f"{what}: error {error:.2e} exceeds {TOLERANCE[dtype]:.0e} for {dtype}"
