"""What the paths gave, held against the contract and against each other."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from .draw import Case
from .result import Expected

CONTRACT_ERRORS = ("TypeError", "ValueError")


@dataclass
class Outcome:
    """What one path gave: arrays in the shapes of Case by name, or an error; and what else it did wrong."""

    results: dict[str, np.ndarray] = field(default_factory=dict)
    error: BaseException | None = None
    wrong: list[str] = field(default_factory=list)

    @property
    def raised(self) -> str | None:
        return type(self.error).__name__ if self.error else None


class Failure(NamedTuple):
    """A difference: what kind, between which paths, of which result, and in words."""

    kind: str
    paths: str
    result: str
    detail: str

    def __str__(self) -> str:
        return f"{self.kind} [{self.paths}] {self.result}: {self.detail}"


def compare(case: Case, outcomes: dict[str, Outcome], want: dict[str, Expected] | None) -> list[Failure]:
    """All differences. `want` is None for an invalid call."""
    found = []
    for path, outcome in outcomes.items():
        found += [Failure("property", path, "", wrong) for wrong in outcome.wrong]
    if want is None:
        return found + _errors(outcomes)
    for path, outcome in outcomes.items():
        if outcome.error is not None:
            message = str(outcome.error).strip().split("\n")[0][:200]
            found.append(Failure("error", path, "", f"{outcome.raised}: {message}"))
            continue
        for name, have in outcome.results.items():
            detail = difference(have, want[name])
            if detail:
                found.append(Failure("contract", path, name, detail))
    for (one, left), (other, right) in itertools.combinations(outcomes.items(), 2):
        for name in left.results.keys() & right.results.keys():
            detail = _disagreement(left.results[name], right.results[name], want[name])
            if detail:
                found.append(Failure("disagree", f"{one}, {other}", name, detail))
    return found + _bits(outcomes)


def _errors(outcomes: dict[str, Outcome]) -> list[Failure]:
    """An invalid call raises one of the contract's errors, the same on every path."""
    raised = {path: outcome.raised or "nothing" for path, outcome in outcomes.items()}
    if len(set(raised.values())) == 1 and set(raised.values()) <= set(CONTRACT_ERRORS):
        return []
    text = ", ".join(f"{path}: {name}" for path, name in raised.items())
    return [Failure("refusal", ", ".join(raised), "", text)]


def difference(have: np.ndarray, want: Expected) -> str | None:
    """How a result breaks the contract, or None."""
    if have.shape != want.numbers.shape:
        return f"shape {list(have.shape)}, expected {list(want.numbers.shape)}"
    have = have.astype(np.float64)
    finite = np.isfinite(have)
    with np.errstate(all="ignore"):
        off = finite & ~want.open & ~want.not_finite & ~(abs(have - want.numbers) <= want.bound)
    for mask, text in (
        (want.nan & ~np.isnan(have), "expected NaN"),
        (want.not_finite & finite, "expected no finite number"),
        (~finite & ~want.open & ~want.not_finite, "expected a finite number"),
        (off, "off"),
    ):
        if mask.any():
            at = tuple(int(i) for i in np.argwhere(mask)[0])
            numbers = f"got {have[at]:.9g}, want {want.numbers[at]:.9g} +- {want.bound[at]:.2g}"
            return f"{text} at {list(at)}: {numbers}, {mask.sum()} of {mask.size}"
    return None


def _disagreement(left: np.ndarray, right: np.ndarray, want: Expected) -> str | None:
    """Where two paths differ in what is not finite, or by more than both may be off."""
    if left.shape != right.shape:
        return f"shapes {list(left.shape)} and {list(right.shape)}"
    left, right = left.astype(np.float64), right.astype(np.float64)
    # Rounding decides on which side of a kink or of the largest number an open element is.
    settled = want.not_finite | ~want.open
    finite, other_finite = np.isfinite(left), np.isfinite(right)
    if finite.all() and other_finite.all():
        pattern = np.zeros(left.shape, bool)
    else:
        loose = want.loose & ~finite & ~other_finite
        pattern = settled & ~loose & (_class_of(left) != _class_of(right))
    with np.errstate(all="ignore"):
        numbers = settled & finite & other_finite & ~(abs(left - right) <= 2 * want.bound)
    for mask, text in ((pattern, "not finite in another way"), (numbers, "differ")):
        if mask.any():
            at = tuple(int(i) for i in np.argwhere(mask)[0])
            return f"{text} at {list(at)}: {left[at]:.9g} and {right[at]:.9g}, {mask.sum()} of {mask.size}"
    return None


def _class_of(numbers: np.ndarray) -> np.ndarray:
    """0: finite, 1: infinite, 2: minus infinite, 3: NaN."""
    return np.isposinf(numbers) + 2 * np.isneginf(numbers) + 3 * np.isnan(numbers)


def _bits(outcomes: dict[str, Outcome]) -> list[Failure]:
    """On the CPU every path through the package's own code gives the same bits."""
    found = []
    same = [path for path in ("array", "eager", "registered") if path in outcomes]
    for one, other in itertools.pairwise(same):
        left, right = outcomes[one].results, outcomes[other].results
        for name in left.keys() & right.keys():
            if left[name].tobytes() != right[name].tobytes() and not _equal(left[name], right[name]):
                found.append(Failure("bits", f"{one}, {other}", name, "other bits"))
    return found


def _equal(left: Any, right: Any) -> bool:
    """Equal numbers, every NaN like any other."""
    return np.array_equal(left.astype(np.float64), right.astype(np.float64), equal_nan=True)
