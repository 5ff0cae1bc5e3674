"""What ``torch.utils.flop_counter.FlopCounterMode`` counts for the registered operators.

As for matrix products, a multiply-add is two operations, and only what grows with the channels counts. A sample takes
one multiply-add per channel and neighbour: four with bilinear interpolation, one with nearest.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
from torch.utils.flop_counter import register_flop_formula

from .operators import ATTENTION, FUSED_ATTENTION, Operator, arguments_of, without_mask


def _forward_flops(operator: Operator, *inputs: Any, out_shape: Any = None, **_: Any) -> int:
    """Each sample adds its neighbours, times their weights, to the output."""
    return _flops_of_one_pass(operator, inputs)


def _backward_flops(operator: Operator, grad_output: Any, *inputs: Any, out_shape: Any = None, **_: Any) -> int:
    """One pass over the neighbours for the gradient of value, and one for the gradients of all others."""
    inputs, mask = without_mask(operator, inputs)
    passes = mask[0] + any(mask[1:])
    return passes * _flops_of_one_pass(operator, inputs)


def _flops_of_one_pass(operator: Operator, inputs: tuple[Any, ...]) -> int:
    """Of inputs whose tensors are given as their shapes. Queries that are padding count."""
    arguments = arguments_of(operator, inputs)
    samples = math.prod(arguments.locations) // 3 if arguments.packed else math.prod(arguments.weights)
    D = arguments.value[3]
    return 2 * samples * D * len(arguments.variant.neighbours) ** 2


for _operator in (ATTENTION, FUSED_ATTENTION):
    _name = _operator.name.partition("::")[2]
    register_flop_formula(getattr(torch.ops.cupy_msda, _name))(partial(_forward_flops, _operator))
    register_flop_formula(getattr(torch.ops.cupy_msda, f"{_name}_backward"))(partial(_backward_flops, _operator))
