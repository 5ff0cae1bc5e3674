"""The public functions. Their docstrings are the contract; every path behind them gives the same numbers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from . import arrays
from . import validate as _validate
from .call import ALL, EXTENSION_NAMES, FUSED_NAMES, Arguments, Call, Variant
from .cpu import run as cpu
from .cuda import run as cuda


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

    The operator of Deformable DETR (Zhu et al. 2021, equation 3). A sample at normalised location (x, y) of a
    level of H x W pixels lies at px = x*W - 0.5, py = y*H - 0.5 and is interpolated between its four neighbours,
    with zeros outside the level; it counts only when -1 < px < W and -1 < py < H, so a NaN or infinite location
    gives 0.

    Parameters
    ----------
    value : array [N, S, M, D]
        Feature levels, flattened: N images, S pixels, M heads, D channels. float16, bfloat16, float32, float64. Where
        the D channels of a row follow each other, N, S and M may have any strides, without a copy: a slice of a fused
        projection [N, S, 2, M, D], or heads first. Other layouts ([N, M, D, S], transposed) are copied on a GPU: each
        channel would be a read of its own.
    spatial_shapes : integer array or sequence [L, 2]
        (H, W) of each level, in pixels.
    level_start_index : integer array or sequence [L], or None
        First row of each level in S. None: levels follow each other. Levels may overlap.
    sampling_locations : array [N, Q, M, L, P, 2], or [N, Q, M, sum(num_points), 2]
        (x, y) of the P points of each query, head and level; 0 is the left or top edge of the level, 1 the right
        or bottom one. value's dtype, or float32 beside a 16-bit value.
    attention_weights : array [N, Q, M, L, P], or [N, Q, M, sum(num_points)]
        Used as they are, without softmax. The dtype of `sampling_locations`.
    im2col_step : int
        Accepted for compatibility: any positive int. The NumPy path never works on more images than this at once.
    num_points : sequence of L ints, optional
        Points of each level, where they differ (RT-DETRv2, D-FINE); the levels' points then follow each other in one
        dimension.
    interpolation : {'bilinear', 'nearest'}
        'nearest' takes the one pixel with index int(x * W + 0.5), int(y * H + 0.5), clamped into the level: the
        "discrete" method of RT-DETRv2. The location has no gradient then, and NaN gives 0. (The original repository
        of RT-DETRv2 clamps both by H; that differs in levels that are not square, and is not provided.)
    padding_mode : {'zeros', 'border'}
        What lies outside a level. 'border' clamps px to [0, W - 1] and py to [0, H - 1], where the location's
        gradient is 0, as :func:`torch.nn.functional.grid_sample` does; every location counts then, except for NaN.
    align_corners : bool
        px = x * (W - 1), py = y * (H - 1): 0 and 1 are the centres of the outermost pixels, not their edges.
    query_lengths : integer array or sequence [N], optional
        Queries of each image that count, from the first on; the others (padding, as in BEVFormer's cameras) are not
        looked at: their output and their gradients are 0. On the GPU they are not read back, but clamped to [0, Q].
    deterministic : bool, optional
        Has no effect on the forward, which is bitwise reproducible; see :func:`ms_deform_attn_backward`.
    validate : bool
        Read metadata that is on the GPU back (this synchronises) and raise for a bad level. Without it, a level
        that is on the GPU and does not fit into S makes the output NaN; memory is never read outside the arrays.

    Returns
    -------
    array [N, Q, M*D]
        In value's dtype and framework, on value's device. Arithmetic and sums are float32, or float64 for float64.

    Raises
    ------
    TypeError
        For something that is no array, a dtype outside the above, arrays of different frameworks, or a torch tensor
        that requires a gradient (``cupy_msda.torch.ms_deform_attn`` is the differentiable function).
    ValueError
        For shapes that do not fit together, arrays on different devices, and metadata on the host that is wrong.
    RuntimeError
        For an array on a CUDA device on a machine without CuPy.
    """
    _refuse_gradients(
        "ms_deform_attn", value=value, sampling_locations=sampling_locations, attention_weights=attention_weights
    )
    arguments = Arguments(
        value, spatial_shapes, level_start_index, None, sampling_locations, attention_weights, im2col_step,
        Variant(num_points, interpolation, padding_mode, align_corners), query_lengths, deterministic, validate,
    )  # fmt: skip
    return forward(_validate.read(arguments))


def ms_deform_attn_forward(
    value: Any,
    spatial_shapes: Any,
    level_start_index: Any,
    sampling_loc: Any,
    attn_weight: Any,
    im2col_step: int,
) -> Any:
    """The forward with the name and argument order of the operator's C++ interface; see :func:`ms_deform_attn`.

    Records no gradient, like the function it stands in for.
    """
    samples = (None, sampling_loc, attn_weight)
    arguments = Arguments(
        value, spatial_shapes, level_start_index, *samples, im2col_step=im2col_step, names=EXTENSION_NAMES
    )
    return forward(_validate.read(arguments))


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

    `grad_output` [N, Q, M*D] is the gradient of the output, in value's dtype; the other parameters are those of
    :func:`ms_deform_attn`. With `interpolation` 'nearest' the gradient of the locations is 0.

    Returns
    -------
    grad_value, grad_sampling_loc, grad_attn_weight : arrays
        With the shape and dtype of their inputs. At a kink (a location on a pixel centre) the gradient of the
        location is the one-sided derivative of the cell that floor picks. A level on the GPU that does not fit
        into S gives NaN gradients for its locations and weights, and adds nothing to grad_value.

    Notes
    -----
    By default the sums of grad_value may be formed in any order on a GPU, so its last bits may differ from run to run;
    the other two gradients, and everything on the CPU, are the same to the last bit every time. With `deterministic`
    True, grad_value is too (on one kind of GPU with one version of this package). None asks the framework: torch's
    ``torch.use_deterministic_algorithms``. Memory beside the gradients: float32 sums for a 16-bit grad_value; where
    sums have a fixed order, or value is large and samples are few, instead 32 bytes a sample (64 in float64) and a
    fifth more for lists and large bins, for as many heads at a time as 256 MiB hold, but at least one.
    """
    arguments = Arguments(
        value, spatial_shapes, level_start_index, None, sampling_loc, attn_weight, im2col_step,
        Variant(num_points, interpolation, padding_mode, align_corners), query_lengths, deterministic,
        names=EXTENSION_NAMES,
    )  # fmt: skip
    return backward(_validate.read(arguments, grad_output))[:3]


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
    """:func:`ms_deform_attn` with the arithmetic of the models before it: locations from offsets, weights from logits.

    The sampling locations and the softmax are made in the kernel, and never are in memory. With points as references
    (Zhu et al. 2021, equation 2)

        location = reference + offset / (W, H)

    and with boxes (appendix A.4; P points in that level)

        location = reference_xy + offset / P * reference_wh * 0.5

    The weights are the softmax of a query's and head's logits over all levels and points.

    Parameters
    ----------
    value : array [N, S, M, D]
        Feature levels, flattened.
    spatial_shapes : integer array or sequence [L, 2]
        (H, W) of each level.
    level_start_index : integer array or sequence [L], or None
        First row of each level in S.
    reference_points : array [N, Q, L, 2] or [N, Q, L, 4], or [N, Q, 1, 2 or 4]
        (x, y), or (x, y, width, height), of each query in each level, normalised as locations are; or the same for all
        levels. value's dtype, or float32 beside a 16-bit value.
    sampling_offsets : array [N, Q, M, L, P, 2], or [N, Q, M, sum(num_points), 2]
        In pixels of their level, or relative to the box. value's dtype, or float32 beside a 16-bit value: offsets are
        small, so that 16 bits are enough for them, and locations are float32 in any case.
    attention_logits : array [N, Q, M, L, P], or [N, Q, M, sum(num_points)], or None
        The dtype of `sampling_offsets`. None: both are one projection `sampling_offsets` [N, Q, M, L*P*3], whose last
        dimension has the offsets first, as L*P pairs (x, y), and then the logits.
    im2col_step, num_points, interpolation, padding_mode, align_corners, query_lengths, deterministic, validate
        As for :func:`ms_deform_attn`, which says more about the arrays above too.

    Returns
    -------
    array [N, Q, M*D]
        As from :func:`ms_deform_attn`.

    Raises
    ------
    TypeError, ValueError, RuntimeError
        As :func:`ms_deform_attn`.
    NotImplementedError
        On a GPU, for more samples a query and head than fit into shared memory: several hundred for D = 32.
    """
    _refuse_gradients(
        "ms_deform_attn_fused",
        value=value,
        reference_points=reference_points,
        sampling_offsets=sampling_offsets,
        attention_logits=attention_logits,
    )
    arguments = Arguments(
        value, spatial_shapes, level_start_index, reference_points, sampling_offsets, attention_logits, im2col_step,
        Variant(num_points, interpolation, padding_mode, align_corners), query_lengths, deterministic, validate,
        names=FUSED_NAMES,
    )  # fmt: skip
    return forward(_validate.read(arguments))


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
    """The gradients of :func:`ms_deform_attn_fused`, whose parameters these are.

    `grad_output` [N, Q, M*D] is the gradient of the output, in value's dtype.

    Returns
    -------
    grad_value, grad_reference_points, grad_sampling_offsets, grad_attention_logits : arrays
        With the shape and dtype of their inputs; the last is None where offsets and logits are one array.

    Notes
    -----
    What :func:`ms_deform_attn_backward` says about the order of sums holds here too; the gradient of the reference
    points always has the same bits. Memory beside the gradients: what is said there, the sums of each head for the
    reference points (8 or 16 bytes a query, head and level), and where grad_value is summed in lists, 12 bytes a sample
    (24 in float64).
    """
    arguments = Arguments(
        value, spatial_shapes, level_start_index, reference_points, sampling_offsets, attention_logits, im2col_step,
        Variant(num_points, interpolation, padding_mode, align_corners), query_lengths, deterministic,
        names=FUSED_NAMES,
    )  # fmt: skip
    call = _validate.read(arguments, grad_output, ALL._replace(references=True))
    grad_value, grad_offsets, grad_logits, grad_references = backward(call)
    return grad_value, grad_references, grad_offsets, grad_logits


def _refuse_gradients(function: str, **given: Any) -> None:
    for name, array in given.items():
        if arrays.tracks_gradient(array):
            raise TypeError(
                f"{name}: expected a tensor that requires no gradient, because this function records none; "
                f"use cupy_msda.torch.{function}, or detach() it"
            )


def forward(call: Call) -> Any:
    """The output of a validated call."""
    return (cuda if call.problem.device[0] == "cuda" else cpu).forward(call)


def backward(call: Call) -> tuple[Any, Any, Any, Any]:
    """Gradients of value, locations, weights and references of a validated call; None for what is not wanted.

    In a packed call, the gradient of offsets and logits is one array, in the place of the locations'.
    """
    return (cuda if call.problem.device[0] == "cuda" else cpu).backward(call)
