"""The public functions, and which path a call takes.

A call that repeats a recent one takes its launch plan. Any other eager call with kernels for its device goes to
:mod:`.autograd` or :mod:`.fast_path`, export to a foreign runtime to :mod:`.exportable`, and all else to the registered
operator, other devices included.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ..call import FUSED_NAMES, PLAIN, Arguments, Variant
from ..options import read_settings, read_variant, requested_variant
from . import checks, compat, devices, fast_path
from .autograd import apply_attention
from .compat import observed
from .derivatives import registered_forward
from .dtypes import dtypes_agree
from .exportable import exportable_attention
from .fast_path import PACKED, WITH_LOGITS, WITH_WEIGHTS, recent
from .onnx import exports_plugin, plugin_attention
from .overrides import hand_over, overriding
from .watchers import call_watched, watchers

# Compared by identity, because an array has no truth value.
_BILINEAR, _ZEROS = PLAIN.interpolation, PLAIN.padding_mode
# Types that take the place of no tensor.
_ORDINARY = frozenset((Tensor, torch.nn.Parameter, list, tuple, type(None)))
_decomposed = 0


@contextlib.contextmanager
def decomposed() -> Iterator[None]:
    """Inside this context, :func:`ms_deform_attn` and :func:`ms_deform_attn_fused` consist of torch's own functions.

    These are ``torch.nn.functional.grid_sample`` and similar ones.

    For a runtime that does not know the operator: export inside this context. ``torch.onnx.export`` needs none, the
    operator decomposes there by itself. Level sizes that are plain numbers become constants of what is exported; those
    from the shape of an input follow that input. Holds for the whole process.
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
    ``torch.func`` and ``torch.onnx.export``; `validate` has no effect there, because it reads data. `deterministic`
    holds for the gradients, as in :func:`cupy_msda.ms_deform_attn_backward`; None is what
    ``torch.use_deterministic_algorithms`` says when the backward runs. With ``interpolation="nearest"`` locations that
    require a gradient are refused with a ValueError: there is none.

    On devices other than the CPU and CUDA (mps, xpu, a torch for ROCm) the call is a composition of torch's own
    functions, with the same results; a warning says so once. ``deterministic=True`` is refused there in the backward.

    ``torch.utils.flop_counter`` counts two operations per sample, channel and neighbour (four neighbours, or one with
    'nearest'): once in a forward, and in a backward once for the gradient of value and once for all others.
    """
    variant = PLAIN
    if not (num_points is None and interpolation is _BILINEAR and padding_mode is _ZEROS and align_corners is False):
        # Options are read where it is clear that nothing stands for them, such as the proxies of torch.fx.
        given: Any = (num_points, interpolation, padding_mode, align_corners)
        variant = Variant(*given)
    elif not (
        torch.compiler.is_compiling()
        or validate is not False
        or query_lengths is not None
        or _decomposed
        or watchers
        or observed()
    ):
        for matches, plan, step, recorded, differentiable in recent[WITH_WEIGHTS]:
            if (
                step is im2col_step
                and recorded is deterministic
                and matches(value, sampling_locations, attention_weights, spatial_shapes, level_start_index)
            ):
                if differentiable and torch.is_grad_enabled():
                    return apply_attention(
                        value, sampling_locations, attention_weights, None, spatial_shapes, level_start_index, plan,
                        None,
                    )  # fmt: skip
                output = plan.forward(value, spatial_shapes, level_start_index, sampling_locations, attention_weights)
                if output is not None:
                    return output
                break
    arguments = Arguments(
        value, spatial_shapes, level_start_index, None, sampling_locations, attention_weights, im2col_step, variant,
        query_lengths, deterministic, validate,
    )  # fmt: skip
    if not torch.compiler.is_compiling() and watchers:
        return call_watched(_attention, arguments)
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
    `validate` has no effect, because it reads data. Second derivatives are
    computed by torch's own functions. `deterministic` holds for the gradients; None is what
    ``torch.use_deterministic_algorithms`` says when the backward runs.
    """
    variant = PLAIN
    if not (num_points is None and interpolation is _BILINEAR and padding_mode is _ZEROS and align_corners is False):
        # Options are read where it is clear that nothing stands for them, such as the proxies of torch.fx.
        given: Any = (num_points, interpolation, padding_mode, align_corners)
        variant = Variant(*given)
    elif not (
        torch.compiler.is_compiling()
        or validate is not False
        or query_lengths is not None
        or _decomposed
        or watchers
        or observed()
    ):
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
                    return apply_attention(
                        value, sampling_offsets, attention_logits, reference_points, spatial_shapes,
                        level_start_index, plan, None,
                    )  # fmt: skip
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
    if not torch.compiler.is_compiling() and watchers:
        return call_watched(_attention, arguments)
    return _attention(arguments)


class MSDeformAttnFunction:
    """Stands in for the autograd function of Deformable DETR, by its calling convention.

    ``MSDeformAttnFunction.apply(value, spatial_shapes, level_start_index, sampling_locations, attention_weights,
    im2col_step)`` is :func:`ms_deform_attn`.
    """

    apply = staticmethod(ms_deform_attn)


def _attention(arguments: Arguments) -> Tensor:
    """A call that repeats no recent one: checks it and chooses its path. A plain call has no reference points."""
    if not (torch.compiler.is_compiling() or _ORDINARY.issuperset(map(type, _all_arrays(arguments)))):
        relevant = overriding(_all_arrays(arguments))
        if relevant:
            return hand_over(ms_deform_attn_fused if arguments.fused else ms_deform_attn, arguments, relevant)
    arguments = _read_options(arguments)
    tensors = _tensors(arguments)
    _require_tensors(tensors)
    if arguments.variant.nearest and torch.is_grad_enabled():
        _refuse_gradients(arguments, tensors)
    eager = _eager(*tensors.values())
    has_kernels = devices.has_kernels(arguments.value.device)
    if eager and has_kernels and arguments.query_lengths is None and dtypes_agree(arguments):
        if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors.values()):
            metadata = (arguments.spatial_shapes, arguments.level_start_index)
            return apply_attention(
                arguments.value, arguments.locations, arguments.weights, arguments.reference_points,
                *(part if isinstance(part, Tensor) else None for part in metadata), None, arguments,
            )  # fmt: skip
        return fast_path.forward(arguments)[0]
    if arguments.value.is_meta and _eager():  # otherwise the fake kernels check
        devices.check(arguments)
    if not torch.compiler.is_compiling():
        arguments = checks.with_metadata_tensors(arguments)
        known = compat.all_known(tensors.values())
        readable = compat.forward_mode() and not compat.fake(tensors.values())
        if readable or (known and (_decomposed or arguments.validate)):
            problem = checks.read(arguments, known)
            if _decomposed and problem.empty:
                return checks.zeros(arguments, problem)
    else:
        checks.refuse_bools(arguments)
        if arguments.variant != PLAIN:
            read_variant(arguments.variant, len(arguments.spatial_shapes))
    if not torch.compiler.is_dynamo_compiling() and (torch.compiler.is_compiling() or compat.tracing()):
        checks.refuse_wrong_levels(arguments)
    if exports_plugin() or _decomposed or torch.onnx.is_in_onnx_export():
        _check_weights(arguments)
        return plugin_attention(arguments) if exports_plugin() else exportable_attention(arguments)
    return registered_forward(arguments)


def _check_weights(arguments: Arguments) -> None:
    """A composition would take weights in another order without a word."""
    weights, locations = arguments.weights, arguments.locations
    if arguments.reference_points is None and weights.shape != locations.shape[:-1]:
        raise ValueError(
            f"attention_weights: expected the shape of sampling_locations without its last axis, "
            f"{tuple(locations.shape[:-1])}, got {tuple(weights.shape)}"
        )


def _all_arrays(arguments: Arguments) -> tuple[Any, ...]:
    return (
        arguments.value, arguments.spatial_shapes, arguments.level_start_index, arguments.reference_points,
        arguments.locations, arguments.weights, arguments.query_lengths,
    )  # fmt: skip


def _read_options(arguments: Arguments) -> Arguments:
    """`arguments` with options that are checked, and of Python's own types."""
    variant = arguments.variant if arguments.variant is PLAIN else requested_variant(*arguments.variant)
    given = (arguments.im2col_step, arguments.deterministic, arguments.validate)
    im2col_step, deterministic, validate = read_settings(*given)
    if variant is PLAIN and im2col_step is given[0] and deterministic is given[1] and validate is given[2]:
        return arguments
    return dataclasses.replace(
        arguments, im2col_step=im2col_step, deterministic=deterministic, validate=validate, variant=variant
    )


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
        if tensor.layout is not torch.strided or tensor.is_nested or tensor.is_quantized:
            kind = "nested" if tensor.is_nested else "quantized" if tensor.is_quantized else tensor.layout
            raise TypeError(f"{name}: expected a dense tensor, got one that is {kind}: make it dense before the call")
        if hasattr(tensor, "device_mesh"):
            raise TypeError(
                f"{name}: expected a local tensor, got {type(tensor).__name__}: pass what to_local() gives, or call "
                "through torch.distributed.tensor.experimental.local_map"
            )


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


def _eager(*tensors: Tensor) -> bool:
    """Whether nothing but eager execution, with or without autograd, sees a call with these tensors.

    Everything else (compilation, export, fake tensors, subclasses, torch.func, forward-mode gradients, modes, the
    profiler) sees the registered operator.
    """
    return not (torch.compiler.is_compiling() or _decomposed) and compat.eager(*tensors)
