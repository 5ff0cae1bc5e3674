"""Exchanging functions of other packages, putting them back, and counting what is served."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from types import FunctionType
from typing import Any

import torch

from ..devices import serves
from . import exchanges
from .redirect import Redirection

# Calls that what stands in for functions of models has served, in this process and outside of compiled code.
_served_calls = 0
_uncounted = False


def count_call() -> bool:
    """Count a call that is served, and say whether it counts.

    Compiled code has no counter: it would be compiled anew for each number.
    """
    global _served_calls
    if torch.compiler.is_compiling() or _uncounted:
        return False
    _served_calls += 1
    return True


@contextlib.contextmanager
def uncounted() -> Iterator[None]:
    """Calls inside of this context are not those of a model."""
    global _uncounted
    before, _uncounted = _uncounted, True
    try:
        yield
    finally:
        _uncounted = before


def served_calls() -> int:
    """How many calls have been counted."""
    return _served_calls


def standing_in(ours: Callable[..., Any], original: Callable[..., Any], value_at: int = 0) -> Callable[..., Any]:
    """`ours`, but `original` where the value is on a device without kernels: what works there goes on as it is.

    Meta tensors, which have shapes and no elements, go to `ours`.

    `value_at` is the place of the value among the arguments.
    """

    @functools.wraps(original)
    def chosen(*arguments: Any, **named: Any) -> Any:
        value = named["value"] if "value" in named else arguments[value_at]
        if not serves(value):
            return original(*arguments, **named)
        count_call()
        return ours(*arguments, **named)

    return chosen


class Patch:
    """What was replaced in another package. Leaving it as a context manager, or :meth:`undo`, restores everything.

    Attributes
    ----------
    served : list of str
        The layers and functions that this operator stands in for, as ``module.name``.
    """

    def __init__(self) -> None:
        self.served: list[str] = []
        self._undo: list[Callable[[], None]] = []

    def __enter__(self) -> Patch:
        return self

    def __exit__(self, *exception: object) -> None:
        self.undo()

    def undo(self) -> None:
        """Restore the package as it was before."""
        with exchanges.lock:
            while self._undo:
                self._undo.pop()()
        self.served.clear()

    def redirect(self, function: FunctionType, ours: Callable[..., Any], value_at: int = 0) -> None:
        """Let `ours` answer the calls of a function, wherever it is held, except on devices without kernels."""
        with exchanges.lock:
            if exchanges.answer_of(function) is None:
                redirection = Redirection(function)
                redirection.to(standing_in(ours, redirection.original, value_at))
                exchanges.add(function, ours, redirection.undo)
            self.at_undo(exchanges.use(function))

    def at_undo(self, action: Callable[[], None]) -> None:
        """Do this, too, when everything is restored."""
        self._undo.append(action)

    def replace(self, owner: Any, name: str, new: Any) -> None:
        """Replace an attribute that `owner` has."""
        old = getattr(owner, name)
        setattr(owner, name, new)
        self.at_undo(lambda: setattr(owner, name, old))
