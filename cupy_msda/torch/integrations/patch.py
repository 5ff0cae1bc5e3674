"""Replacing attributes of other packages, and putting them back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


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

    def replace(self, owner: Any, name: str, new: Any) -> None:
        """Replace an attribute that `owner` has."""
        old = getattr(owner, name)
        setattr(owner, name, new)
        self._undo.append(lambda: setattr(owner, name, old))

    def add(self, owner: Any, name: str, new: Any) -> None:
        """Add an attribute that `owner` does not have itself."""
        setattr(owner, name, new)
        self._undo.append(lambda: delattr(owner, name))
