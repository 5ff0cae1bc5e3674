"""Replacing layers and functions of transformers, and the layer for the ``kernels`` package."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from types import ModuleType
from typing import Any

from torch import Tensor, nn

from .patch import Patch, standing_in, stands_in

# Under this name some layers keep the function that they found when they were made.
_KEPT = "ms_deformable_attn_core"
# And under this one, while they are served, the function that they answer with.
_SERVED = "_cupy_msda_core"


def serve_layer(done: Patch, layer: type[nn.Module], ours: type[nn.Module]) -> None:
    """Make the layers of a class compute what those of `ours` do, except on devices without kernels."""
    done.served.append(f"{layer.__module__}.{layer.__name__}")
    if stands_in(layer.forward, ours.forward):
        return
    _check_signature(layer.forward, ours.forward)
    done.replace(layer, "forward", standing_in(ours.forward, layer.forward, value_at=1))


def serve_function(done: Patch, module: ModuleType, ours: Callable[..., Tensor]) -> None:
    """Replace the function of this name in a module, also in layers that keep it; not on devices without kernels."""
    name = ours.__name__
    original = getattr(module, name)
    done.served.append(f"{module.__name__}.{name}")
    if stands_in(original, ours):
        return
    _check_signature(original, ours)
    served = standing_in(ours, original)
    done.replace(module, name, served)
    for layer in vars(module).values():
        if isinstance(layer, type) and layer.__module__ == module.__name__ and _keeps_function(layer):
            done.add(layer, _SERVED, staticmethod(served))
            done.add(layer, _KEPT, _served_attribute(original, served))


def _keeps_function(layer: type) -> bool:
    return issubclass(layer, nn.Module) and _KEPT in layer.__init__.__code__.co_names


def _served_attribute(original: Callable[..., Tensor], ours: Callable[..., Tensor]) -> property:
    """An attribute of layers that keeps the original and answers with ours, or with what it has been given since.

    The answer has another name, because torch 2.11's compiler loops for ever where it finds this attribute in
    ``layer.__dict__``.
    """

    def keep(layer: nn.Module, function: Callable[..., Tensor]) -> None:
        layer.__dict__[_KEPT] = original if function is ours else function
        if function in (original, ours):
            layer.__dict__.pop(_SERVED, None)
        else:
            layer.__dict__[_SERVED] = function

    return property(lambda layer: getattr(layer, _SERVED), keep)


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
