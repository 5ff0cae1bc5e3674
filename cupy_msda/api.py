"""The public array functions. Their docstrings are the contract, and every path that serves them follows it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from . import arrays
from . import validate as _validate
from .call import ALL, EXTENSION_NAMES, FUSED_NAMES, Arguments, Call, Wanted
from .cpu import run as cpu
from .cuda import run as cuda
from .options import requested_variant


def ms_deform_attn(
    value: Any,
    spatial_shapes: Any,
    level_start_index: Any,
    sampling_locations: Any,
    attention_weights: Any,
    im2col_step: int = 64,
    *,
    num_points: Sequence[int] | None = None,
    interpolation: str = "bilinear",
    padding_mode: str = "zeros",
    align_corners: bool = False,
    query_lengths: Any = None,
    deterministic: bool | None = None,
    validate: bool = False,
) -> Any:
    """Multi-scale deformable attention: for each query and head, a weighted sum of bilinear samples.

    The operator of Deformable DETR (Zhu et al. 2021, equation 3). A sample at the normalised location (x, y) of a level
    of H x W pixels has the pixel coordinates px = x*W - 0.5, py = y*H - 0.5. It is interpolated between its four
    neighbours, with zeros outside the level. It is in bounds when -1 < px < W and -1 < py < H. A sample out of bounds
    gives 0, and so does a NaN or infinite location.

    Parameters
    ----------
    value : array [N, S, M, D]
        Feature levels, flattened: N images, S pixels, M heads, D channels. float16, bfloat16, float32 or float64. Where
        the D channels are contiguous, N, S and M may have any strides, and nothing is copied: a slice of a projection
        [N, S, 2, M, D], or heads first. Other layouts (transposed [N, M, D, S]) are copied on a GPU.
    spatial_shapes : integer array or sequence [L, 2]
        (H, W) of each level, in pixels.
    level_start_index : integer array or sequence [L], or None
        First pixel of each level in S. None: levels are contiguous. Levels may overlap.
    sampling_locations : array [N, Q, M, L, P, 2], or [N, Q, M, sum(num_points), 2]
        (x, y) of the P points per query, head and level; 0 is the left or top edge of the level, 1 the right or bottom
        one. Of value's dtype, or float32 with a 16-bit value.
    attention_weights : array [N, Q, M, L, P], or [N, Q, M, sum(num_points)]
        Used as they are, without softmax. Of the dtype of `sampling_locations`.
    im2col_step : int
        Accepted for source compatibility: any positive int, of Python or NumPy. It does not change the result.
    num_points : integer array or sequence [L], optional
        Points of each level, where the levels differ (RT-DETRv2, D-FINE). The points of all levels are then one
        dimension of the arrays, in the order of the levels.
    interpolation : {'bilinear', 'nearest'}
        'nearest' takes the pixel with the index int(x * W + 0.5), int(y * H + 0.5), clamped into the level: the
        "discrete" method of RT-DETRv2. The gradient of the location is then 0, and a NaN location gives 0. (The
        original repository of RT-DETRv2 clamps both indices by H. That differs in levels that are not square, and is
        not provided.)
    padding_mode : {'zeros', 'border'}
        What is outside a level. 'border' clamps px to [0, W - 1] and py to [0, H - 1], as
        :func:`torch.nn.functional.grid_sample` does. The gradient of a clamped location is 0. All locations are in
        bounds, except for NaN.
    align_corners : bool
        px = x * (W - 1), py = y * (H - 1): 0 and 1 are the centres of the outermost pixels, not their edges. All flags
        may be bools of Python or NumPy.
    query_lengths : integer array or sequence [N], optional
        Number of queries of each image. The others, from this index on, are padding (as in BEVFormer's cameras): their
        inputs are not read, and their output and gradients are 0. Lengths on the GPU are not read back, but clamped to
        [0, Q].
    deterministic : bool, optional
        The forward returns the same bits every time. True: also before and after :func:`cupy_msda.tune`. See
        :func:`ms_deform_attn_backward` for the gradients.
    validate : bool
        Read metadata on the GPU back, which synchronises, and raise for a bad level. Without it, a level on the GPU
        that does not fit into S makes the output NaN. Memory outside the arrays is never read. A ``UserWarning`` says
        where sizes look like (W, H), or locations or reference points look like pixels or like the coordinates of
        ``grid_sample`` from -1 to 1; these are read too.

    Returns
    -------
    array [N, Q, M*D]
        Of value's dtype and framework, on value's device. Arithmetic and sums are float32, or float64 for float64.

    Raises
    ------
    TypeError
        For something that is no array, another dtype, arrays of different frameworks, or a torch tensor that requires
        a gradient (``cupy_msda.torch.ms_deform_attn`` is the differentiable function).
    ValueError
        For shapes that do not match, arrays on different devices, and wrong metadata on the host.
    RuntimeError
        For an array on a CUDA device on a machine without CuPy.
    NotImplementedError
        On a GPU, for N*M from 2**32 on, and for M*D, 2*M*L*P, H or W from 2**31 on. Arrays may have more elements.
    """
    _refuse_gradients(
        "ms_deform_attn", value=value, sampling_locations=sampling_locations, attention_weights=attention_weights
    )
    arguments = Arguments(
        value=value,
        spatial_shapes=spatial_shapes,
        level_start_index=level_start_index,
        reference_points=None,
        locations=sampling_locations,
        weights=attention_weights,
        im2col_step=im2col_step,
        variant=requested_variant(num_points, interpolation, padding_mode, align_corners),
        query_lengths=query_lengths,
        deterministic=deterministic,
        validate=validate,
    )
    return _forward(arguments)


def ms_deform_attn_forward(
    value: Any,
    spatial_shapes: Any,
    level_start_index: Any,
    sampling_loc: Any,
    attn_weight: Any,
    im2col_step: int,
) -> Any:
    """The forward with the name and argument order of the operator's C++ interface; see :func:`ms_deform_attn`.

    Records no gradient, as the C++ function does not.
    """
    arguments = Arguments(
        value=value,
        spatial_shapes=spatial_shapes,
        level_start_index=level_start_index,
        reference_points=None,
        locations=sampling_loc,
        weights=attn_weight,
        im2col_step=im2col_step,
        names=EXTENSION_NAMES,
    )
    return _forward(arguments)


def ms_deform_attn_backward(
    value: Any,
    spatial_shapes: Any,
    level_start_index: Any,
    sampling_loc: Any,
    attn_weight: Any,
    grad_output: Any,
    im2col_step: int,
    *,
    num_points: Sequence[int] | None = None,
    interpolation: str = "bilinear",
    padding_mode: str = "zeros",
    align_corners: bool = False,
    query_lengths: Any = None,
    deterministic: bool | None = None,
) -> tuple[Any, Any, Any]:
    """The backward with the name and argument order of the operator's C++ interface.

    `grad_output` [N, Q, M*D] is the gradient of the output, of value's dtype. The other parameters are those of
    :func:`ms_deform_attn`. With `interpolation` 'nearest' the gradient of the locations is 0.

    Returns
    -------
    grad_value, grad_sampling_loc, grad_attn_weight : arrays
        Of the shape and dtype of their inputs. At a kink (a location on a pixel centre) the gradient of the location is
        the one-sided derivative of the cell that floor picks. A level on the GPU that does not fit into S gives NaN
        gradients for its locations and weights, and adds nothing to grad_value.

    Notes
    -----
    By default a GPU forms the sums of grad_value in any order, so its last bits may differ between runs. The other two
    gradients, and everything on the CPU, always have the same bits. With `deterministic` True, so has grad_value, on
    one GPU model with one version of this package. None asks the framework: torch's
    ``torch.use_deterministic_algorithms``.

    Temporary memory on a GPU: float32 sums for a 16-bit grad_value. Where sums have a fixed order, or value is large
    and samples are few, instead 32 bytes per sample (64 in float64) and a fifth more for the segments of buckets, for
    as many heads at a time as 256 MiB hold, but at least one.
    """
    arguments = Arguments(
        value=value,
        spatial_shapes=spatial_shapes,
        level_start_index=level_start_index,
        reference_points=None,
        locations=sampling_loc,
        weights=attn_weight,
        im2col_step=im2col_step,
        variant=requested_variant(num_points, interpolation, padding_mode, align_corners),
        query_lengths=query_lengths,
        deterministic=deterministic,
        names=EXTENSION_NAMES,
    )
    return _backward(arguments, grad_output, ALL)[:3]


def ms_deform_attn_fused(
    value: Any,
    spatial_shapes: Any,
    level_start_index: Any,
    reference_points: Any,
    sampling_offsets: Any,
    attention_logits: Any = None,
    im2col_step: int = 64,
    *,
    num_points: Sequence[int] | None = None,
    interpolation: str = "bilinear",
    padding_mode: str = "zeros",
    align_corners: bool = False,
    query_lengths: Any = None,
    deterministic: bool | None = None,
    validate: bool = False,
) -> Any:
    """:func:`ms_deform_attn` of locations from offsets and weights from logits, as the models compute them.

    The kernel computes the locations and the softmax, and does not write them to memory. With points as references
    (Zhu et al. 2021, equation 2)

        location = reference + offset / (W, H)

    and with boxes (appendix A.4; P points in that level)

        location = reference_xy + offset / P * reference_wh * 0.5

    The weights are the softmax over all levels and points of a query and head.

    Parameters
    ----------
    value : array [N, S, M, D]
        Feature levels, flattened.
    spatial_shapes : integer array or sequence [L, 2]
        (H, W) of each level.
    level_start_index : integer array or sequence [L], or None
        First pixel of each level in S.
    reference_points : array [N, Q, L, 2] or [N, Q, L, 4], or [N, Q, 1, 2 or 4]
        (x, y), or (x, y, width, height), of each query in each level, normalised as locations are; or one for all
        levels. Of value's dtype, or float32 with a 16-bit value.
    sampling_offsets : array [N, Q, M, L, P, 2], or [N, Q, M, sum(num_points), 2]
        In pixels of their level, or relative to the box. Of value's dtype, or float32 with a 16-bit value. Offsets are
        small, so that 16 bits are enough for them. Locations are float32 in any case.
    attention_logits : array [N, Q, M, L, P], or [N, Q, M, sum(num_points)], or None
        Of the dtype of `sampling_offsets`. None: the call is packed, and `sampling_offsets` [N, Q, M, L*P*3] holds
        both. Its last dimension has the offsets first, as L*P pairs (x, y), and then the logits.
    im2col_step, num_points, interpolation, padding_mode, align_corners, query_lengths, deterministic, validate
        As for :func:`ms_deform_attn`, which also says more about the arrays above.

    Returns
    -------
    array [N, Q, M*D]
        As from :func:`ms_deform_attn`.

    Raises
    ------
    TypeError, ValueError, RuntimeError
        As :func:`ms_deform_attn`.
    NotImplementedError
        On a GPU, for more samples per query and head than fit into shared memory: several hundred for D = 32.
    """
    _refuse_gradients(
        "ms_deform_attn_fused",
        value=value,
        reference_points=reference_points,
        sampling_offsets=sampling_offsets,
        attention_logits=attention_logits,
    )
    arguments = Arguments(
        value=value,
        spatial_shapes=spatial_shapes,
        level_start_index=level_start_index,
        reference_points=reference_points,
        locations=sampling_offsets,
        weights=attention_logits,
        im2col_step=im2col_step,
        variant=requested_variant(num_points, interpolation, padding_mode, align_corners),
        query_lengths=query_lengths,
        deterministic=deterministic,
        validate=validate,
        names=FUSED_NAMES,
    )
    return _forward(arguments)


def ms_deform_attn_fused_backward(
    value: Any,
    spatial_shapes: Any,
    level_start_index: Any,
    reference_points: Any,
    sampling_offsets: Any,
    attention_logits: Any,
    grad_output: Any,
    im2col_step: int = 64,
    *,
    num_points: Sequence[int] | None = None,
    interpolation: str = "bilinear",
    padding_mode: str = "zeros",
    align_corners: bool = False,
    query_lengths: Any = None,
    deterministic: bool | None = None,
) -> tuple[Any, Any, Any, Any]:
    """The gradients of :func:`ms_deform_attn_fused`, which documents the parameters.

    `grad_output` [N, Q, M*D] is the gradient of the output, of value's dtype.

    Returns
    -------
    grad_value, grad_reference_points, grad_sampling_offsets, grad_attention_logits : arrays
        Of the shape and dtype of their inputs. In a packed call, the last is None.

    Notes
    -----
    What :func:`ms_deform_attn_backward` says about the order of sums holds here too. The gradient of the reference
    points always has the same bits. Temporary memory on a GPU, in addition to what is said there: the sums per head
    for the reference points (8 or 16 bytes per query, head and level), and 12 bytes per sample (24 in float64) where
    grad_value is summed by buckets.
    """
    arguments = Arguments(
        value=value,
        spatial_shapes=spatial_shapes,
        level_start_index=level_start_index,
        reference_points=reference_points,
        locations=sampling_offsets,
        weights=attention_logits,
        im2col_step=im2col_step,
        variant=requested_variant(num_points, interpolation, padding_mode, align_corners),
        query_lengths=query_lengths,
        deterministic=deterministic,
        names=FUSED_NAMES,
    )
    wanted = ALL._replace(references=True)
    grad_value, grad_offsets, grad_logits, grad_references = _backward(arguments, grad_output, wanted)
    return grad_value, grad_references, grad_offsets, grad_logits


def _refuse_gradients(function: str, **given: Any) -> None:
    for name, array in given.items():
        if arrays.tracks_gradient(array):
            raise TypeError(
                f"{name}: expected a tensor that requires no gradient, because this function records none; "
                f"use cupy_msda.torch.{function}, or detach() it"
            )


def _forward(arguments: Arguments) -> Any:
    operator = arrays.operator_of(arguments.value)
    output = None if operator is None else operator.forward(arguments)
    return forward(_validate.read(arguments)) if output is None else output


def _backward(arguments: Arguments, grad_output: Any, wanted: Wanted) -> tuple[Any, Any, Any, Any]:
    if grad_output is None:  # which validation takes for a forward
        raise TypeError("grad_output: expected an array of value's framework, got NoneType")
    operator = arrays.operator_of(arguments.value)
    gradients = None if operator is None else operator.backward(arguments, grad_output, wanted)
    return backward(_validate.read(arguments, grad_output, wanted)) if gradients is None else gradients


def forward(call: Call) -> Any:
    """The output of a validated call."""
    return (cuda if call.problem.device[0] == "cuda" else cpu).forward(call)


def backward(call: Call) -> tuple[Any, Any, Any, Any]:
    """Gradients of value, locations, weights and references of a validated call; None for what is not wanted.

    In a packed call, the gradient of offsets and logits is one array, in the place of the locations'.
    """
    return (cuda if call.problem.device[0] == "cuda" else cpu).backward(call)
