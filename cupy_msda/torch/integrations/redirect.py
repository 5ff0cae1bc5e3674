"""Redirecting a function of Python: its holders call another one, until that is undone.

A model may hold a function in a module, under another module's name, in a layer or in a ``functools.partial``. All of
them hold one object, so the code of that object is exchanged, and no holder has to be found. ``torch.compile`` guards
on the code of the functions that it has compiled: compiled models follow.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from types import CodeType, FunctionType
from typing import Any

_POSITIONAL, _NAMED = 0x04, 0x08  # flags of code: *arguments, **named
_numbers = itertools.count()
#: Where calls go, by the number of the redirection. The original, once that is undone: a call may be on its way.
targets: dict[int, Callable[..., Any]] = {}


class Redirection:
    """A function whose calls can go elsewhere, by the names of its parameters.

    Attributes
    ----------
    function : FunctionType
        What holders have; it keeps its name, parameters and defaults.
    original : FunctionType
        What it was before, as a function of its own.
    """

    def __init__(self, function: FunctionType) -> None:
        self.function, self.original = function, _copy(function)
        self._number = next(_numbers)

    def to(self, target: Callable[..., Any]) -> None:
        """From now on, calls go to `target`."""
        targets[self._number] = target
        self.function.__code__ = _calling(self._number, self.original.__code__)

    def undo(self) -> None:
        """Restore the function."""
        self.function.__code__ = self.original.__code__
        targets[self._number] = self.original


def _copy(function: FunctionType) -> FunctionType:
    copy = FunctionType(
        function.__code__, function.__globals__, function.__name__, function.__defaults__, function.__closure__
    )
    copy.__kwdefaults__, copy.__qualname__ = function.__kwdefaults__, function.__qualname__
    copy.__module__, copy.__doc__ = function.__module__, function.__doc__
    copy.__dict__.update(function.__dict__)
    return copy


def _calling(number: int, code: CodeType) -> CodeType:
    """Code with the parameters and the number of free variables of `code` that calls a target.

    Python demands that the number of free variables stays, and torch's compiler keeps what it knows of the parameters.
    """
    positional = list(code.co_varnames[: code.co_argcount])
    rest = list(code.co_varnames[code.co_argcount :])
    keywords, rest = rest[: code.co_kwonlyargcount], rest[code.co_kwonlyargcount :]
    several = rest.pop(0) if code.co_flags & _POSITIONAL else None
    named = rest.pop(0) if code.co_flags & _NAMED else None
    only = code.co_posonlyargcount
    parameters = [*positional[:only], *(["/"] if only else []), *positional[only:]]
    parameters += [f"*{several}"] if several else ["*"] if keywords else []
    parameters += [*keywords, *([f"**{named}"] if named else [])]
    # With *arguments, what precedes them goes by position.
    by_position = len(positional) if several else only
    call = [*positional[:by_position], *([f"*{several}"] if several else [])]
    call += [f"{name}={name}" for name in (*positional[by_position:], *keywords)] + ([f"**{named}"] if named else [])
    free = code.co_freevars
    # The target is not a global of the function, whose module would then have a name that is not its own.
    lines = (
        f"def outer({', '.join(free)}):",
        f" def function({', '.join(parameters)}):",
        f"  from {__name__} import targets as _cupy_msda_targets",
        f"  return _cupy_msda_targets[{number}]({', '.join(call)})",
        f"  {'; '.join(free)}",
        " return function",
    )
    namespace: dict[str, Any] = {}
    exec(compile("\n".join(lines), f"<cupy_msda instead of {code.co_name}>", "exec"), namespace)
    function = namespace["outer"](*free)
    found: CodeType = function.__code__
    return found.replace(co_name=code.co_name, co_qualname=code.co_qualname)
