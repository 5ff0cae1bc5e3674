"""The public functions, and which path a call takes: launch plan, eager, registered operator, or decomposed."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from ..call import FUSED_NAMES, PLAIN, Arguments, requested_variant
from ..validate import read_variant
from . import compat, fast_path
from .autograd import TRANSFORMED, apply_attention
from .compat import observed
from .dtypes import dtypes_agree
from .exportable import exportable_attention
from .fast_path import PACKED, WITH_LOGITS, WITH_WEIGHTS, recent
from .operators import inputs_of, operator_of

_decomposed = 0


@contextlib.contextmanager
def decomposed() -> Iterator[None]:
    """Inside this context, :func:`ms_deform_attn` and :func:`ms_deform_attn_fused` consist of torch's own functions.

    These are ``torch.nn.functional.grid_sample`` and similar ones.

    For a runtime that does not know the operator: export inside this context. ``torch.onnx.export`` needs none, the
    operator decomposes there by itself. Level sizes that are given as numbers become constants of what is exported.
    Holds for the whole process.
    """
    global _decomposed
    _decomposed += 1
    try:
        yield
    finally:
        _decomposed -= 1


def ms_deform_attn(
    value: Tensor,
    spatial_shapes: Any,
    level_start_index: Any,
    sampling_locations: Tensor,
    attention_weights: Tensor,
    im2col_step: int = 64,
    *,
    num_points: Sequence[int] | None = None,
    interpolation: str = "bilinear",
    padding_mode: str = "zeros",
    align_corners: bool = False,
    query_lengths: Any = None,
    deterministic: bool | None = None,
    validate: bool = False,
) -> Tensor:
    """:func:`cupy_msda.ms_deform_attn` for torch tensors, with gradients of value, locations and weights.

    Parameters, result and errors are those of :func:`cupy_msda.ms_deform_attn`; the metadata may be tensors on any
    device, NumPy arrays or Python sequences. Under autocast, locations and weights whose dtype does not go with value's
    are taken in float32; value and the output keep theirs. Works under ``torch.compile``, ``torch.export``,
    ``torch.func`` and ``torch.onnx.export``. `validate` has no effect there, because it reads data, and none with
    `query_lengths`. `deterministic` holds for the gradients, as in :func:`cupy_msda.ms_deform_attn_backward`; None is
    what ``torch.use_deterministic_algorithms`` says when the backward runs. With
    ``interpolation="nearest"`` locations that require a gradient are refused with a ValueError: there is none.
    """
    variant = PLAIN
    if num_points is not None or interpolation != "bilinear" or padding_mode != "zeros" or align_corners is not False:
        variant = requested_variant(num_points, interpolation, padding_mode, align_corners)
    elif not (torch.compiler.is_compiling() or validate or query_lengths is not None or _decomposed or observed()):
        for matches, plan, step, recorded, differentiable in recent[WITH_WEIGHTS]:
            if (
                step is im2col_step
                and recorded is deterministic
                and matches(value, sampling_locations, attention_weights, spatial_shapes, level_start_index)
            ):
                if differentiable and torch.is_grad_enabled():
                    repeat = (plan, spatial_shapes, level_start_index)
                    return apply_attention(value, sampling_locations, attention_weights, None, repeat, None)
                output = plan.forward(value, spatial_shapes, level_start_index, sampling_locations, attention_weights)
                if output is not None:
                    return output
                break
    arguments = Arguments(
        value, spatial_shapes, level_start_index, None, sampling_locations, attention_weights, im2col_step, variant,
        query_lengths, deterministic, validate,
    )  # fmt: skip
    return _attention(arguments)


def ms_deform_attn_fused(
    value: Tensor,
    spatial_shapes: Any,
    level_start_index: Any,
    reference_points: Tensor,
    sampling_offsets: Tensor,
    attention_logits: Tensor | None = None,
    im2col_step: int = 64,
    *,
    num_points: Sequence[int] | None = None,
    interpolation: str = "bilinear",
    padding_mode: str = "zeros",
    align_corners: bool = False,
    query_lengths: Any = None,
    deterministic: bool | None = None,
    validate: bool = False,
) -> Tensor:
    """:func:`cupy_msda.ms_deform_attn_fused` for torch tensors, with the gradients of all that are not metadata.

    Parameters, result and errors are those of :func:`cupy_msda.ms_deform_attn_fused`; the metadata may be tensors on
    any device, NumPy arrays or Python sequences. Under autocast, what has a dtype that does not go with value's is
    taken in float32. Works under ``torch.compile``, ``torch.export``, ``torch.func`` and ``torch.onnx.export``, where
    `validate` has no effect, because it reads data, as it has none with `query_lengths`. Second derivatives are
    computed by torch's own functions. `deterministic` holds for the gradients; None is what
    ``torch.use_deterministic_algorithms`` says when the backward runs.
    """
    variant = PLAIN
    if num_points is not None or interpolation != "bilinear" or padding_mode != "zeros" or align_corners is not False:
        variant = requested_variant(num_points, interpolation, padding_mode, align_corners)
    elif not (torch.compiler.is_compiling() or validate or query_lengths is not None or _decomposed or observed()):
        tensors: tuple[Any, ...] = (
            value, sampling_offsets, attention_logits, reference_points, spatial_shapes, level_start_index
        )  # fmt: skip
        if attention_logits is None:
            tensors = (*tensors[:2], *tensors[3:])
        for matches, plan, step, recorded, differentiable in recent[
            PACKED if attention_logits is None else WITH_LOGITS
        ]:
            if step is im2col_step and recorded is deterministic and matches(*tensors):
                if differentiable and torch.is_grad_enabled():
                    repeat = (plan, spatial_shapes, level_start_index)
                    return apply_attention(value, sampling_offsets, attention_logits, reference_points, repeat, None)
                output = plan.forward(
                    value, spatial_shapes, level_start_index, sampling_offsets, attention_logits, reference_points
                )
                if output is not None:
                    return output
                break
    arguments = Arguments(
        value, spatial_shapes, level_start_index, reference_points, sampling_offsets, attention_logits, im2col_step,
        variant, query_lengths, deterministic, validate, names=FUSED_NAMES,
    )  # fmt: skip
    return _attention(arguments)


class MSDeformAttnFunction:
    """Stands in for the autograd function of Deformable DETR, by its calling convention.

    ``MSDeformAttnFunction.apply(value, spatial_shapes, level_start_index, sampling_locations, attention_weights,
    im2col_step)`` is :func:`ms_deform_attn`.
    """

    apply = staticmethod(ms_deform_attn)


def _attention(arguments: Arguments) -> Tensor:
    """A call that repeats no recent one. The plain operator is the fused one without reference points."""
    tensors = _tensors(arguments)
    _require_tensors(tensors)
    if arguments.variant.nearest and torch.is_grad_enabled():
        _refuse_gradients(arguments, tensors)
    if arguments.query_lengths is None and _eager(*tensors.values()) and dtypes_agree(arguments):
        if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors.values()):
            inputs = (arguments.value, arguments.locations, arguments.weights, arguments.reference_points)
            return apply_attention(*inputs, None, arguments)
        return fast_path.forward(arguments)[0]
    if arguments.variant != PLAIN:
        read_variant(arguments.variant, len(arguments.spatial_shapes))
    if _decomposed or torch.onnx.is_in_onnx_export():
        return exportable_attention(arguments)
    operator = operator_of(arguments)
    forward = operator.forward
    if not torch.compiler.is_compiling():
        _refuse_tangents(tensors)
        if compat.under_transform():
            forward = TRANSFORMED[operator.name]
    return forward(*inputs_of(arguments))


def _tensors(arguments: Arguments) -> dict[str, Any]:
    """The arguments that must be tensors, by the names that the caller knows."""
    tensors = {"value": arguments.value}
    if arguments.fused:
        tensors["reference_points"] = arguments.reference_points
    tensors[arguments.names.locations] = arguments.locations
    if not arguments.packed:
        tensors[arguments.names.weights] = arguments.weights
    return tensors


def _require_tensors(tensors: dict[str, Any]) -> None:
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name}: expected a torch.Tensor, got {type(tensor).__name__}")


def _refuse_gradients(arguments: Arguments, tensors: dict[str, Any]) -> None:
    """ValueError where a gradient is asked for that ``interpolation="nearest"`` does not have."""
    # The array of offsets and logits has a gradient: that of the logits.
    without = ("reference_points",) if arguments.packed else ("reference_points", arguments.names.locations)
    for name in without:
        if name in tensors and tensors[name].requires_grad:
            raise ValueError(
                f"{name}: expected a tensor that requires no gradient with interpolation='nearest', which has none for "
                "it: detach() it"
            )


_EAGER_TYPES = (Tensor, torch.nn.Parameter)


def _eager(*tensors: Tensor) -> bool:
    """Whether nothing but eager execution, with or without autograd, sees a call with these tensors.

    Everything else (compilation, export, fake tensors, subclasses, torch.func, forward-mode gradients, modes, the
    profiler) sees the registered operator.
    """
    if torch.compiler.is_compiling():
        return False
    for tensor in tensors:
        if type(tensor) not in _EAGER_TYPES:
            return False
    return not _decomposed and compat.eager()


def _refuse_tangents(tensors: dict[str, Tensor]) -> None:
    """Dual numbers raise NotImplementedError."""
    if any(forward_ad.unpack_dual(tensor).tangent is not None for tensor in tensors.values()):
        raise NotImplementedError(
            "ms_deform_attn has no forward-mode gradient (dual numbers, torch.func.jvp): use reverse mode"
        )
