"""The operators in torch's dispatcher: ``cupy_msda::ms_deform_attn``, ``ms_deform_attn_fused`` and their backwards.

Schemas, kernels for the CPU and CUDA, shapes without data (fake tensors: torch.compile, torch.export) and the rules of
autocast. Derivatives and the rules of vmap are in :mod:`.derivatives`, what the flop counter counts in :mod:`.flops`.
Exported programs hold the names and schemas.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..call import ALL, DIFFERENTIABLE, FUSED_NAMES, OPERATOR_NAMES, ArgumentNames, Arguments, Variant, Wanted
from . import compat, devices, fast_path
from .checks import refuse_wrong_levels
from .dtypes import agreed_dtypes
from .metadata import has_symbols, tensor_of

_INPUTS = (
    "Tensor value, Tensor? spatial_shapes, Tensor? level_start_index, Tensor sampling_locations, "
    "Tensor attention_weights, int im2col_step"
)
# `level_sizes` has H, W of every level and replaces spatial_shapes, in compiled code that has them as numbers.
_VARIANT = (
    'int[]? num_points=None, str interpolation="bilinear", str padding_mode="zeros", bool align_corners=False, '
    "Tensor? query_lengths=None, SymInt[]? level_sizes=None"
)
_FUSED_INPUTS = (
    "Tensor value, Tensor? spatial_shapes, Tensor? level_start_index, Tensor reference_points, "
    "Tensor sampling_offsets, Tensor? attention_logits, int im2col_step"
)
_FUSED_VARIANT = (
    "bool? deterministic, int[]? num_points, str interpolation, str padding_mode, bool align_corners, "
    "Tensor? query_lengths, SymInt[]? level_sizes"
)
# Entries of a backward's result that output_mask leaves out are empty tensors, as is that of logits in the offsets'
# array.
_SCHEMAS = {
    "ms_deform_attn": f"({_INPUTS}=64, bool? deterministic=None, {_VARIANT}) -> Tensor",
    "ms_deform_attn_backward": (
        f"(Tensor grad_output, {_INPUTS}, bool? deterministic, bool[3] output_mask, {_VARIANT}) "
        "-> (Tensor, Tensor, Tensor)"
    ),
    "ms_deform_attn_fused": f"({_FUSED_INPUTS}, {_FUSED_VARIANT}) -> Tensor",
    "ms_deform_attn_fused_backward": (
        f"(Tensor grad_output, {_FUSED_INPUTS}, {_FUSED_VARIANT}, bool[4] output_mask) "
        "-> (Tensor, Tensor, Tensor, Tensor)"
    ),
}
for _name, _schema in _SCHEMAS.items():
    torch.library.define(f"cupy_msda::{_name}", _schema)

# The last inputs of a forward, which a schema may leave out: im2col_step, deterministic, the variant, query_lengths,
# level_sizes.
_DEFAULTS: tuple[Any, ...] = (64, None, *Variant(), None, None)


class Operator(NamedTuple):
    """A registered operator and its backward, so that one code serves both operators.

    Attributes
    ----------
    forward, backward : OpOverload
    name : str
        The forward's in torch's dispatcher; the backward's ends in ``_backward``.
    names : ArgumentNames
        What error messages call the samples.
    tensors : dict of str to int
        The differentiable fields of Arguments, in the order of the backward's results: each one's place among the
        forward's inputs.
    mask_at : int
        The place of output_mask among the backward's inputs after grad_output.
    """

    forward: Any
    backward: Any
    name: str
    names: ArgumentNames
    tensors: dict[str, int]
    mask_at: int


ATTENTION = Operator(
    torch.ops.cupy_msda.ms_deform_attn.default,
    torch.ops.cupy_msda.ms_deform_attn_backward.default,
    "cupy_msda::ms_deform_attn",
    OPERATOR_NAMES,
    {"value": 0, "locations": 3, "weights": 4},
    mask_at=7,
)
FUSED_ATTENTION = Operator(
    torch.ops.cupy_msda.ms_deform_attn_fused.default,
    torch.ops.cupy_msda.ms_deform_attn_fused_backward.default,
    "cupy_msda::ms_deform_attn_fused",
    FUSED_NAMES,
    {"value": 0, "reference_points": 3, "locations": 4, "weights": 5},
    mask_at=14,
)


def operator_of(arguments: Arguments) -> Operator:
    """The operator that computes a call with these arguments."""
    return ATTENTION if arguments.reference_points is None else FUSED_ATTENTION


def inputs_of(arguments: Arguments) -> tuple[Any, ...]:
    """The inputs of the operator's forward."""
    value, shapes = arguments.value, arguments.spatial_shapes
    sizes: list[Any] | None = None
    if isinstance(shapes, (list, tuple)) and (torch.compiler.is_compiling() or has_symbols(shapes)):
        if all(isinstance(level, (list, tuple)) for level in shapes):
            # A tensor would be copied to the GPU in every call, and make the compiler give up its CUDA graphs.
            sizes = [size for level in shapes for size in level]
            shapes = None
        else:  # rows that are arrays
            shapes = torch.stack([tensor_of(level, value.device) for level in shapes])
    samples: tuple[Any, ...] = (arguments.locations, arguments.weights)
    if arguments.reference_points is not None:
        samples = (arguments.reference_points, *samples)
    return (
        value, _metadata_tensor(shapes, value), _metadata_tensor(arguments.level_start_index, value), *samples,
        arguments.im2col_step, arguments.deterministic, *arguments.variant,
        _metadata_tensor(arguments.query_lengths, value), sizes,
    )  # fmt: skip


def _metadata_tensor(metadata: Any, value: Tensor) -> Tensor | None:
    if metadata is None or isinstance(metadata, Tensor):
        return metadata
    # A compiled graph wants all on one device; elsewhere the host is better, because what is there is validated.
    device = value.device if torch.compiler.is_compiling() else "cpu"
    tensor = tensor_of(metadata, device)
    # The memory of another library's array is the caller's, who may change it before the backward.
    return tensor if isinstance(metadata, (list, tuple)) else tensor.clone()


def arguments_of(operator: Operator, inputs: Sequence[Any]) -> Arguments:
    """The arguments of a call, from the inputs of the operator's forward: the inverse of :func:`inputs_of`."""
    value, shapes, starts, *others = inputs
    references = others.pop(0) if operator is FUSED_ATTENTION else None
    locations, weights, *settings = others
    im2col_step, deterministic, num_points, *form, lengths, sizes = (*settings, *_DEFAULTS[len(settings) :])
    if sizes is not None:
        shapes = [[h, w] for h, w in zip(sizes[::2], sizes[1::2], strict=True)]
    variant = Variant(None if num_points is None else tuple(num_points), *form)
    return Arguments(
        value, shapes, starts, references, locations, weights, im2col_step, variant, lengths, deterministic,
        names=operator.names,
    )  # fmt: skip


def registered_backward(arguments: Arguments, grad_output: Tensor, wanted: Wanted) -> fast_path.Gradients:
    """The gradients by the registered operator, which is differentiable in its turn."""
    operator = operator_of(arguments)
    mask = [getattr(wanted, ALL._fields[DIFFERENTIABLE.index(name)]) for name in operator.tensors]
    grads = operator.backward(grad_output, *with_mask(operator, inputs_of(arguments), mask))
    found = dict(zip(operator.tensors, grads, strict=True))
    of_value, of_locations, of_weights, of_references = map(found.get, DIFFERENTIABLE)
    return of_value, of_locations, of_weights, of_references


def with_mask(operator: Operator, inputs: Sequence[Any], mask: Sequence[bool]) -> tuple[Any, ...]:
    """The inputs of the operator's backward after grad_output, from those of the forward."""
    # The dispatcher leaves out inputs that equal their defaults at the end of a schema.
    first_default = 6 if operator is FUSED_ATTENTION else 5
    inputs = (*inputs, *_DEFAULTS[len(inputs) - first_default :])
    return (*inputs[: operator.mask_at], mask, *inputs[operator.mask_at :])


def without_mask(operator: Operator, inputs: Sequence[Any]) -> tuple[tuple[Any, ...], Sequence[bool]]:
    """The inputs of the forward and the mask, from the inputs of the operator's backward after grad_output."""
    return (*inputs[: operator.mask_at], *inputs[operator.mask_at + 1 :]), inputs[operator.mask_at]


# The dispatcher leaves out inputs that equal their defaults at the end of a schema.
def _forward(operator: Operator, *inputs: Any) -> Tensor:
    arguments = arguments_of(operator, inputs)
    if not devices.has_kernels(arguments.value.device):
        return devices.forward(arguments)
    return fast_path.forward(arguments, remember=False)[0]


def _backward(operator: Operator, grad_output: Tensor, *inputs: Any) -> tuple[Tensor, ...]:
    inputs, mask = without_mask(operator, inputs)
    asked = dict(zip(operator.tensors, mask, strict=True))
    wanted = Wanted(*(asked.get(name, False) for name in DIFFERENTIABLE))
    arguments = arguments_of(operator, inputs)
    if devices.has_kernels(arguments.value.device):
        grads = fast_path.backward(arguments, grad_output, wanted)
    else:
        grads = devices.backward(arguments, grad_output, wanted)
    found = dict(zip(DIFFERENTIABLE, grads, strict=True))
    return tuple(_or_empty(found[name] if asked[name] else None, grad_output) for name in operator.tensors)


def _or_empty(grad: Tensor | None, like: Tensor) -> Tensor:
    return like.new_empty(0) if grad is None else grad


def _forward_fake(operator: Operator, *inputs: Any) -> Tensor:
    arguments = arguments_of(operator, inputs)
    check_shapes(arguments)
    refuse_wrong_levels(arguments)
    N, _, M, D = arguments.value.shape
    return arguments.value.new_empty((N, arguments.locations.shape[1], M * D))


def check_shapes(arguments: Arguments) -> None:
    """RuntimeError for shapes that do not go together, of tensors that may have no elements."""
    _check_dimensions("value", arguments.value, "[N, S, M, D]")
    if isinstance(arguments.spatial_shapes, Tensor):
        _check_dimensions("spatial_shapes", arguments.spatial_shapes, "[L, 2]")
    if arguments.fused:
        _check_dimensions("reference_points", arguments.reference_points, "[N, Q, L, 2]")
    else:
        _check_samples(arguments)


def _check_samples(arguments: Arguments) -> None:
    """RuntimeError for locations and weights whose shapes do not go with value's."""
    locations, weights, num_points = arguments.locations, arguments.weights, arguments.variant.num_points
    points = "L, P" if num_points is None else "sum(num_points)"
    _check_dimensions("sampling_locations", locations, f"[N, Q, M, {points}, 2]")
    _check_dimensions("attention_weights", weights, f"[N, Q, M, {points}]")
    N, _, M, _ = arguments.value.shape
    samples = (len(arguments.spatial_shapes), locations.shape[4]) if num_points is None else (sum(num_points),)
    expected = (N, locations.shape[1], M, *samples)
    _check_shape("sampling_locations", locations, f"[N, Q, M, {points}, 2]", (*expected, 2))
    _check_shape("attention_weights", weights, f"[N, Q, M, {points}]", expected)


def _check_dimensions(name: str, tensor: Tensor, symbols: str) -> None:
    compat.check(
        tensor.ndim == symbols.count(",") + 1,
        lambda: f"{name}: expected shape {symbols}, got {list(tensor.shape)}",
    )


def _check_shape(name: str, tensor: Tensor, symbols: str, expected: tuple[Any, ...]) -> None:
    for have, want in zip(tensor.shape, expected, strict=True):
        compat.check(have == want, lambda: f"{name}: expected shape {symbols} = {expected}, got {list(tensor.shape)}")


def _backward_fake(operator: Operator, grad_output: Tensor, *inputs: Any) -> tuple[Tensor, ...]:
    inputs, mask = without_mask(operator, inputs)
    tensors = [inputs[place] for place in operator.tensors.values()]
    return tuple(
        _or_empty(tensor.new_empty(tensor.shape) if asked and tensor is not None else None, grad_output)
        for tensor, asked in zip(tensors, mask, strict=True)
    )


def _forward_autocast(operator: Operator, *inputs: Any) -> Tensor:
    agreed = list(inputs)
    value, *_ = inputs
    places = dict(operator.tensors)
    del places["value"]
    if "reference_points" in places:
        place = places.pop("reference_points")
        (agreed[place],) = agreed_dtypes(value, inputs[place])
    samples = [place for place in places.values() if inputs[place] is not None]
    for place, tensor in zip(samples, agreed_dtypes(value, *(inputs[place] for place in samples)), strict=True):
        agreed[place] = tensor
    with compat.without_autocast():
        return operator.forward(*agreed)


_library = torch.library.Library("cupy_msda", "IMPL")
for _operator in (ATTENTION, FUSED_ATTENTION):
    # "default" is every other device.
    torch.library.impl(_operator.name, ("cpu", "cuda", "default"), partial(_forward, _operator))
    torch.library.impl(f"{_operator.name}_backward", ("cpu", "cuda", "default"), partial(_backward, _operator))
    torch.library.register_fake(_operator.name, partial(_forward_fake, _operator))
    torch.library.register_fake(f"{_operator.name}_backward", partial(_backward_fake, _operator))
    for _key in compat.autocast_keys:
        _library.impl(_operator.name.partition("::")[2], partial(_forward_autocast, _operator), _key)
