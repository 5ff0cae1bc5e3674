"""What is checked before a call goes to a registered operator or a composition, which take tensors as metadata."""

from __future__ import annotations

import dataclasses
import warnings
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .. import arrays, options, validate
from ..call import PLAIN, Arguments, Problem
from ..options import is_sequence, read_variant
from . import compat, devices
from .dtypes import agreed_dtypes
from .metadata import has_symbols, tensor_of

# torch computes little with these.
_UNSIGNED = (torch.uint16, torch.uint32, torch.uint64)


def with_metadata_tensors(arguments: Arguments) -> Arguments:
    """`arguments` with metadata as tensors, and with a variant that fits them. Traced sizes stay as they are.

    Raises
    ------
    TypeError, ValueError
        As :func:`cupy_msda.validate.read`, for the metadata itself and for ``num_points``.
    """
    shapes = _metadata_tensor("spatial_shapes", arguments.spatial_shapes)
    if isinstance(shapes, Tensor) and (shapes.ndim != 2 or shapes.shape[1] != 2):
        raise ValueError(f"spatial_shapes: expected shape [L, 2], got {list(shapes.shape)}")
    starts, lengths = (
        None if metadata is None else _metadata_tensor(name, metadata)
        for name, metadata in (
            ("level_start_index", arguments.level_start_index),
            ("query_lengths", arguments.query_lengths),
        )
    )
    if arguments.variant != PLAIN:
        read_variant(arguments.variant, len(shapes))
    return dataclasses.replace(arguments, spatial_shapes=shapes, level_start_index=starts, query_lengths=lengths)


def read(arguments: Arguments, known: bool) -> Problem:
    """The problem of a call that is not compiled: every rule of the contract, after that of autocast.

    Of tensors whose elements are not `known`, such as a transformation's, it reads dtypes and shapes.
    """
    kind = arguments.value.device.type
    if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
        value, references = arguments.value, arguments.reference_points
        if arguments.packed:
            (locations,), weights = agreed_dtypes(value, arguments.locations), None
        else:
            locations, weights = agreed_dtypes(value, arguments.locations, arguments.weights)
        if references is not None:
            (references,) = agreed_dtypes(value, references)
        arguments = dataclasses.replace(arguments, locations=locations, weights=weights, reference_points=references)
    if known and devices.has_kernels(arguments.value.device):
        return validate.read(arguments).problem
    if not known:
        shapes, starts, lengths = arguments.spatial_shapes, arguments.level_start_index, arguments.query_lengths
        arguments = dataclasses.replace(
            arguments,
            spatial_shapes=compat.without_wrappers(shapes),
            level_start_index=None if starts is None else compat.without_wrappers(starts),
            query_lengths=None if lengths is None else _extreme_lengths(lengths),
            validate=False,
        )
    with compat.without_transforms():
        return devices.check(arguments)


def refuse_wrong_levels(arguments: Arguments) -> None:
    """ValueError for levels that do not fit into value, where their numbers are known while a call is exported.

    What is exported checks nothing when it runs, and a plugin may read outside of value.
    """
    with warnings.catch_warnings():  # the numbers of a trace are read and not recorded
        warnings.simplefilter("ignore", compat.TracerWarning)
        sizes, starts = _numbers(arguments.spatial_shapes), _numbers(arguments.level_start_index)
        value = _numbers(arguments.value.shape)
    if sizes is None or not all(isinstance(row, list) for row in sizes):
        return
    L = len(sizes)
    if any(len(row) != 2 for row in sizes):
        raise ValueError(f"spatial_shapes: expected shape [L, 2], got {[L, len(sizes[0])]}")
    if starts is None and arguments.level_start_index is not None:
        starts = [0] * L  # unknown ones
    if starts is not None and len(starts) != L:
        raise ValueError(f"level_start_index: expected shape [L] with L = {L}, got {[len(starts)]}")
    validate.checked_levels(sizes, starts, value)


def _numbers(metadata: Any) -> Any:
    """A number, or metadata as nested lists of numbers. None for what is no number while a call is exported."""
    if is_sequence(metadata):
        found = [_numbers(part) for part in metadata]
        return None if None in found else found
    if isinstance(metadata, Tensor):
        known = compat.has_elements(metadata) and not compat.fake([metadata])
        return metadata.tolist() if known else None
    if isinstance(metadata, (np.ndarray, np.integer)):
        return metadata.tolist()
    return metadata if isinstance(metadata, int) else None


def _extreme_lengths(lengths: Tensor) -> Tensor:
    """Of each image a length that is out of range if that of any sample of vmap is."""
    samples = compat.without_wrappers(lengths)
    with compat.without_transforms():
        samples = samples[None].flatten(0, -1 - lengths.ndim)
        samples = torch.cat((samples.new_zeros(1, *lengths.shape), samples))  # vmap may have no samples
        return torch.where((samples < 0).any(0), samples.amin(0), samples.amax(0))


def zeros(arguments: Arguments, problem: Problem) -> Tensor:
    """The output of an empty problem, which depends on the inputs for autograd."""
    output = arguments.value.new_zeros(problem.output_shape)
    for tensor in (arguments.value, arguments.locations, arguments.weights, arguments.reference_points):
        if tensor is not None and tensor.requires_grad:
            output = output + tensor[:0].sum().to(output.dtype)
    return output


def refuse_bools(arguments: Arguments) -> None:
    """TypeError for a bool in metadata of sequences, of which a compiled call would make a number."""
    for name in ("spatial_shapes", "level_start_index", "query_lengths"):
        metadata = getattr(arguments, name)
        if is_sequence(metadata):
            options.refuse_bools(name, metadata)


def _metadata_tensor(name: str, metadata: Any) -> Any:
    if isinstance(metadata, Tensor):
        return metadata.to(torch.int64) if metadata.dtype in _UNSIGNED else metadata
    if has_symbols(metadata):
        options.refuse_bools(name, metadata)
        # In a trace, sizes are tensors already.
        return tensor_of(metadata, "cpu") if compat.tracing() else metadata
    view = validate.read_metadata(name, metadata)
    if view.device[0] == "cuda":
        return torch.from_dlpack(metadata)
    # A copy: what the caller does with the array after the call changes nothing.
    return torch.from_numpy(np.array(arrays.to_numpy(view), np.int64))
