"""Entries of tuning: which axes they may set, within which ranges, for which problems, and how a call finds its own.

The planner asks :class:`Choices` after it has taken the entry of its launch table. An entry sets axes of a closed list
and nothing else, so the planner's own limits hold for it as for a table.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from ...call import FusedFrontEnd, Problem, Variant, Wanted

Axes = Mapping[str, int | str]

_BLOCK: dict[str, Sequence[int | str]] = {
    "warps": (1, 2, 4, 8, 16),
    "min_blocks": range(1, 33),
    "unroll": (1, 2, 4, 8),
}
#: The axes that an entry may set, by its subject, and their values. The subjects are kernels, those of `backward.cu` by
#: their use, and "grad_value", the way to sum the gradient of value.
AXES: dict[str, dict[str, Sequence[int | str]]] = {
    "forward": _BLOCK | {"lanes_per_query": (1, 2, 4, 8, 16, 32), "query_tiles": (1, 2)},
    "samples": _BLOCK,
    "atomics": _BLOCK,
    "aggregated": _BLOCK | {"aggregated_queries": (32, 64, 128)},
    "bucket_sort": {"warps": (4, 8), "min_blocks": _BLOCK["min_blocks"]},
    "reduce_buckets": _BLOCK,
    "grad_value": {"way": ("sorted", "atomics", "aggregated")},
}
#: The axes that change the order of a sum. No entry for deterministic calls has one.
ORDERED: dict[str, tuple[str, ...]] = {
    "forward": ("lanes_per_query",),
    "bucket_sort": ("warps",),
    "reduce_buckets": ("unroll",),
    "grad_value": ("way",),
}
#: The subjects whose choice depends on the gradients that are wanted.
OF_WANTED = ("samples", "atomics", "aggregated", "grad_value")
# An entry serves sizes up to 1.5 times larger or smaller than those that it was measured on: the factor as a logarithm.
_NEAR = math.log(1.5) + 1e-9


class Subject(NamedTuple):
    """What an entry is for: all of a problem that selects kernels, without its sizes.

    `wanted` is None where it does not matter, and `deterministic` False where it does not.
    """

    name: str
    value_dtype: str
    location_dtype: str
    M: int
    D: int
    points: tuple[int, ...]
    variant: Variant
    fused: FusedFrontEnd | None
    ragged: bool
    strided: bool
    pixel_queries: bool
    wanted: Wanted | None
    deterministic: bool


class Measured(NamedTuple):
    """The sizes that an entry was measured on."""

    N: int
    S: int
    Q: int


@dataclass(frozen=True)
class Entry:
    """A measured choice. An entry without axes says that the default is the best. Times are in microseconds."""

    subject: Subject
    sizes: Measured
    axes: Axes
    default_us: float
    tuned_us: float

    def __post_init__(self) -> None:
        """Raises ValueError for an axis or a value that an entry of this subject cannot have."""
        allowed = AXES.get(self.subject.name)
        if allowed is None:
            raise ValueError(f"expected one of {', '.join(AXES)}, got {self.subject.name!r}")
        ordered = ORDERED.get(self.subject.name, ())
        for axis, value in self.axes.items():
            if axis not in allowed or (self.subject.deterministic and axis in ordered):
                raise ValueError(f"{self.subject.name}: expected an axis of it, got {axis!r}")
            if type(value) not in (int, str) or value not in allowed[axis]:
                raise ValueError(f"{self.subject.name}: {axis}: expected one of {list(allowed[axis])}, got {value!r}")


def subject_of(name: str, problem: Problem, wanted: Wanted | None = None) -> Subject:
    """The subject `name` of a problem."""
    return Subject(
        name,
        problem.value_dtype,
        problem.location_dtype,
        problem.M,
        problem.D,
        problem.points,
        problem.variant._replace(num_points=None),
        problem.fused,
        problem.ragged,
        problem.value_strides is not None,
        problem.Q == problem.S,
        wanted if name in OF_WANTED else None,
        problem.deterministic and name in ORDERED,
    )


def measured_of(problem: Problem) -> Measured:
    """The sizes of a problem."""
    return Measured(problem.N, problem.S, problem.Q)


class Choices:
    """Entries by what they are for. Immutable; false where there are none."""

    def __init__(self, entries: Iterable[Entry] = ()) -> None:
        self.entries = tuple(entries)
        self._by_subject: dict[Subject, list[Entry]] = {}
        for entry in self.entries:
            self._by_subject.setdefault(entry.subject, []).append(entry)

    def __bool__(self) -> bool:
        return bool(self.entries)

    def find(self, subject: Subject, sizes: Measured) -> Entry | None:
        """The entry that was measured on the nearest sizes, if any are near enough."""
        near = [(_distance(entry.sizes, sizes), entry) for entry in self._by_subject.get(subject, ())]
        distance, found = min(near, key=lambda pair: (pair[0], pair[1].sizes), default=(math.inf, None))
        return found if distance <= _NEAR else None

    def axes(self, name: str, problem: Problem, wanted: Wanted | None = None) -> Axes:
        """The axes that are set for a problem: none where nothing is measured."""
        found = self.entry(name, problem, wanted)
        return found.axes if found else {}

    def entry(self, name: str, problem: Problem, wanted: Wanted | None = None) -> Entry | None:
        """The entry for a subject of a problem."""
        return self.find(subject_of(name, problem, wanted), measured_of(problem)) if self.entries else None

    def with_entry(self, entry: Entry) -> Choices:
        """The same, with another choice for what `entry` is for."""
        return Choices([*(e for e in self.entries if (e.subject, e.sizes) != (entry.subject, entry.sizes)), entry])


def _distance(a: Measured, b: Measured) -> float:
    """The larger one of the factors, as logarithms, between the queries of both and between the pixels of both."""
    if 0 in a or 0 in b:
        return math.inf
    return max(abs(math.log((a.N * a.Q) / (b.N * b.Q))), abs(math.log((a.N * a.S) / (b.N * b.S))))


#: Nothing is measured.
NONE = Choices()
