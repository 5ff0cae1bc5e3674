"""Which devices have kernels of this package, and the operator on all others.

The CPU and NVIDIA GPUs have kernels. On every other device (mps, xpu, npu, a torch for ROCm, where GPUs are called
"cuda" too) the operator is a composition of torch's own functions, with the same rules, results and gradients.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..call import DIFFERENTIABLE, Arguments, Problem, Wanted
from ..validate import read
from .exportable import exportable_attention
from .reference import Gradients, differentiable_gradients
from .samples import in_float

_METADATA = ("spatial_shapes", "level_start_index", "query_lengths")
# And "cuda", unless torch is made for ROCm. :mod:`cupy_msda.api` knows only these two.
_WITH_KERNELS: tuple[str, ...] = ("cpu",)
# Device types whose first call has been noted.
_noted: set[str] = set()


def has_kernels(device: torch.device) -> bool:
    """Whether this package has kernels for `device`."""
    if device.type == "cuda":
        return torch.version.hip is None
    return device.type in _WITH_KERNELS


def serves(value: Any) -> bool:
    """Whether what replaces a function of a model takes a call with this value. If not, the model's function does."""
    return not isinstance(value, Tensor) or has_kernels(value.device) or value.is_meta


def check(arguments: Arguments, grad_output: Tensor | None = None) -> Problem:
    """The sizes of a call on a device that validation cannot read: it sees tensors of the same shapes on the CPU.

    Raises
    ------
    TypeError, ValueError
        As on every other device.
    """
    tensors = {name: getattr(arguments, name) for name in DIFFERENTIABLE if getattr(arguments, name) is not None}
    given = [*tensors.values(), *([] if grad_output is None else [grad_output])]
    names = {"locations": arguments.names.locations, "weights": arguments.names.weights}
    labels = [*(names.get(name, name) for name in tensors), "grad_output"]
    for label, tensor in zip(labels, given, strict=False):
        if tensor.device != arguments.value.device:
            raise ValueError(f"{label}: expected value's device, {arguments.value.device}, got {tensor.device}")
    reads_data = arguments.validate and not arguments.value.is_meta
    stand_ins: dict[str, Any] = {
        name: tensor.detach().cpu() if reads_data else _stand_in(tensor) for name, tensor in tensors.items()
    }
    for name in _METADATA:
        part = getattr(arguments, name)
        if isinstance(part, Tensor) and part.is_meta:
            stand_ins[name] = _sizes_on_the_host(name, part)
    gradient = None if grad_output is None else _stand_in(grad_output)
    return read(replace(arguments, **stand_ins), gradient).problem


def _stand_in(tensor: Tensor) -> Tensor:
    """A tensor of one element on the CPU, in the shape and dtype of `tensor`."""
    return torch.zeros((), dtype=tensor.dtype, device="cpu").expand(tensor.shape)


def _sizes_on_the_host(name: str, metadata: Tensor) -> Tensor:
    """Metadata without numbers, with numbers that go with every problem: levels of one pixel, images of no query."""
    if name == "spatial_shapes":
        return torch.ones(metadata.shape, dtype=metadata.dtype, device="cpu")
    return _stand_in(metadata)


def forward(arguments: Arguments) -> Tensor:
    """The output, by torch's own functions."""
    arguments, problem = _read(arguments)
    if problem.empty:
        return arguments.value.new_zeros(problem.output_shape)
    return exportable_attention(arguments)


def backward(arguments: Arguments, grad_output: Tensor, wanted: Wanted) -> Gradients:
    """The gradients that are wanted, by torch's own functions."""
    if arguments.deterministic is True:
        raise RuntimeError(
            f"deterministic: expected None or False on {_name(arguments.value.device)}, where torch's own functions "
            "compute the gradients and do not promise equal bits: move the tensors to the CPU"
        )
    arguments, problem = _read(arguments, grad_output)
    found: Sequence[Tensor | None]
    if problem.empty:
        found = [part if part is None else part.new_zeros(part.shape) for part in _differentiable(arguments)]
    else:
        # Autograd does not record inside of an operator, so these are formulas.
        widened = in_float(arguments)
        found = differentiable_gradients(widened, grad_output.to(widened.value.dtype))
    of_value, of_locations, of_weights, of_references = (
        grad.to(part.dtype).contiguous() if asked and grad is not None and part is not None else None
        for grad, part, asked in zip(found, _differentiable(arguments), wanted, strict=True)
    )
    return of_value, of_locations, of_weights, of_references


def _differentiable(arguments: Arguments) -> list[Tensor | None]:
    return [getattr(arguments, name) for name in DIFFERENTIABLE]


def _read(arguments: Arguments, grad_output: Tensor | None = None) -> tuple[Arguments, Problem]:
    """`arguments`, checked and with level sizes as numbers, and their sizes."""
    problem = check(arguments, grad_output)
    _note(arguments.value.device)
    levels = problem.levels or ()
    sizes, starts = [(h, w) for h, w, _ in levels], [start for *_, start in levels]
    return replace(arguments, spatial_shapes=sizes, level_start_index=starts), problem


def _note(device: torch.device) -> None:
    if device.type not in _noted:
        _noted.add(device.type)
        warnings.warn(
            f"cupy_msda has no kernels for {_name(device)}: there the operator is a composition of torch's own "
            "functions, with the same results",
            stacklevel=2,
        )


def _name(device: torch.device) -> str:
    return f"{device} (ROCm)" if device.type == "cuda" else str(device)
