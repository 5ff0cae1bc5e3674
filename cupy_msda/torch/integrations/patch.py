"""Exchanging functions and attributes of other packages, and putting them back."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from types import FunctionType
from typing import Any

import torch

from ..devices import serves
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

    return mark_stand_in(chosen, ours)


def mark_stand_in(function: Callable[..., Any], ours: Callable[..., Any]) -> Callable[..., Any]:
    """Note in `function` what it calls instead of the original."""
    function.__dict__[_OURS] = ours
    return function


def is_stand_in(function: Any) -> bool:
    """Whether a patch has put it there."""
    return hasattr(function, _OURS)


# Functions that :meth:`Patch.redirect` has redirected, and how many patches serve each.
_users: dict[FunctionType, tuple[Redirection, int]] = {}


def _release(function: FunctionType) -> None:
    """One patch less; the last one restores the function."""
    redirection, users = _users.pop(function)
    if users > 1:
        _users[function] = (redirection, users - 1)
    else:
        redirection.undo()


def is_shared(function: Any) -> bool:
    """Whether :meth:`Patch.redirect` has redirected it, so that another patch can serve it too."""
    return function in _users


# An attribute of the functions of :func:`standing_in`.
_OURS = "_cupy_msda_function"


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
        while self._undo:
            self._undo.pop()()
        self.served.clear()

    def redirect(self, function: FunctionType, ours: Callable[..., Any], value_at: int = 0) -> None:
        """Let `ours` answer the calls of a function, wherever it is held, except on devices without kernels."""
        if function not in _users:
            redirection = Redirection(function)
            redirection.to(standing_in(ours, redirection.original, value_at))
            _users[function] = (redirection, 0)
        redirection, users = _users[function]
        _users[function] = (redirection, users + 1)
        self._undo.append(lambda: _release(function))

    def at_undo(self, action: Callable[[], None]) -> None:
        """Do this, too, when everything is restored."""
        self._undo.append(action)

    def replace(self, owner: Any, name: str, new: Any) -> None:
        """Replace an attribute that `owner` has."""
        old = getattr(owner, name)
        setattr(owner, name, new)
        self._undo.append(lambda: setattr(owner, name, old))

    def add(self, owner: Any, name: str, new: Any) -> None:
        """Add an attribute that `owner` does not have itself."""
        setattr(owner, name, new)
        self._undo.append(lambda: delattr(owner, name))
