"""Modules that were imported before the stand-in for a compiled extension was installed, and call that extension."""

from __future__ import annotations

import dis
import inspect
import sys
import warnings
from collections.abc import Iterator
from types import FunctionType, ModuleType
from typing import Any

from torch.autograd import Function

_OPERATOR = "ms_deform_attn_forward"
_MISSING = object()


def mend(extension: ModuleType) -> list[tuple[dict[str, Any], str, Any]]:
    """Give `extension` to modules whose import of theirs has failed, and warn of those that have another one.

    Returns
    -------
    list of (namespace, name, before)
        What has been changed, for :func:`undo`; `before` is a private object where the name was not there.
    """
    changed = []
    for namespace, name in _callers():
        held = namespace.get(name, _MISSING)
        if held is None or held is _MISSING:
            namespace[name] = extension
            changed.append((namespace, name, held))
        elif held is not extension and not (name == _OPERATOR and held is vars(extension)[_OPERATOR]):
            warnings.warn(
                f"cupy_msda: {namespace.get('__name__')}.{name} is {held!r}, imported before install(); it goes on "
                "with that",
                stacklevel=3,
            )
    return changed


def undo(changed: list[tuple[dict[str, Any], str, Any]], extension: ModuleType) -> None:
    """Take back what :func:`mend` has changed, where it is still there."""
    for namespace, name, before in changed:
        if namespace.get(name) is not extension:
            continue
        if before is _MISSING:
            del namespace[name]
        else:
            namespace[name] = before


def _callers() -> Iterator[tuple[dict[str, Any], str]]:
    """Namespaces with autograd functions that call the extension, and the name that it has there."""
    seen = set()
    for module in list(sys.modules.values()):
        if not isinstance(module, ModuleType) or module.__name__.partition(".")[0] in ("torch", "cupy_msda"):
            continue
        for found in list(vars(module).values()):
            if not (isinstance(found, type) and issubclass(found, Function)):
                continue
            forward = inspect.unwrap(found.forward)
            if isinstance(forward, FunctionType) and forward not in seen:
                seen.add(forward)
                if (name := _name_in(forward)) is not None:
                    yield forward.__globals__, name


def _name_in(forward: FunctionType) -> str | None:
    """The global name of the extension, or of its function, in the code of a forward."""
    of_global = None
    for instruction in dis.get_instructions(forward):
        if instruction.opname == "LOAD_GLOBAL":
            of_global = str(instruction.argval)
        if instruction.argval == _OPERATOR and instruction.opname in ("LOAD_ATTR", "LOAD_METHOD", "LOAD_GLOBAL"):
            return of_global
    return None
