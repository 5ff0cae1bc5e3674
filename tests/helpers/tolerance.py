"""Errors as ||out - ref|| / ||ref||, held against the one tolerance table."""

import numpy as np

from cupy_msda.cli.check import TOLERANCE, relative_error


def assert_close(actual: np.ndarray, reference: np.ndarray, dtype: str, what: str = "output") -> None:
    assert actual.shape == reference.shape, f"{what}: {actual.shape} != {reference.shape}"
    error = relative_error(actual, reference)  # NaN where either side has one: a NaN never passes
    assert error <= TOLERANCE[dtype], f"{what}: error {error:.2e} exceeds {TOLERANCE[dtype]:.0e} for {dtype}"
