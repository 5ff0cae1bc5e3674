"""A compiled extension that is not there: it can be imported, and its functions say what is missing."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any


class WithoutOperators(ModuleType):
    """A module that has a function of every name. Each raises with `remedy` when it is called."""

    def __init__(self, name: str, remedy: str) -> None:
        super().__init__(name, "A compiled extension that is not there.")
        self._remedy = remedy

    def __getattr__(self, name: str) -> Callable[..., Any]:
        if name.startswith("__"):
            raise AttributeError(name)

        def missing(*_: Any, **__: Any) -> Any:
            raise NotImplementedError(
                f"{self.__name__}.{name}: this operator is compiled and not there, and cupy_msda has no such operator: "
                f"{self._remedy}"
            )

        return missing
