"""Which dtypes the contract allows in one call, and the rule of autocast where they do not agree."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.overrides import handle_torch_function

from ..call import Arguments

_SIXTEEN_BIT = (torch.float16, torch.bfloat16)


def dtypes_agree(arguments: Arguments) -> bool:
    """Whether the contract allows the dtypes of these arguments in one call."""
    value, locations, weights, references = (
        arguments.value, arguments.locations, arguments.weights, arguments.reference_points
    )  # fmt: skip
    if references is not None and not _agree(value, (references,)):
        return False
    return _agree(value, (locations,) if weights is None else (locations, weights))


def _agree(value: Tensor, samples: tuple[Tensor, ...]) -> bool:
    dtype = samples[0].dtype
    return all(tensor.dtype is dtype for tensor in samples) and (
        dtype is value.dtype or (dtype is torch.float32 and value.dtype in _SIXTEEN_BIT)
    )


def agreed_dtypes(value: Tensor, *samples: Tensor) -> tuple[Tensor, ...]:
    """`samples`, such as locations and weights, in dtypes that go with value's: their own, else the widest that does.

    The rule of autocast. It lowers nothing and never touches value, so it costs no copy in the usual case, where a
    linear layer made value 16-bit, and softmax and the reference points made the others float32.
    """
    if not isinstance(value, Tensor):  # in symbolic tracing, which knows no dtypes
        return handle_torch_function(agreed_dtypes, (value,), value, *samples)
    if _agree(value, samples):
        return samples
    dtype = torch.float32 if value.dtype in _SIXTEEN_BIT else value.dtype
    return tuple(tensor.to(dtype) for tensor in samples)
