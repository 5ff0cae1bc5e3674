"""Warns where an attention layer of a model is called and the operator is not."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from .patch import served_calls


class LayerWatch:
    """Hooks of one layer. `bypassed` is called once, with the name of the layer.

    Compiled code does not count its calls, so of a layer that is compiled in parts nothing is known. A copy of a model,
    or what is unpickled, has hooks that do nothing.
    """

    def __init__(self, name: str, layer: nn.Module, bypassed: Callable[[str], None]) -> None:
        self._name, self._bypassed = name, bypassed
        self._done = any(part._compiled_call_impl is not None for part in layer.modules())
        self._begun = _Begun()
        handles = (layer.register_forward_pre_hook(_Hook(self.begin)), layer.register_forward_hook(_Hook(self.end)))
        self._handles = handles

    def begin(self, *_: Any) -> None:
        """Before a call."""
        self._begun.calls.append(served_calls())

    def end(self, *_: Any) -> None:
        """After a call."""
        if not self._begun.calls or served_calls() > self._begun.calls.pop() or self._done:
            return
        self._done = True
        self._bypassed(self._name)
        warnings.warn(
            f"cupy_msda: a call of the layer {self._name!r} did not reach the operator; the report() of the patch says "
            "what is served",
            stacklevel=2,
        )

    def stop(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()


class _Begun(threading.local):
    """Counts at the beginning of the calls that run in a thread."""

    def __init__(self) -> None:
        self.calls: list[int] = []


class _Hook:
    def __init__(self, function: Callable[..., None] | None = None) -> None:
        self._function = function

    def __call__(self, *arguments: Any) -> None:
        if self._function is not None and not torch.compiler.is_compiling():
            self._function(*arguments)

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return _Hook, ()
