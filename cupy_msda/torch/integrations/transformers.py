"""Replacing layers and functions of transformers, and the layer for the ``kernels`` package."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from types import ModuleType
from typing import Any

from torch import Tensor, nn

from .patch import Patch


def serve_layer(done: Patch, layer: type[nn.Module], ours: type[nn.Module]) -> None:
    """Make the layers of a class compute what those of `ours` do, except on devices without kernels."""
    _serve(done, layer.forward, ours.forward, f"{layer.__module__}.{layer.__name__}", value_at=1)


def serve_function(done: Patch, module: ModuleType, ours: Callable[..., Tensor]) -> None:
    """Replace the function of this name in a module, and in layers that keep it; not on devices without kernels."""
    _serve(done, getattr(module, ours.__name__), ours, f"{module.__name__}.{ours.__name__}")


def _serve(done: Patch, original: Any, ours: Callable[..., Any], name: str, value_at: int = 0) -> None:
    done.served.append(name)
    _check_signature(original, ours)
    done.redirect(original, ours, value_at)


def _check_signature(theirs: Callable[..., Any], ours: Callable[..., Any]) -> None:
    have, want = (list(inspect.signature(function).parameters) for function in (theirs, ours))
    if have != want:
        raise RuntimeError(
            f"{theirs.__module__}.{theirs.__qualname__}: expected the parameters {', '.join(want)}, got "
            f"{', '.join(have)}: this transformers is not known to cupy_msda"
        )


class KernelRepository:
    """A layer as the ``kernels`` package asks for it: loaded from here, not from a hub."""

    def __init__(self, layer: type[nn.Module]) -> None:
        self.layer_name, self._layer = layer.__name__, layer

    def load(self) -> type[nn.Module]:
        return self._layer

    def __repr__(self) -> str:
        return f"`cupy_msda.torch` (layer `{self.layer_name}`)"
