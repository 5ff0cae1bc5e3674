"""The public functions: from arguments to an operation and its arrays, by the rules of every other path."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from .. import arrays, validate
from ..call import FUSED_NAMES, ArgumentNames, Arguments, Problem, Variant
from ..options import read_settings, requested_variant
from . import compat
from .metadata import is_traced_or_on_gpu, words
from .operation import Operation
from .primitives import forward_p


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
) -> jax.Array:
    """:func:`cupy_msda.ms_deform_attn` as a function of JAX, differentiable and under every transformation.

    The parameters are those of :func:`cupy_msda.ms_deform_attn`, of JAX or NumPy.

    Parameters
    ----------
    value, sampling_locations, attention_weights : arrays
        Differentiable. With `interpolation` 'nearest' the gradient of the locations is 0.
    spatial_shapes, level_start_index : sequences, or arrays
        Numbers that the host knows are a part of the compiled function. Arrays that ``jit`` traces, and arrays on a
        GPU, are checked by the kernels: a level that does not fit into S gives NaN on a GPU, and an error on a CPU.
    im2col_step, num_points, interpolation, padding_mode, align_corners
        Known when the function is traced.
    query_lengths : sequence or array [N], optional
        Traced or not.
    deterministic : bool, optional
        True: the gradients have the same bits every time on one GPU model. None: as ``XLA_FLAGS`` say when the function
        is traced, by ``--xla_gpu_deterministic_ops`` or ``--xla_gpu_exclude_nondeterministic_ops``.

    Returns
    -------
    jax.Array [N, Q, M*D]
        Of value's dtype.

    Raises
    ------
    TypeError, ValueError
        As :func:`cupy_msda.ms_deform_attn`.
    """
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
    )
    return attention(arguments)


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
) -> jax.Array:
    """:func:`cupy_msda.ms_deform_attn_fused` as a function of JAX; see :func:`ms_deform_attn`.

    Parameters
    ----------
    value, reference_points, sampling_offsets, attention_logits : arrays
        Differentiable. Without `attention_logits`, `sampling_offsets` holds both.
    spatial_shapes, level_start_index, im2col_step, num_points, interpolation, padding_mode, align_corners : optional
        As for :func:`ms_deform_attn`.
    query_lengths, deterministic : optional
        As for :func:`ms_deform_attn`.

    Returns
    -------
    jax.Array [N, Q, M*D]
        Of value's dtype.
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
    return attention(arguments)


def attention(arguments: Arguments) -> jax.Array:
    """The output of a call, in which the arrays are JAX's or NumPy's."""
    operation, problem, operands = read(arguments)
    if problem.empty:
        N, _, M, D = operands[0].shape
        return jnp.zeros((N, operands[1].shape[1], M * D), operands[0].dtype)
    return forward_p.bind(*operands, operation=operation)


def read(arguments: Arguments) -> tuple[Operation, Problem, list[jax.Array]]:
    """The operation of a call, its arrays in their order, and its problem, without levels where these are arrays."""
    given = {name: _array(name, array) for name, array in _arrays(arguments).items()}
    shapes = _metadata("spatial_shapes", arguments.spatial_shapes)
    starts = _metadata("level_start_index", arguments.level_start_index)
    lengths = _metadata("query_lengths", arguments.query_lengths)
    im2col_step, deterministic, _ = read_settings(arguments.im2col_step, arguments.deterministic, False)
    if deterministic is None:
        deterministic = arrays.xla_wants_determinism()
    traced = any(isinstance(part, jax.Array) for part in (shapes, starts))
    problem = validated(
        arguments.names, tuple((name, array.shape, array.dtype.name) for name, array in given.items()),
        *(_known(part, traced) for part in (shapes, starts)), _known(lengths, False), arguments.variant,
    )  # fmt: skip
    operation = Operation(
        L=problem.L,
        levels=problem.levels,
        starts=traced and starts is not None,
        ragged=problem.ragged,
        coordinates=problem.fused.coordinates if problem.fused else 0,
        packed=problem.packed,
        variant=arguments.variant,
        im2col_step=im2col_step,
        deterministic=deterministic,
    )
    metadata = [*((shapes, starts) if traced else ()), lengths]
    operands = [*given.values(), *(words(part) for part in metadata if part is not None)]
    return operation, problem, compat.varying_alike(operands)


def _arrays(arguments: Arguments) -> dict[str, Any]:
    """The operands by the names that the caller knows, in the order of an operation."""
    given = {"value": arguments.value, arguments.names.locations: arguments.locations}
    if not arguments.packed:
        given[arguments.names.weights] = arguments.weights
    if arguments.fused:
        given["reference_points"] = arguments.reference_points
    return given


def _array(name: str, array: Any) -> jax.Array:
    if isinstance(array, jax.Array):
        return array
    if isinstance(array, np.ndarray):
        return jnp.asarray(array)
    raise TypeError(f"{name}: expected an array of JAX or NumPy, got {type(array).__name__}")


def _metadata(name: str, metadata: Any) -> np.ndarray | jax.Array | None:
    """Metadata as an array: of JAX where the host does not know the numbers."""
    if metadata is None and name != "spatial_shapes":
        return None
    if not (isinstance(metadata, jax.Array) and is_traced_or_on_gpu(metadata)):
        return arrays.to_numpy(validate.read_metadata(name, metadata))
    if not (jnp.issubdtype(metadata.dtype, jnp.integer) or 0 in metadata.shape):
        raise TypeError(f"{name}: expected an integer dtype, got {metadata.dtype.name}")
    return metadata


def _known(metadata: Any, traced: bool) -> tuple[Any, ...] | None:
    """What validation needs of metadata, hashable: their shape, and their numbers where it shall check these."""
    if metadata is None:
        return None
    if traced or isinstance(metadata, jax.Array):
        return metadata.shape, None
    return metadata.shape, metadata.tobytes(), metadata.dtype.str


@functools.lru_cache(maxsize=4096)
def validated(
    names: ArgumentNames,
    operands: tuple[tuple[Any, ...], ...],
    shapes: tuple[Any, ...],
    starts: tuple[Any, ...] | None,
    lengths: tuple[Any, ...] | None,
    variant: Variant,
) -> Problem:
    """The problem of arrays of these shapes and dtypes, without levels where the metadata are traced.

    NumPy arrays of the same shapes, without memory, pass the validation of every other path.
    """
    symbols: dict[str, int] = {}
    given = {name: _stand_in(name, shape, dtype, symbols) for name, shape, dtype in operands}
    traced = shapes[1] is None
    S = given["value"].shape[1] if given["value"].ndim > 1 else 0
    arguments = Arguments(
        value=given["value"],
        spatial_shapes=_numbers(shapes, 1 if S else 0, symbols),
        level_start_index=None if starts is None else _numbers(starts, 0, symbols),
        reference_points=given.get("reference_points"),
        locations=given[names.locations],
        weights=given.get(names.weights),
        variant=variant,
        query_lengths=None if lengths is None else _numbers(lengths, 0, symbols),
        names=names,
    )
    problem = validate.read(arguments).problem
    return dataclasses.replace(problem, levels=None, value_strides=None) if traced else problem


def _stand_in(name: str, shape: tuple[Any, ...], dtype: str, symbols: dict[str, int]) -> np.ndarray:
    """An array of one number. A symbolic size is a number that no other size is likely to be."""
    sizes = [
        size if isinstance(size, int) else symbols.setdefault(str(size), 1_000_003 + 2 * len(symbols)) for size in shape
    ]
    try:
        known = np.dtype(getattr(ml_dtypes, dtype, dtype))
    except TypeError:
        raise TypeError(f"{name}: expected an array of numbers, got dtype {dtype}") from None
    return np.broadcast_to(np.zeros((), known), sizes)


def _numbers(known: tuple[Any, ...], number: int, symbols: dict[str, int]) -> np.ndarray:
    """Metadata as given, or this `number` in place of those that are traced."""
    if known[1] is not None:
        return np.frombuffer(known[1], known[2]).reshape(known[0])
    sizes = _stand_in("metadata", known[0], "int64", symbols).shape
    return np.full(sizes, number, np.int64)
