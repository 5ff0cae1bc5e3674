"""Replaces what computes multi-scale deformable attention, wherever it is held, and keeps account of it."""

from __future__ import annotations

import copy
import dataclasses
import functools
import warnings
from collections.abc import Callable, Iterable
from types import FunctionType, ModuleType
from typing import Any

import torch
from torch import nn

from . import search
from .conventions import NAME, Signature, read_signature
from .patch import Patch, is_stand_in, mark_stand_in, served_calls
from .probe import Finding, probe
from .redirect import Redirection, is_redirected
from .report import Line, Report
from .search import Candidate
from .served import CompiledOperator, Served


class ModelPatch(Patch):
    """What :func:`cupy_msda.torch.patch` has replaced. A context manager; :meth:`undo` restores everything."""

    def __init__(self) -> None:
        super().__init__()
        self._functions: list[Served | CompiledOperator] = []
        self._others: dict[str, Line] = {}
        self._seen: set[Any] = set()

    def report(self) -> Report:
        """What is served, how often it was called since, and what is not served and why."""
        return Report([*(one.line() for one in self._functions), *self._others.values()])

    def __repr__(self) -> str:
        return str(self.report())

    def undo(self) -> None:
        """Restore everything. The counts of the report stay."""
        for one in self._functions:
            if isinstance(one, Served):
                one.is_active = False
        super().undo()

    def serve(self, candidates: Iterable[Candidate]) -> None:
        """Replace those that compute the operator, and note the others."""
        for candidate in candidates:
            if candidate.found not in self._seen:
                self._seen.add(candidate.found)
                self._serve(candidate)
            if candidate.holder is not None:
                self._serve_holder(*candidate.holder)

    def serve_compiled(self, module: ModuleType, name: str, ours: Callable[..., Any]) -> None:
        """Replace a function of a compiled extension: who calls it holds the module."""
        served = CompiledOperator(f"{module.__name__}.{name}", ours, getattr(module, name))
        if is_stand_in(served.original):
            return
        self.replace(module, name, mark_stand_in(served.function(), ours))
        self._functions.append(served)
        self.served.append(served.name)

    def watch_imports(self) -> None:
        """Serve what is imported from now on, too."""

        def imported(module: ModuleType) -> None:
            self.serve(list(search.in_module(module)))

        watch = search.ImportWatch(imported)
        watch.start()
        self._undo.append(watch.stop)

    def watch_layers(self, model: nn.Module) -> None:
        """Warn where an attention layer of `model` is called and the operator is not."""
        for name in search.compiled_parts(model):
            self._others[name] = Line(name, "compiled already", reason="patch before torch.jit")
        for name, layer in search.attention_layers(model).items():
            self._watch_layer(name, layer)

    def _watch_layer(self, name: str, layer: nn.Module) -> None:
        begun: list[int] = []

        def begin(*_: Any) -> None:
            if not torch.compiler.is_compiling():
                begun.append(served_calls())

        def end(*_: Any) -> None:
            if torch.compiler.is_compiling() or not begun or served_calls() > begun.pop() or name in self._others:
                return
            self._others[name] = Line(name, "kept", reason="a call of this layer did not reach the operator")
            warnings.warn(
                f"cupy_msda: a call of the layer {name!r} did not reach the operator: print the report() of the patch",
                stacklevel=2,
            )

        self._undo += [layer.register_forward_pre_hook(begin).remove, layer.register_forward_hook(end).remove]

    def _serve(self, candidate: Candidate) -> None:
        found = candidate.found
        if isinstance(found, torch.jit.ScriptFunction):
            self._leave(candidate, "patch before torch.jit.script", "compiled already")
            return
        if is_redirected(found) or is_stand_in(found if isinstance(found, FunctionType) else found.apply):
            self._leave(candidate, "another patch serves it")
            return
        is_function = isinstance(found, FunctionType)
        has_receiver = candidate.cls is not None or not is_function
        signature = read_signature(found if is_function else found.forward, has_receiver)
        if isinstance(signature, str):
            # The forward of most layers takes features and reference points; what it calls is the operator.
            if candidate.cls is None or NAME.search(found.__name__):
                self._leave(candidate, signature)
            return
        callee = _callee(candidate, signature)
        finding = Finding(problem="no object of its class is known") if callee is None else probe(callee, signature)
        if not finding.layouts:
            self._leave(candidate, finding.problem)
            return
        replace = self._redirect if is_function else self._replace_apply
        self._functions.append(replace(candidate, signature, finding))
        self.served.append(candidate.name)

    def _redirect(self, candidate: Candidate, signature: Signature, finding: Finding) -> Served:
        redirection = Redirection(candidate.found)
        served = Served(candidate.name, redirection.original, signature, finding)
        redirection.to(served)
        self._undo.append(redirection.undo)
        return served

    def _replace_apply(self, candidate: Candidate, signature: Signature, finding: Finding) -> Served:
        """Of an autograd function: its graph would hide the operator from the transformations of torch."""
        function = candidate.found
        original = function.apply
        signature = dataclasses.replace(signature, names=signature.names[1:])  # without ctx
        served = Served(
            candidate.name, lambda **named: original(*(named[name] for name in signature.names)), signature, finding
        )

        def apply(*arguments: Any) -> Any:
            return served(*arguments)

        replace = self.replace if "apply" in vars(function) else self.add
        replace(function, "apply", staticmethod(mark_stand_in(apply, served)))
        return served

    def _serve_holder(self, owner: Any, name: str) -> None:
        """Give one who kept the `apply` of an autograd function the one that it has now."""
        function = getattr(owner, name).__self__
        if is_stand_in(function.apply):
            self.replace(owner, name, function.apply)

    def _leave(self, candidate: Candidate, reason: str, status: str = "kept") -> None:
        self._others[candidate.name] = Line(candidate.name, status, reason=reason)


def _callee(candidate: Candidate, signature: Signature) -> Callable[..., Any] | None:
    """A candidate as a function of keywords, or None for a method where no object can be made."""
    if candidate.cls is not None:
        try:
            receiver = candidate.cls() if candidate.instance is None else copy.deepcopy(candidate.instance)
        except Exception:
            return None
        return functools.partial(candidate.found, receiver)
    if isinstance(candidate.found, FunctionType):
        return candidate.found
    return lambda **named: candidate.found.apply(*(named[name] for name in signature.names[1:]))
