"""The differentiable function, and which way each call goes: straight, through the dispatcher, or decomposed."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from ..call import PLAIN, Variant, Wanted
from ..validate import read_variant
from . import fast_path, fused_operators
from .operators import (
    agreed_dtypes,
    backward_operator,
    dtypes_agree,
    forward_operator,
    transformed_forward,
    under_transform,
)
from .reference import grid_sample_composition, without_padding

_decomposed = 0


@contextlib.contextmanager
def decomposed() -> Iterator[None]:
    """While this lasts, :func:`ms_deform_attn` and :func:`ms_deform_attn_fused` are made of torch's own functions.

    That is ``torch.nn.functional.grid_sample`` and its like.

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
    ``torch.func`` and ``torch.onnx.export``; `validate` has no effect there, because it reads data, nor beside
    `query_lengths`. `deterministic` holds for the gradients, as in :func:`cupy_msda.ms_deform_attn_backward`; None is
    what ``torch.use_deterministic_algorithms`` says when the backward runs. With
    ``interpolation="nearest"`` locations that require a gradient are refused with a ValueError: there is none.
    """
    variant = PLAIN
    if num_points is not None or interpolation != "bilinear" or padding_mode != "zeros" or align_corners is not False:
        variant = read_variant(Variant(num_points, interpolation, padding_mode, align_corners), len(spatial_shapes))
        if interpolation == "nearest" and torch.is_grad_enabled():
            refuse_gradient("sampling_locations", sampling_locations)
    elif not (torch.compiler.is_compiling() or validate or query_lengths is not None or observed()):
        for matches, recipe, step, fixed_order, differentiable in fast_path.recent:
            if (
                step is im2col_step
                and fixed_order is deterministic
                and matches(value, sampling_locations, attention_weights, spatial_shapes, level_start_index)
            ):
                if differentiable and torch.is_grad_enabled():
                    call = (recipe, None, spatial_shapes, level_start_index, step, deterministic, False, PLAIN)
                    return apply(value, sampling_locations, attention_weights, None, call)
                output = recipe.forward(value, spatial_shapes, level_start_index, sampling_locations, attention_weights)
                if output is not None:
                    return output
                break
    return _dispatch(
        value, spatial_shapes, level_start_index, sampling_locations, attention_weights, im2col_step, deterministic,
        validate, variant, query_lengths,
    )  # fmt: skip


def _dispatch(
    value: Tensor,
    spatial_shapes: Any,
    level_start_index: Any,
    sampling_locations: Tensor,
    attention_weights: Tensor,
    im2col_step: int,
    deterministic: bool | None,
    validate: bool,
    variant: Variant,
    query_lengths: Any,
) -> Tensor:
    """A call that is not just like a recent one."""
    samples, metadata = (sampling_locations, attention_weights), (spatial_shapes, level_start_index)
    if query_lengths is None and is_plain(value, *samples) and dtypes_agree(value, *samples):
        return straight(value, *samples, None, *metadata, im2col_step, deterministic, validate, variant)
    require_tensors(value=value, sampling_locations=sampling_locations, attention_weights=attention_weights)
    if decomposes():
        return compose(value, *metadata, *samples, variant, query_lengths)
    operators = (forward_operator, transformed_forward)
    return dispatched(operators, value, *metadata, samples, im2col_step, deterministic, variant, query_lengths)


def require_tensors(**tensors: Any) -> None:
    """TypeError for what is none, by its name."""
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name}: expected a torch.Tensor, got {type(tensor).__name__}")


def refuse_gradient(name: str, places: Tensor) -> None:
    """ValueError where a gradient is asked for that ``interpolation="nearest"`` does not have."""
    if places.requires_grad:
        raise ValueError(
            f"{name}: expected a tensor that requires no gradient beside interpolation='nearest', which has none for "
            "it: detach() it"
        )


def straight(
    value: Tensor,
    locations: Tensor,
    weights: Tensor | None,
    references: Tensor | None,
    shapes: Any,
    starts: Any,
    im2col_step: int,
    deterministic: bool | None,
    validate: bool,
    variant: Variant,
) -> Tensor:
    """The output of a call that :func:`is_plain`, past the dispatcher; tensors as for :class:`_Function`."""
    inputs, settings = (value, locations, weights), (shapes, starts, im2col_step, deterministic)
    key = fast_path.key_of(*inputs, *settings, variant, references)
    recipe = None if validate else fast_path.recall(key, *inputs, *settings, variant, references)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (*inputs, references)):
        return apply(*inputs, references, (recipe, key, *settings, validate, variant))
    settings = (im2col_step, deterministic, validate, variant, references)
    return fast_path.follow(recipe, key, value, shapes, starts, locations, weights, *settings)


def dispatched(
    operators: tuple[Callable[..., Tensor], Callable[..., Tensor]],
    value: Tensor,
    shapes: Any,
    starts: Any,
    samples: tuple[Tensor | None, ...],
    im2col_step: int,
    deterministic: bool | None,
    variant: Variant,
    lengths: Any,
) -> Tensor:
    """The output by a registered operator; `operators` are that and its form for torch.func."""
    operator, transformed = operators
    if not torch.compiler.is_compiling():
        _refuse_tangents(value, *samples)
        if under_transform():
            operator = transformed
    shapes, sizes = _level_sizes(shapes, value)
    return operator(
        value, shapes, _metadata_tensor(starts, value), *samples, im2col_step, deterministic, *variant,
        _metadata_tensor(lengths, value), sizes,
    )  # fmt: skip


class MSDeformAttnFunction:
    """Stands in for the autograd function of Deformable DETR, by its calling convention.

    ``MSDeformAttnFunction.apply(value, spatial_shapes, level_start_index, sampling_locations, attention_weights,
    im2col_step)`` is :func:`ms_deform_attn`.
    """

    apply = staticmethod(ms_deform_attn)


class _Function(torch.autograd.Function):
    """The plain way with gradients: what the operators' registered autograd does, without the dispatcher.

    With a front end there are `references`, offsets stand for locations, and logits, or None, for weights. `call` is
    all the rest: (recipe or None, key, shapes, starts, im2col_step, deterministic, validate, variant).
    """

    @staticmethod
    def forward(
        ctx: Any,
        value: Tensor,
        locations: Tensor,
        weights: Tensor | None,
        references: Tensor | None,
        call: tuple[Any, ...],
    ) -> Tensor:
        ctx.save_for_backward(value, locations, weights, references)
        ctx.call = call
        recipe, key, shapes, starts, *others = call
        if recipe is not None:
            output = recipe.forward(value, shapes, starts, locations, weights, references)
            if output is not None:
                return output
        return fast_path.first_forward(key, value, shapes, starts, locations, weights, *others, references)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        value, locations, weights, references = ctx.saved_tensors
        recipe, _, shapes, starts, im2col_step, deterministic, _, variant = ctx.call
        wanted = Wanted(*ctx.needs_input_grad[:4])
        if torch.is_grad_enabled() or type(grad_output) is not Tensor or _dispatch_modes():
            grads = _dispatch_backward(grad_output, ctx.saved_tensors, ctx.call, wanted)
        else:
            grads = None
            if recipe is not None:
                repeat = recipe.backward(wanted)
                grads = repeat(grad_output, value, shapes, starts, locations, weights, references)
            if grads is None:
                grads = fast_path.backward(
                    grad_output, value, shapes, starts, locations, weights, im2col_step, deterministic, variant, None,
                    wanted, references,
                )  # fmt: skip
        return (
            grads[0] if wanted.value else None,
            grads[1] if wanted.locations else None,
            grads[2] if wanted.weights else None,
            grads[3] if wanted.references else None,
            None,
        )


def _dispatch_backward(
    grad_output: Tensor, saved: tuple[Tensor | None, ...], call: tuple[Any, ...], wanted: Wanted
) -> fast_path.Gradients:
    """The gradients by the registered operator, which is differentiable in its turn."""
    value, locations, weights, references = saved
    _, _, shapes, starts, im2col_step, deterministic, _, variant = call
    metadata = [_metadata_tensor(part, value) for part in (shapes, starts)]
    if references is None:
        samples, settings, mask = (locations, weights), (im2col_step, deterministic), list(wanted[:3])
        return *backward_operator(grad_output, value, *metadata, *samples, *settings, mask, *variant), None
    samples = (references, locations, weights)
    mask = [wanted.value, wanted.references, wanted.locations, wanted.weights]
    of_value, of_references, of_locations, of_weights = fused_operators.backward_operator(
        grad_output, value, *metadata, *samples, im2col_step, deterministic, *variant, None, None, mask
    )
    return of_value, of_locations, of_weights, of_references


# Past torch.autograd.Function.apply, whose Python part (7 us on the host of an H100) prepares for torch.func's
# transforms: those do not come here.
apply = super(torch.autograd.Function, _Function).apply


def is_plain(*tensors: Tensor) -> bool:
    """Whether nothing but eager execution, with or without autograd, has an interest in a call with these tensors.

    Everything else (compilation, export, fake tensors, subclasses, torch.func, forward-mode gradients, modes, the
    profiler) sees the registered operator.
    """
    if torch.compiler.is_compiling():
        return False
    for tensor in tensors:
        if type(tensor) not in _PLAIN:
            return False
    return not (_dispatch_modes() or under_transform() or torch._C._get_tracing_state() is not None or observed())


def observed() -> bool:
    """Whether :func:`decomposed`, a profiler or a forward-mode gradient is active: the keys of a dispatch show none."""
    return _decomposed > 0 or _profiling() or forward_ad._current_level >= 0


def decomposes() -> bool:
    """Whether the operators are to be made of torch's own functions."""
    return bool(_decomposed) or torch.onnx.is_in_onnx_export()


_PLAIN = (Tensor, torch.nn.Parameter)
_dispatch_modes = torch._C._len_torch_dispatch_stack
_profiling = torch._C._autograd._profiler_enabled


def _metadata_tensor(metadata: Any, value: Tensor) -> Tensor | None:
    """As the operators take it."""
    if metadata is None or isinstance(metadata, Tensor):
        return metadata
    # A compiled graph wants all on one device; elsewhere the host is better, because what is there is validated.
    device = value.device if torch.compiler.is_compiling() else "cpu"
    return torch.as_tensor(metadata, device=device)


def _level_sizes(shapes: Any, value: Tensor) -> tuple[Tensor | None, list[int] | None]:
    """As the operators take them: a tensor, or in compiled code that has them as numbers those, one after the other.

    A tensor of numbers would be copied to the GPU in every call, and make the compiler give up its CUDA graphs.
    """
    if torch.compiler.is_compiling() and isinstance(shapes, (list, tuple)):
        return None, [size for level in shapes for size in level]
    return _metadata_tensor(shapes, value), None


def _refuse_tangents(*tensors: Tensor | None) -> None:
    """Dual numbers raise NotImplementedError."""
    if forward_ad._current_level >= 0 and any(
        tensor is not None and forward_ad.unpack_dual(tensor).tangent is not None for tensor in tensors
    ):
        raise NotImplementedError(
            "ms_deform_attn has no forward-mode gradient (dual numbers, torch.func.jvp): use reverse mode"
        )


def compose(
    value: Tensor, shapes: Any, starts: Any, locations: Tensor, weights: Tensor, variant: Variant, lengths: Any
) -> Tensor:
    """:func:`ms_deform_attn` of torch's own functions, none of which needs the metadata as tensors."""
    levels = [tuple(row) for row in (shapes.tolist() if hasattr(shapes, "tolist") else shapes)]
    firsts = starts.tolist() if hasattr(starts, "tolist") else starts
    dtype = torch.float64 if value.dtype == torch.float64 else torch.float32
    locations, weights = agreed_dtypes(value, locations, weights)
    locations, weights = without_padding(locations, weights, _metadata_tensor(lengths, value))
    # grid_sample promises nothing for NaN; what lies this far outside is the same as at infinity.
    nothing = locations.isnan().any(-1)
    locations = torch.where(nothing[..., None], -1, locations).clamp(-1, 2)
    weights = torch.where(nothing, 0, weights)
    return grid_sample_composition(value.to(dtype), levels, locations.to(dtype), weights.to(dtype), firsts, variant).to(
        value.dtype
    )
