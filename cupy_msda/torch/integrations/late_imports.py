"""Modules that were imported before the stand-in for a compiled extension was installed, and call that extension."""

from __future__ import annotations

import builtins
import dis
import inspect
import sys
import warnings
from collections.abc import Iterator
from types import FunctionType, ModuleType
from typing import Any

from torch.autograd import Function

_OPERATORS = ("ms_deform_attn_forward", "ms_deform_attn_backward")
_MISSING = object()


def mend(extension: ModuleType) -> list[tuple[dict[str, Any], str, Any]]:
    """Give `extension` to modules whose import of theirs has failed, and warn of those that have another one.

    Returns
    -------
    list of (namespace, name, before)
        What has been changed, for :func:`undo`; `before` is a private object where the name was not there.
    """
    changed = []
    for namespace, name, ours in _callers(extension):
        held = namespace.get(name, _MISSING)
        if held is None or held is _MISSING:
            namespace[name] = ours
            changed.append((namespace, name, held))
        elif held is not ours:
            warnings.warn(
                f"cupy_msda: {namespace.get('__name__')}.{name} is {held!r}, imported before install(); it goes on "
                "with that",
                stacklevel=3,
            )
    return changed


def undo(changed: list[tuple[dict[str, Any], str, Any]], extension: ModuleType) -> None:
    """Take back what :func:`mend` has changed, where it is still there."""
    ours = (extension, *(vars(extension)[name] for name in _OPERATORS))
    for namespace, name, before in changed:
        if not any(namespace.get(name) is one for one in ours):
            continue
        if before is _MISSING:
            del namespace[name]
        else:
            namespace[name] = before


def _callers(extension: ModuleType) -> Iterator[tuple[dict[str, Any], str, Any]]:
    """Namespaces with autograd functions that call the extension, the name that it has there, and what it should be."""
    seen = set()
    for module in list(sys.modules.values()):
        if type(module) is not ModuleType or module.__name__.partition(".")[0] in ("torch", "cupy_msda"):
            continue
        for found in list(vars(module).values()):
            if not (issubclass(type(found), type) and issubclass(found, Function)):
                continue
            for method in (found.forward, found.backward):
                function = inspect.unwrap(method)
                if isinstance(function, FunctionType) and function not in seen:
                    seen.add(function)
                    for name in _names_in(function):
                        ours = vars(extension)[name] if name in _OPERATORS else extension
                        yield function.__globals__, name, ours


def _names_in(function: FunctionType) -> set[str]:
    """Global names in the code of a function that are the extension, or one of its functions."""
    found, before = set(), None
    for instruction in dis.get_instructions(function):
        if instruction.opname in ("PUSH_NULL", "CACHE", "PRECALL"):
            continue
        if instruction.argval in _OPERATORS:
            if instruction.opname == "LOAD_GLOBAL":
                found.add(instruction.argval)
            elif before is not None and before.opname == "LOAD_GLOBAL":
                found.add(str(before.argval))
        before = instruction
    return {name for name in found if not hasattr(builtins, name)}
