"""Objects whose method is served: what a method computes may depend on the object."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

from .probe import Finding


class Receivers:
    """What is found of each object. Objects of a class that takes no arguments are alike; others are probed one by one.

    In code that ``torch.compile`` compiles, objects that are probed one by one are left to the original.
    """

    def __init__(self, probe: Callable[[Any], Finding]) -> None:
        self._probe = probe
        self._of_types: dict[type, Finding] = {}
        self._of_objects: WeakKeyDictionary[Any, Finding] = WeakKeyDictionary()

    def finding(self, receiver: Any) -> Finding:
        """Of an object, which is probed at its first call."""
        cls = type(receiver)
        if cls in self._of_types:
            return self._of_types[cls]
        if torch.compiler.is_compiling():
            return Finding(problem="in compiled code, its class takes arguments")
        return self.learn(receiver)

    def learn(self, receiver: Any) -> Finding:
        """Probe an object, or its class."""
        cls = type(receiver)
        if takes_no_arguments(cls):
            self._of_types[cls] = self._probe(cls())
            return self._of_types[cls]
        try:
            if receiver not in self._of_objects:
                self._of_objects[receiver] = self._probe(receiver)
            return self._of_objects[receiver]
        except TypeError:
            return Finding(problem="an object that cannot be kept account of")


def takes_no_arguments(cls: type) -> bool:
    """Whether objects of a class are made without arguments, so that they are alike."""
    if inspect.getattr_static(cls, "__init__") in (object.__init__, nn.Module.__init__):
        return True
    try:
        return not list(inspect.signature(cls).parameters)
    except (TypeError, ValueError):
        return False
