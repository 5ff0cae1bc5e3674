"""Frameworks whose arrays have a faster path through the array functions than the general one.

The module of such a path is imported when an array of its framework comes: its user has imported the framework. It has
``forward(arguments)`` and ``backward(arguments, grad_output, wanted)``, which return None for a call that they leave to
the general path.
"""

from __future__ import annotations

import functools
import importlib
from typing import Any, Protocol

from .frameworks import framework_of

# By the name of the framework.
_MODULES = {"JAX": "cupy_msda.jax.array_functions"}


class Operator(Protocol):
    """The path of one framework."""

    def forward(self, arguments: Any) -> Any:
        """The output, or None."""

    def backward(self, arguments: Any, grad_output: Any, wanted: Any) -> tuple[Any, Any, Any, Any] | None:
        """Gradients of value, locations, weights and references, or None."""


def operator_of(array: Any) -> Operator | None:
    """The faster path of the framework whose array this is, if it has one."""
    framework = framework_of(array)
    return _load(_MODULES[framework.name]) if framework is not None and framework.name in _MODULES else None


@functools.cache
def _load(module: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError:  # a version of the framework that lacks what the path needs
        return None
