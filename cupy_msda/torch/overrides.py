"""Objects that take the place of tensors by ``__torch_function__``, such as the proxies of torch.fx.

They get the public function and its arguments, as they do from torch's own functions, and so record one call.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor
from torch.overrides import handle_torch_function

from ..call import PLAIN, Arguments


def overriding(given: Iterable[Any]) -> list[Any]:
    """What is no tensor, and takes the place of one."""
    return [part for part in given if hasattr(type(part), "__torch_function__") and not isinstance(part, Tensor)]


def hand_over(function: Callable[..., Tensor], arguments: Arguments, relevant: list[Any]) -> Any:
    """What the objects `relevant` make of a call of `function`. Options that have their default are left out."""
    positional = [arguments.value, arguments.spatial_shapes, arguments.level_start_index]
    if arguments.fused:
        positional.append(arguments.reference_points)
    positional += [arguments.locations, arguments.weights, arguments.im2col_step]
    options = arguments.variant._asdict() | {
        "query_lengths": arguments.query_lengths,
        "deterministic": arguments.deterministic,
        "validate": arguments.validate,
    }
    defaults = PLAIN._asdict() | {"query_lengths": None, "deterministic": None, "validate": False}
    # Compared by identity, because an array has no truth value.
    options = {name: option for name, option in options.items() if option is not defaults[name]}
    return handle_torch_function(function, relevant, *positional, **options)
