"""Callbacks that see the calls of the public functions, such as that of :mod:`.inspection`.

A ``torch.overrides.TorchFunctionMode`` would see them too, but changes the results of other layers: under such a mode
``nn.TransformerEncoderLayer`` does not take its fused kernel.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from ..call import Arguments

#: Called with the arguments of each call that has succeeded, in every thread. Empty but for the time of an inspection.
watchers: list[Callable[[Arguments], None]] = []


def call_watched(function: Callable[[Arguments], Tensor], arguments: Arguments) -> Tensor:
    """``function(arguments)``, and then every watcher."""
    output = function(arguments)
    for watcher in tuple(watchers):
        watcher(arguments)
    return output
