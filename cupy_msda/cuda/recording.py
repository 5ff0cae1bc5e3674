"""Records the calls of a model, for tuning. Only what is prepared passes here: later calls cost nothing more."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, replace

from ..call import Problem, Wanted
from .tuning import loaded

_recorders: list[list[RecordedCall]] = []


@dataclass(frozen=True)
class RecordedCall:
    """A call on a GPU: its problem, and the gradients that a backward computes, or None for a forward."""

    problem: Problem
    wanted: Wanted | None


@contextlib.contextmanager
def record() -> Iterator[list[RecordedCall]]:
    """Record which problems the calls on GPUs have, each once, for :func:`cupy_msda.tune`.

    Calls of arrays and of torch are recorded when they are made, those of JAX when they are compiled.

    Yields
    ------
    list of RecordedCall
        Grows with the calls.
    """
    calls: list[RecordedCall] = []
    _recorders.append(calls)
    loaded.forget_launches()  # so that what has been called before is prepared, and noted, once more
    try:
        yield calls
    finally:
        _recorders[:] = [recorder for recorder in _recorders if recorder is not calls]


def note(problem: Problem, wanted: Wanted | None) -> None:
    """A call with this problem is prepared."""
    if not _recorders:
        return
    call = RecordedCall(replace(problem, levels=None, im2col_step=64), wanted)
    for calls in _recorders:
        if call not in calls:
            calls.append(call)
