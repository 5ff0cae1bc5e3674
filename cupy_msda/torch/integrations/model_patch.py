"""Replaces what computes multi-scale deformable attention, wherever it is held, and keeps account of it."""

from __future__ import annotations

import dataclasses
import functools
from collections import Counter
from collections.abc import Callable, Iterable
from types import FunctionType, ModuleType
from typing import Any

import torch
from torch import nn
from torch.autograd import Function

from . import exchanges, search
from .conventions import NAME, read_signature
from .layer_watch import LayerWatch
from .patch import Patch
from .probe import probe
from .receivers import Receivers, takes_no_arguments
from .redirect import Redirection
from .report import Line, Report
from .search import Candidate
from .served import CompiledOperator, Served

# An attribute of the `apply` that takes the place of that of an autograd function. A subclass has it too.
_STANDS_IN = "_cupy_msda_stands_in"


class ModelPatch(Patch):
    """What :func:`cupy_msda.torch.patch` has replaced. A context manager; :meth:`undo` restores everything.

    Several patches may serve one function, and be undone in any order.
    """

    def __init__(self) -> None:
        super().__init__()
        # What is served, and its calls and those that were left before that.
        self._served: list[tuple[Served | CompiledOperator, int, Counter[str]]] = []
        self._others: dict[str, Line] = {}
        self._seen: set[Any] = set()
        # Whose `apply` this patch has exchanged, and what it serves.
        self._held: set[Any] = set()
        self._used: set[Any] = set()
        self._final: Report | None = None
        self._has_compiled = False

    def report(self) -> Report:
        """What is served, how often it was called since, and what is not served and why."""
        if self._final is not None:
            return self._final
        return Report([*(one.line(calls, left) for one, calls, left in self._served), *self._others.values()])

    def __repr__(self) -> str:
        return str(self.report())

    def undo(self) -> None:
        """Restore everything. The report stays as it is."""
        with exchanges.lock:
            self._final = self.report()
            super().undo()

    def serve(self, candidates: Iterable[Candidate]) -> None:
        """Replace those that compute the operator, and note the others."""
        with exchanges.lock:
            for candidate in candidates:
                self._has_compiled |= candidate.is_compiled
                key = (candidate.found, id(candidate.instance))
                if key not in self._seen:
                    self._seen.add(key)
                    self._serve(candidate)
                if candidate.holder is not None:
                    self._serve_holder(*candidate.holder, candidate.found)

    def serve_compiled(self, module: ModuleType, name: str, ours: Callable[..., Any]) -> None:
        """Replace a function of a compiled extension: who calls it holds the module."""
        with exchanges.lock:
            key, original = f"{module.__name__}.{name}", getattr(module, name)
            if exchanges.answer_of(key) is None:
                served = CompiledOperator(key, ours, original)
                setattr(module, name, served)
                self._add(key, served, lambda: setattr(module, name, original))
            self._use(key, key)

    def watch_imports(self) -> None:
        """Serve what is imported from now on, too."""

        def imported(module: ModuleType) -> None:
            self.serve(search.in_module(module))

        watch = search.ImportWatch(imported)
        watch.start()
        self._undo.append(watch.stop)

    def watch_layers(self, model: nn.Module) -> None:
        """Warn where an attention layer of `model` is called and the operator is not."""
        for name in search.compiled_parts(model):
            self._others[name] = Line(name, "compiled already", reason="torch.jit has fixed its code")

        def bypassed(name: str) -> None:
            self._others[name] = Line(name, "kept", reason="a call of this layer did not reach the operator")

        # Where a function is compiled by itself, layers that call it do not know.
        for name, layer in () if self._has_compiled else search.attention_layers(model).items():
            self._undo.append(LayerWatch(name, layer, bypassed).stop)

    def _serve(self, candidate: Candidate) -> None:
        found = candidate.found
        if isinstance(exchanges.answer_of(found), Served):
            self._use(found, candidate.name)
        elif isinstance(found, torch.jit.ScriptFunction):
            self._leave(candidate, "torch.jit has fixed its code", "compiled already")
        elif exchanges.answer_of(found) is not None or hasattr(getattr(found, "apply", None), _STANDS_IN):
            self._leave(candidate, "another patch serves it")
        elif isinstance(found, FunctionType):
            self._serve_function(candidate)
        else:
            self._serve_autograd_function(candidate)

    def _serve_function(self, candidate: Candidate) -> None:
        signature = read_signature(candidate.found, candidate.cls is not None)
        if isinstance(signature, str):
            # The forward of most layers takes features and reference points; what it calls is the operator.
            if candidate.cls is None or NAME.search(candidate.found.__name__):
                self._leave(candidate, signature)
            return
        redirection = Redirection(candidate.found)
        compare = functools.partial(probe, redirection.original, signature)
        receivers = None
        if candidate.cls is None:
            finding = compare()
        else:
            receivers, receiver = Receivers(compare), candidate.instance
            if receiver is None and not takes_no_arguments(candidate.cls):
                self._leave(candidate, "no object of its class is known: patch(model) finds those of a model")
                return
            try:
                finding = receivers.learn(candidate.cls() if receiver is None else receiver)
            except Exception as error:
                self._leave(candidate, f"its class raised {type(error).__name__}: {error}")
                return
        if not finding.layouts or (receivers is not None and not finding.is_verified):
            self._leave(candidate, finding.problem)
            return
        served = Served(candidate.name, redirection.original, signature, finding, receivers)
        redirection.to(served)
        self._add(candidate.found, served, redirection.undo)
        self._use(candidate.found, candidate.name)

    def _serve_autograd_function(self, candidate: Candidate) -> None:
        """Its `apply` is replaced, not its forward: its graph would hide the operator from torch's transformations."""
        function, original = candidate.found, candidate.found.apply
        has_context = function.setup_context is Function.setup_context
        signature = read_signature(function.forward, has_context)
        if isinstance(signature, str):
            self._leave(candidate, signature)
            return
        signature = dataclasses.replace(signature, names=signature.names[has_context:])
        finding = probe(original, signature)
        if not finding.layouts:
            self._leave(candidate, finding.problem)
            return
        served = Served(candidate.name, original, signature, finding)

        def apply(cls: type, *arguments: Any) -> Any:
            if cls is function:
                return served(*arguments)
            return original.__func__(cls, *arguments)  # a subclass, which may compute something else

        before = vars(function).get("apply")
        setattr(apply, _STANDS_IN, True)
        function.apply = classmethod(apply)

        def undo() -> None:
            if before is None:
                delattr(function, "apply")
            else:
                function.apply = before

        self._add(function, served, undo)
        self._use(function, candidate.name)

    def _serve_holder(self, owner: Any, name: str, function: Any) -> None:
        """Give one who kept the `apply` of an autograd function the one that it has now."""
        key = (id(owner), name)
        if exchanges.answer_of(function) is None or key in self._held:
            return
        if exchanges.answer_of(key) is None:
            held = vars(owner)[name]
            setattr(owner, name, _with_apply(held, function))
            exchanges.add(key, exchanges.answer_of(function), lambda: setattr(owner, name, held))
        self._held.add(key)
        self.at_undo(exchanges.use(key))

    def _add(self, key: Any, served: Served | CompiledOperator, undo: Callable[[], None]) -> None:
        """Note an exchange. A caller that has kept the replacement gets the original after the end of the exchange."""

        def undo_and_end() -> None:
            served.is_active = False
            undo()

        exchanges.add(key, served, undo_and_end)

    def _use(self, key: Any, name: str) -> None:
        """One more patch that serves it."""
        if key in self._used:
            return
        self._used.add(key)
        self._others.pop(name, None)  # another object of the class was kept
        served = exchanges.answer_of(key)
        self._served.append((served, served.calls, served.left.copy()))
        self.served.append(name)
        self.at_undo(exchanges.use(key))

    def _leave(self, candidate: Candidate, reason: str, status: str = "kept") -> None:
        self._others[candidate.name] = Line(candidate.name, status, reason=reason)


def _with_apply(held: Any, function: Any) -> Any:
    """What held the `apply` of `function`, with the one that it has now."""
    if isinstance(held, functools.partial):
        return functools.partial(_with_apply(held.func, function), *held.args, **held.keywords)
    if isinstance(held, staticmethod):
        return staticmethod(_with_apply(held.__func__, function))
    return function.apply
