"""Errors of :class:`.modules.MSDeformAttn` in the names of its own arguments."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor

from ..options import is_sequence
from . import compat
from .functional import ms_deform_attn_fused

_NAMES = {
    "value": "input_flatten",
    "spatial_shapes": "input_spatial_shapes",
    "level_start_index": "input_level_start_index",
}


def check_inputs(
    sizes: tuple[int, int],
    query: Any,
    reference_points: Any,
    input_flatten: Any,
    input_spatial_shapes: Any,
    input_level_start_index: Any,
    input_padding_mask: Any,
) -> None:
    """Checks shapes against each other and against `sizes`, d_model and n_levels. Traced calls are not checked.

    Raises
    ------
    TypeError
        For something that is no tensor.
    ValueError
        For shapes that do not match.
    """
    tensors = {"query": query, "reference_points": reference_points, "input_flatten": input_flatten}
    if not _known(*tensors.values()):
        return
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name}: expected a torch.Tensor, got {type(tensor).__name__}")
    C, L = sizes
    if query.ndim != 3 or query.shape[2] != C:
        raise ValueError(f"query: expected shape [N, Q, C] with C = d_model = {C}, got {list(query.shape)}")
    N, Q, _ = query.shape
    if input_flatten.ndim != 3 or (input_flatten.shape[0], input_flatten.shape[2]) != (N, C):
        raise ValueError(
            f"input_flatten: expected shape [N, S, C] with N = {N} as in query and C = d_model = {C}, "
            f"got {list(input_flatten.shape)}"
        )
    for name, metadata, form in (
        ("input_spatial_shapes", input_spatial_shapes, "[L, 2]"),
        ("input_level_start_index", input_level_start_index, "[L]"),
    ):
        levels = _length(metadata)
        if levels is not None and levels != L:
            raise ValueError(f"{name}: expected shape {form} with L = n_levels = {L}, got {levels} rows")
    _check_references(tuple(reference_points.shape), (N, Q, L))
    if input_padding_mask is not None:
        _check_mask(input_padding_mask, tuple(input_flatten.shape[:2]))


def _check_references(shape: tuple[int, ...], expected: tuple[int, int, int]) -> None:
    N, Q, L = expected
    if len(shape) != 4 or shape[3] not in (2, 4):
        raise ValueError(
            f"reference_points: expected shape [N, Q, L, 2] for points or [N, Q, L, 4] for boxes, got {list(shape)}"
        )
    if shape[:3] not in ((N, Q, L), (N, Q, 1)):
        raise ValueError(
            f"reference_points: expected shape [N, Q, L, {shape[3]}] = {[N, Q, L, shape[3]]} with N and Q of query and "
            f"L = n_levels, or 1 for all levels, got {list(shape)}"
        )


def _check_mask(mask: Any, expected: tuple[int, ...]) -> None:
    if not isinstance(mask, Tensor) or mask.dtype is not torch.bool:
        got = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
        raise TypeError(f"input_padding_mask: expected a tensor of bool, got {got}")
    if tuple(mask.shape) != expected:
        raise ValueError(
            f"input_padding_mask: expected shape [N, S] = {list(expected)} as in input_flatten, got {list(mask.shape)}"
        )


def attend(value: Tensor, *others: Any) -> Tensor:
    """:func:`ms_deform_attn_fused`, whose errors name the arguments of the layer."""
    try:
        return ms_deform_attn_fused(value, *others)
    except (TypeError, ValueError) as error:
        if type(error) not in (TypeError, ValueError):
            raise
        message = re.sub(rf"\b({'|'.join(_NAMES)})\b", lambda found: _NAMES[found[0]], str(error))
        raise type(error)(message) from error


def _known(*given: Any) -> bool:
    """Whether shapes are numbers: no tracing, no symbols, and nothing that stands for a tensor."""
    if compat.tracing():
        return False
    for part in given:
        if isinstance(part, Tensor):
            if any(isinstance(size, torch.SymInt) for size in part.shape):
                return False
        elif hasattr(type(part), "__torch_function__"):
            return False
    return True


def _length(metadata: Any) -> int | None:
    """The rows of metadata, or None where the operator has to say what is wrong with it."""
    if is_sequence(metadata):
        return len(metadata)
    shape = getattr(metadata, "shape", None)
    return int(shape[0]) if shape else None
