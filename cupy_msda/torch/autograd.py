"""The autograd function of eager calls: what the registered operators' derivatives do, without the dispatcher's cost.

A backward that a transformation, the compiler or a second derivative sees goes to the registered operator.
"""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import torch
from torch import Tensor

from ..call import Arguments, Wanted
from . import compat, fast_path
from .operators import registered_backward


class _Attention(torch.autograd.Function):
    """An eager call with gradients.

    A known layout comes with its launch plan, any other call as `arguments`. `shapes` and `starts` are the metadata
    where it is tensors.
    """

    @staticmethod
    def forward(
        ctx: Any,
        value: Tensor,
        locations: Tensor,
        weights: Tensor | None,
        references: Tensor | None,
        shapes: Tensor | None,
        starts: Tensor | None,
        plan: fast_path.LaunchPlan | None,
        arguments: Arguments | None,
    ) -> Tensor:
        # Of the metadata too, autograd then notices a change.
        saved: tuple[Tensor | None, ...] = (value, locations, weights, references, shapes, starts)
        for part in (references, shapes, starts):
            if part is not None and part.is_inference():
                saved = tuple(map(saveable, saved))
        ctx.save_for_backward(*saved)
        ctx.plan, ctx.arguments = plan, None
        if plan is not None:
            output = plan.forward(value, shapes, starts, locations, weights, references)
            if output is not None:
                return output
            arguments = plan.arguments(value, shapes, starts, locations, weights, references)
        assert arguments is not None
        output, ctx.plan = fast_path.forward(arguments, wanted=Wanted(*ctx.needs_input_grad[:4]))
        if ctx.plan is None:
            # Without the tensors, whose memory autograd frees with the saved ones.
            ctx.arguments = dataclasses.replace(
                arguments, value=None, locations=None, weights=None, reference_points=None, validate=False,
                spatial_shapes=_copy_on_the_host(arguments.spatial_shapes),
                level_start_index=_copy_on_the_host(arguments.level_start_index),
            )  # fmt: skip
        return output

    @staticmethod
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]  (there is one output)
        ctx: Any, grad_output: Tensor
    ) -> tuple[Tensor | None, ...]:
        value, locations, weights, references, shapes, starts = ctx.saved_tensors
        wanted = Wanted(*ctx.needs_input_grad[:4])
        eager = not (torch.compiler.is_compiling() or torch.is_grad_enabled()) and compat.eager(grad_output)
        grads = None
        if eager and ctx.plan is not None:
            grads = ctx.plan.backward(wanted)(grad_output, value, shapes, starts, locations, weights, references)
        if grads is None:
            if ctx.plan is not None:
                arguments = ctx.plan.arguments(value, shapes, starts, locations, weights, references)
            else:
                given = ctx.arguments
                arguments = dataclasses.replace(
                    given, value=value, locations=locations, weights=weights, reference_points=references,
                    spatial_shapes=shapes if given.spatial_shapes is None else given.spatial_shapes,
                    level_start_index=starts if given.level_start_index is None else given.level_start_index,
                )  # fmt: skip
            grads = (fast_path.backward if eager else registered_backward)(arguments, grad_output, wanted)
        found = (grad if asked else None for grad, asked in zip(grads, wanted, strict=True))
        return (*found, None, None, None, None)


def saveable(tensor: Tensor | None) -> Tensor | None:
    """What autograd saves of an input that may come from inference mode, such as level sizes of an evaluation."""
    return tensor.clone() if tensor is not None and tensor.is_inference() else tensor


def _copy_on_the_host(metadata: Any) -> Any:
    """Metadata that no change of the caller's memory reaches; None for a tensor on another device."""
    if isinstance(metadata, Tensor) and metadata.device.type != "cpu":
        return None
    return copy.deepcopy(metadata)


#: ``apply_attention(value, locations, weights, references, shapes, starts, plan, arguments)``, outside the transforms
#: of torch.func.
apply_attention = compat.direct_apply(_Attention)
