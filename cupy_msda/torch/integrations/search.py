"""Finding what may compute multi-scale deformable attention: in modules, in the layers of a model, in imports."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, SourceFileLoader
from importlib.util import _LazyModule  # type: ignore[attr-defined]
from types import BuiltinMethodType, FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import nn
from torch.autograd import Function

from .conventions import NAME

# Packages that have no such function. Their modules are most of those that are loaded.
_SKIPPED = ("torch", "cupy_msda", "numpy", "cupy", "scipy", "triton", "sympy", "jax", "matplotlib")


@dataclass(frozen=True)
class Candidate:
    """A function, an autograd function or a method, such as the forward of a layer.

    Attributes
    ----------
    found : FunctionType, type or object
        A function of Python, a subclass of ``torch.autograd.Function``, or what cannot be exchanged.
    cls : type or None
        The class of which it is a method.
    instance : object or None
        An object of that class.
    holder : tuple or None
        Who holds the ``apply`` of an autograd function, and under which name.
    is_compiled : bool
        Whether it was found in what ``torch.compile`` has made of it.
    """

    name: str
    found: Any
    cls: type | None = None
    instance: Any = None
    holder: tuple[Any, str] | None = None
    is_compiled: bool = False


def in_module(module: ModuleType) -> Iterator[Candidate]:
    """Candidates that a module has, its own or those of other modules."""
    if type(module) is _LazyModule:  # a look at it would import it
        return
    for name, found in list(vars(module).items()):
        yield from _of(found, name, module)
        if issubclass(type(found), type) and found.__module__ == module.__name__:
            yield from _in_class(found)


def in_loaded_modules() -> Iterator[Candidate]:
    """Candidates of all modules that are imported."""
    for name, module in list(sys.modules.items()):
        if issubclass(type(module), ModuleType) and name.partition(".")[0] not in _SKIPPED:
            yield from in_module(module)


def in_model(model: nn.Module) -> Iterator[Candidate]:
    """Candidates that layers keep as attributes, and those of the classes of layers."""
    for layer in model.modules():
        for name, found in list(vars(layer).items()):
            yield from _of(found, name, layer)
        for cls in type(layer).__mro__:
            if not _is_skipped(cls):
                yield from _of_class(cls, layer)
                yield from _in_class(cls, layer)


def attention_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Layers whose class is named after deformable attention, without those of this package."""
    return {
        name: layer
        for name, layer in model.named_modules()
        if NAME.search(type(layer).__name__) and not type(layer).__module__.startswith("cupy_msda.")
    }


def compiled_parts(model: nn.Module) -> list[str]:
    """Parts of a model whose code is fixed already: a patch does not reach what was scripted or traced."""
    return [name or "the model" for name, part in model.named_modules() if isinstance(part, torch.jit.ScriptModule)]


def _in_class(cls: type, instance: Any = None) -> Iterator[Candidate]:
    """Methods that are named after the operator."""
    if issubclass(cls, Function):
        return
    for name, found in list(vars(cls).items()):
        if isinstance(found, staticmethod):
            yield from _of(found.__func__, name, cls)
        elif isinstance(found, FunctionType) and NAME.search(found.__name__):
            yield Candidate(_name_of(found), found, cls, instance)


def _of_class(cls: type, instance: Any = None) -> Iterator[Candidate]:
    """An autograd function, or the method by which an object that is named after the operator is called."""
    if not NAME.search(cls.__name__) or _is_skipped(cls):
        return
    if issubclass(cls, Function):
        yield Candidate(_name_of(cls), cls)
        return
    method = getattr(cls, "forward" if issubclass(cls, nn.Module) else "__call__", None)
    if isinstance(method, FunctionType) and not _is_skipped(method):
        yield Candidate(_name_of(cls), method, cls, instance)


def _of(held: Any, name: str, owner: Any) -> Iterator[Candidate]:
    """The candidate that an attribute of `owner` is or keeps.

    Only types are looked at: an object may answer any question with an error.
    """
    found: Any = held
    while issubclass(type(found), functools.partial):
        found = found.func
    kind: type = type(found)
    if kind in (MethodType, BuiltinMethodType):
        yield from _of_method(found, name, owner)
    elif kind is FunctionType:
        # A compiled function keeps what it was made of, and torch's compiler sees that change.
        inner = vars(found).get("_torchdynamo_orig_callable", found)
        if type(inner) is FunctionType and NAME.search(inner.__name__) and not _is_skipped(inner):
            yield Candidate(_name_of(inner), inner, is_compiled=inner is not found)
    elif kind is torch.jit.ScriptFunction:
        if NAME.search(name):
            yield Candidate(name, found)
    elif issubclass(kind, type):
        yield from _of_class(found)
    elif not issubclass(kind, nn.Module):
        yield from _of_class(kind, found)


def _of_method(found: Any, name: str, owner: Any) -> Iterator[Candidate]:
    """A method that is kept, such as the `apply` of an autograd function."""
    receiver = found.__self__
    if issubclass(type(receiver), type) and issubclass(receiver, Function):
        if NAME.search(receiver.__name__):
            yield Candidate(_name_of(receiver), receiver, holder=(owner, name))
        return
    function = getattr(found, "__func__", None)
    if type(function) is FunctionType and NAME.search(function.__name__) and not _is_skipped(found):
        yield Candidate(_name_of(found), function, type(receiver), receiver)


def _name_of(found: Any) -> str:
    return f"{found.__module__}.{found.__qualname__}"


def _is_skipped(found: Any) -> bool:
    return (getattr(found, "__module__", None) or "").partition(".")[0] in _SKIPPED


class ImportWatch(MetaPathFinder):
    """Hands each module that is imported from a source file to `seen`, after its code has run."""

    def __init__(self, seen: Callable[[ModuleType], None]) -> None:
        self._seen = seen

    def start(self) -> None:
        """Watch imports."""
        sys.meta_path.insert(0, self)

    def stop(self) -> None:
        """Watch no longer."""
        if self in sys.meta_path:
            sys.meta_path.remove(self)

    def find_spec(self, fullname: str, path: Any, target: ModuleType | None = None) -> ModuleSpec | None:
        """Of the import system: what the other finders find, with a loader that reports."""
        if fullname.partition(".")[0] in _SKIPPED:
            return None
        # Those after this one, so that another watch is asked in its turn.
        for finder in sys.meta_path[sys.meta_path.index(self) + 1 :]:
            spec = finder.find_spec(fullname, path, target) if hasattr(finder, "find_spec") else None
            if spec is not None:
                # Loaders of other kinds may be shared between modules.
                if type(spec.loader) is SourceFileLoader:
                    self._report_from(spec.loader)
                return spec
        return None

    def _report_from(self, loader: SourceFileLoader) -> None:
        execute = loader.exec_module

        def exec_module(module: ModuleType) -> None:
            execute(module)
            if self in sys.meta_path:
                self._seen(module)

        loader.exec_module = exec_module  # type: ignore[method-assign]
