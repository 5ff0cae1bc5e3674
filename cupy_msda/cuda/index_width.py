"""Whether the indices of a kernel need 64 bits, or are too many for them: by what its spec says that it counts."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple, TypeVar

from ..call import Problem

if TYPE_CHECKING:
    from .kernel_spec import KernelSpec

Spec = TypeVar("Spec", bound="KernelSpec")

# Bits of the kernels' index types, without the sign.
INT, UNSIGNED, LONG = 31, 32, 63


class Index(NamedTuple):
    """How many elements, or other things, a kernel counts in a type of so many bits."""

    size: int
    bits: int

    @property
    def fits(self) -> bool:
        return self.size < 2**self.bits


class Sizes(NamedTuple):
    """Sizes of a launch that its specialisation does not know.

    `side` is the largest H and W, 0 where levels are not known. In a sorted sum a pixel gets `contributions` at
    most, and there is room for `queued` chunks of large buckets.
    """

    N: int
    S: int
    Q: int
    side: int = 0
    contributions: int = 0
    queued: int = 0


def sizes_of(problem: Problem) -> Sizes:
    """What the indices of a specialisation grow with."""
    side = max((max(h, w) for h, w, _ in problem.levels or ()), default=0)
    return Sizes(problem.N, problem.S, problem.Q, side)


def narrowest(make: Callable[[bool], Spec], problem: Problem) -> Spec:
    """The specialisation with 32-bit indices, or with 64-bit ones where its own count of the indices needs them.

    ``make(wide_index)`` makes it.
    """
    spec = make(False)
    return make(True) if spec.exceeded(sizes_of(problem)) else spec
