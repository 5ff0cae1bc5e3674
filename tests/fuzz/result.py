"""One expected result of a call, element by element."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

LIMIT = {"float16": 65504.0, "bfloat16": 3.38e38, "float32": 3.4e38, "float64": 1.7e308}


class Expected(NamedTuple):
    """One result: its numbers, how far off each may be, where it must be NaN or not finite, and where it may be.

    `loose`: where it is infinite or NaN by the order of the arithmetic. The contract says that a NaN reaches "the
    outputs that use it". It leaves open whether an infinity becomes NaN: infinity times a sum is infinite, while the
    sum of infinity times each term may be NaN, and so may a + w * (b - a) where (1 - w) * a + w * b is infinite.
    """

    numbers: Any
    bound: Any
    nan: Any
    not_finite: Any
    open: Any
    loose: Any

    @classmethod
    def zeros(cls, xp: Any, shape: tuple[int, ...]) -> Expected:
        """Zeros, exactly."""
        numbers, never = xp.zeros(shape), xp.zeros(shape, bool)
        return cls(numbers, numbers, never, never, never, never)

    def opened(self, xp: Any) -> Expected:
        """With nothing to be said about any element."""
        never = xp.zeros_like(self.open)
        return self._replace(nan=never, not_finite=never, open=~never)

    def scaled(self, factor: Any) -> Expected:
        """The result times a factor. Where a sample has no part in it, the factor has none either, whatever it is."""
        xp = module_of(self.numbers)
        no_part = (self.bound == 0) & ~self.open
        not_zero = (abs(self.numbers) > self.bound) | self.not_finite
        bad = ~xp.isfinite(factor)
        return Expected(
            xp.where(no_part, 0, self.numbers * factor),
            self.bound * xp.where(bad, 0, abs(factor)),
            self.nan | (xp.isnan(factor) & not_zero),
            self.not_finite | (bad & not_zero),
            self.open | (bad & ~no_part),
            self.loose | bad,
        )

    def summed(self, axis: int | tuple[int, ...]) -> Expected:
        parts = (self.numbers.sum(axis), self.bound.sum(axis))
        return Expected(*parts, *(mask.any(axis) for mask in self[2:]))


def module_of(array: Any) -> Any:
    """NumPy or CuPy."""
    if isinstance(array, np.ndarray):
        return np
    import cupy

    return cupy
