"""Validation: the caller's :class:`Arguments` in, a frozen :class:`Call` out.

With :mod:`.options` and :mod:`.shapes`, it has every error rule of the contract. A message names the argument, what was
expected in the notation of the contract (N, S, M, D, L, P, Q), and what came.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from . import arrays, plausibility
from .arrays import Device, View
from .call import (
    ALL,
    PLAIN,
    SIXTEEN_BIT,
    VALUE_DTYPES,
    ArgumentNames,
    Arguments,
    Call,
    Operands,
    Problem,
    ValueStrides,
    Variant,
    Wanted,
    contiguous_starts,
)
from .options import is_sequence, metadata_array, read_settings, read_variant
from .shapes import Shapes


def read(arguments: Arguments, grad_output: Any = None, wanted: Wanted = ALL) -> Call:
    """The call of these arguments, checked.

    `grad_output` is None in a forward. `wanted` says which gradients a backward computes.

    Raises
    ------
    TypeError
        For something that is no array, and for dtypes and frameworks that do not match.
    ValueError
        For shapes that do not match, arrays on different devices, and wrong metadata on the host.
    """
    views = _read_arrays(arguments, grad_output)
    value = views["value"]
    _check_dtypes(views, arguments.names)
    _check_frameworks_and_devices(views)
    shapes = read_metadata("spatial_shapes", arguments.spatial_shapes)
    if len(shapes.shape) != 2 or shapes.shape[1] != 2:
        raise ValueError(f"spatial_shapes: expected shape [L, 2], got {list(shapes.shape)}")
    L = shapes.shape[0]
    variant = arguments.variant if arguments.variant is PLAIN else read_variant(arguments.variant, L)
    im2col_step, deterministic, validate = read_settings(
        arguments.im2col_step, arguments.deterministic, arguments.validate
    )
    given = {name: view.shape for name, view in views.items()} | {"spatial_shapes": shapes.shape}
    rules = Shapes(given, arguments.names, variant, lambda: _pixels(shapes))
    N, S, M, D = rules.read_value()
    Q, P = rules.read_packed() if arguments.packed else rules.read_samples()
    variant, P = equal_points(variant, P)
    locations = views[arguments.names.locations]
    weights = locations if arguments.packed else views[arguments.names.weights]
    references = views.get("reference_points")
    fused = None if references is None else rules.read_references(Q, references.dtype, arguments.packed)
    if grad_output is not None:
        rules.check_grad_output(Q)
    starts = _read_starts(arguments.level_start_index, L)
    metadata_on_gpu = any(m is not None and m.device[0] == "cuda" for m in (shapes, starts))
    stays_on_gpu = metadata_on_gpu and value.device[0] == "cuda" and not validate
    levels = None if stays_on_gpu else _read_levels(shapes, starts, value.shape)
    if deterministic is None:
        deterministic = value.framework.wants_determinism()
    lengths = None
    if arguments.query_lengths is not None:
        lengths = _read_lengths(arguments.query_lengths, N, Q, value.device)
    problem = Problem(
        N, S, M, D, L, P, Q,
        value_dtype=value.dtype,
        location_dtype=locations.dtype,
        device=value.device,
        levels=levels,
        im2col_step=im2col_step,
        deterministic=deterministic,
        variant=variant,
        value_strides=_strides_of(value),
        ragged=lengths is not None,
        fused=fused,
    )  # fmt: skip
    operands = Operands(
        value=value,
        locations=locations,
        weights=weights,
        references=references,
        shapes=shapes if stays_on_gpu else None,
        starts=starts if stays_on_gpu else None,
        lengths=lengths,
        grad_output=views.get("grad_output"),
    )
    if validate:
        plausibility.check(problem, operands, arguments.names)
    return Call(problem, operands, wanted)


def _read_arrays(arguments: Arguments, grad_output: Any) -> dict[str, View]:
    """The views of a call's arrays, by the names of their arguments."""
    given = {"value": arguments.value, arguments.names.locations: arguments.locations}
    if not arguments.packed:
        given[arguments.names.weights] = arguments.weights
    if arguments.fused:
        given["reference_points"] = arguments.reference_points
    if grad_output is not None:
        given["grad_output"] = grad_output
    return {name: arrays.view(name, array) for name, array in given.items()}


def equal_points(variant: Variant, P: int = 0) -> tuple[Variant, int]:
    """`variant` as in a :class:`Problem`, and its P.

    Equal numbers of points per level have the layout of [L, P]: then `num_points` becomes None.
    """
    if variant.num_points is None:
        return variant, P
    if len(set(variant.num_points)) > 1:
        return variant, 0
    return variant._replace(num_points=None), variant.num_points[0] if variant.num_points else 0


def _check_dtypes(views: dict[str, View], names: ArgumentNames) -> None:
    value = views["value"].dtype
    if value not in VALUE_DTYPES:
        raise TypeError(f"value: expected dtype {', '.join(VALUE_DTYPES[:-1])} or float64, got {value}")
    allowed = (value, "float32") if value in SIXTEEN_BIT else (value,)
    for name in (*names, "reference_points"):
        if name in views and views[name].dtype not in allowed:
            raise TypeError(
                f"{name}: expected dtype {' or '.join(allowed)} with a {value} value, got {views[name].dtype}"
            )
    if names.weights in views and views[names.weights].dtype != views[names.locations].dtype:
        expected, got = views[names.locations].dtype, views[names.weights].dtype
        raise TypeError(f"{names.weights}: expected the dtype of {names.locations}, {expected}, got {got}")
    if "grad_output" in views and views["grad_output"].dtype != value:
        raise TypeError(f"grad_output: expected the dtype of value, {value}, got {views['grad_output'].dtype}")


def _check_frameworks_and_devices(views: dict[str, View]) -> None:
    first = views["value"]
    for name, view in views.items():
        if view.framework is not first.framework:
            raise TypeError(
                f"{name}: expected an array of value's framework, {first.framework.name}, got {view.framework.name}"
            )
        if view.device != first.device:
            raise ValueError(
                f"{name}: expected value's device, {_device_name(first.device)}, got {_device_name(view.device)}"
            )


def read_metadata(name: str, metadata: Any) -> View:
    """The view of integer metadata; Python sequences become NumPy arrays. An empty array may have any dtype."""
    if arrays.framework_of(metadata) is None and is_sequence(metadata):
        metadata = metadata_array(name, metadata)
    view = arrays.view_metadata(name, metadata)
    if not (view.dtype.startswith(("int", "uint")) or 0 in view.shape):
        raise TypeError(f"{name}: expected an integer dtype, got {view.dtype}")
    return view


def _pixels(shapes: View) -> int | None:
    """The pixels of the largest level, which S is at least; None where the sizes are on a GPU."""
    if shapes.device[0] == "cuda":
        return None
    return max((h * w for h, w in arrays.to_numpy(shapes).tolist()), default=0)


def _read_starts(level_start_index: Any, L: int) -> View | None:
    if level_start_index is None:
        return None
    starts = read_metadata("level_start_index", level_start_index)
    if starts.shape != (L,):
        raise ValueError(f"level_start_index: expected shape [L] with L = {L}, got {list(starts.shape)}")
    return starts


def _read_lengths(query_lengths: Any, N: int, Q: int, device: Device) -> View:
    """The view of the number of queries per image. On the host it is checked; on a GPU the kernels clamp it."""
    lengths = read_metadata("query_lengths", query_lengths)
    if lengths.shape != (N,):
        raise ValueError(f"query_lengths: expected shape [N] with N = {N}, got {list(lengths.shape)}")
    if lengths.device[0] == "cuda" and device[0] == "cuda":
        return lengths
    for image, length in enumerate(arrays.to_numpy(lengths).tolist()):
        if not 0 <= length <= Q:
            raise ValueError(f"query_lengths: expected 0 to Q = {Q}, got {length} for image {image}")
    return lengths


def _strides_of(value: View) -> ValueStrides | None:
    """Strides of a value that is not contiguous but whose value vectors are; None otherwise."""
    N, S, M, D = value.shape
    image, pixel, head, channel = value.strides
    if value.contiguous or (D > 1 and channel != 1) or min(value.strides) < 0:
        return None
    # A dimension of size 1 may have any stride: it becomes that of a contiguous array.
    return ValueStrides(image if N > 1 else 0, pixel if S > 1 else M * D, head if M > 1 else D)


def _read_levels(shapes: View, starts: View | None, value: tuple[int, ...]) -> tuple[tuple[int, int, int], ...]:
    """(H, W, start) of each level; metadata on a GPU is read back."""
    return checked_levels(
        arrays.to_numpy(shapes).tolist(), None if starts is None else arrays.to_numpy(starts).tolist(), value
    )


def checked_levels(
    sizes: Sequence[Sequence[int]], starts: Sequence[int] | None, value: Sequence[int] | None
) -> tuple[tuple[int, int, int], ...]:
    """(H, W, start) of each level, which fits into S of the shape of value where that is known."""
    firsts = contiguous_starts(sizes) if starts is None else starts
    for level, ((h, w), start) in enumerate(zip(sizes, firsts, strict=True)):
        if h <= 0 or w <= 0:
            raise ValueError(f"spatial_shapes: expected positive (H, W), got ({h}, {w}) for level {level}")
        if start < 0:
            raise ValueError(f"level_start_index: expected starts of at least 0, got {start} for level {level}")
        if value is not None and start + h * w > value[1]:
            raise ValueError(
                f"spatial_shapes: expected level {level} of {h} x {w} pixels from pixel {start} to fit into S = "
                f"{value[1]} of value {list(value)}, got an end of {start + h * w}"
            )
    return tuple((h, w, start) for (h, w), start in zip(sizes, firsts, strict=True))


def _device_name(device: Device) -> str:
    return "cpu" if device[0] == "cpu" else f"cuda:{device[1]}"
