"""Validation: the caller's :class:`Arguments` in, a frozen :class:`Call` out.

This file has every error rule of the contract. A message names the argument, what was expected in the notation of the
contract (N, S, M, D, L, P, Q), and what came.
"""

from __future__ import annotations

import operator
from typing import Any

import numpy as np

from . import arrays
from .arrays import Device, View
from .call import (
    ALL,
    PLAIN,
    SIXTEEN_BIT,
    VALUE_DTYPES,
    ArgumentNames,
    Arguments,
    Call,
    FusedFrontEnd,
    Operands,
    Problem,
    ValueStrides,
    Variant,
    Wanted,
    contiguous_starts,
)


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
    N, S, M, D = _dimensions("value", value, "[N, S, M, D]")
    shapes = _read_metadata("spatial_shapes", arguments.spatial_shapes)
    if len(shapes.shape) != 2 or shapes.shape[1] != 2:
        raise ValueError(f"spatial_shapes: expected shape [L, 2], got {list(shapes.shape)}")
    L = shapes.shape[0]
    variant = arguments.variant if arguments.variant == PLAIN else read_variant(arguments.variant, L)
    locations = views[arguments.names.locations]
    weights = locations if arguments.packed else views[arguments.names.weights]
    if arguments.packed:
        Q, P = _read_packed(arguments.names, locations, variant, N, M, L)
    else:
        Q, P = _read_samples(arguments.names, locations, weights, variant, N, M, L)
    variant, P = equal_points(variant, P)
    fused = _read_references(views["reference_points"], N, Q, L, arguments.packed) if arguments.fused else None
    if grad_output is not None:
        _check_shape("grad_output", views["grad_output"], "[N, Q, M*D]", (N, Q, M * D))
    starts = _read_starts(arguments.level_start_index, L)
    metadata_on_gpu = any(m is not None and m.device[0] == "cuda" for m in (shapes, starts))
    stays_on_gpu = metadata_on_gpu and value.device[0] == "cuda" and not arguments.validate
    levels = None if stays_on_gpu else _read_levels(shapes, starts, S)
    deterministic = arguments.deterministic
    if not (deterministic is None or isinstance(deterministic, bool)):
        raise TypeError(f"deterministic: expected True, False or None, got {type(deterministic).__name__}")
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
        im2col_step=_positive_int("im2col_step", arguments.im2col_step),
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
        references=views.get("reference_points"),
        shapes=shapes if stays_on_gpu else None,
        starts=starts if stays_on_gpu else None,
        lengths=lengths,
        grad_output=views.get("grad_output"),
    )
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


def _read_samples(
    names: ArgumentNames, locations: View, weights: View, variant: Variant, N: int, M: int, L: int
) -> tuple[int, int]:
    """Q and P of locations and weights, or of offsets and logits."""
    samples: tuple[int, ...]
    if variant.num_points is None:
        _, Q, _, _, P, _ = _dimensions(names.locations, locations, "[N, Q, M, L, P, 2]")
        samples, symbols = (L, P), "L, P"
    else:
        _, Q, _, _, _ = _dimensions(names.locations, locations, "[N, Q, M, sum(num_points), 2]")
        P, samples, symbols = 0, (sum(variant.num_points),), "sum(num_points)"
    _check_shape(names.locations, locations, f"[N, Q, M, {symbols}, 2]", (N, Q, M, *samples, 2))
    _check_shape(names.weights, weights, f"[N, Q, M, {symbols}]", (N, Q, M, *samples))
    return Q, P


def _read_packed(names: ArgumentNames, packed: View, variant: Variant, N: int, M: int, L: int) -> tuple[int, int]:
    """Q and P of offsets and logits in one array."""
    symbols = "L*P*3" if variant.num_points is None else "sum(num_points)*3"
    name = f"{names.locations} without {names.weights}"
    _, Q, _, numbers = _dimensions(name, packed, f"[N, Q, M, {symbols}]")
    P = 0 if variant.num_points else numbers // max(3 * L, 1)
    _check_shape(name, packed, f"[N, Q, M, {symbols}]", (N, Q, M, 3 * sum(variant.num_points or (P,) * L)))
    return Q, P


def _read_references(references: View, N: int, Q: int, L: int, packed: bool) -> FusedFrontEnd:
    """The form of the reference points [N, Q, L or 1, 2 or 4]."""
    symbols = "[N, Q, L, 2]"
    _, _, levels, coordinates = _dimensions("reference_points", references, symbols)
    if levels == 1:
        symbols = symbols.replace("L", "1")
    boxes = symbols.replace("2]", "4]")
    if coordinates not in (2, 4):
        got = list(references.shape)
        raise ValueError(f"reference_points: expected shape {symbols} for points or {boxes} for boxes, got {got}")
    if coordinates == 4:
        symbols = boxes
    expected = (N, Q, 1 if levels == 1 else L, coordinates)
    _check_shape("reference_points", references, symbols, expected)
    return FusedFrontEnd(coordinates, levels, references.dtype, packed)


def read_variant(variant: Variant, L: int) -> Variant:
    """`variant`, checked and with `num_points` as a tuple."""
    num_points, interpolation, padding_mode, align_corners = variant
    for name, given, known in (
        ("interpolation", interpolation, ("bilinear", "nearest")),
        ("padding_mode", padding_mode, ("zeros", "border")),
    ):
        if given not in known:
            raise ValueError(f"{name}: expected {known[0]!r} or {known[1]!r}, got {given!r}")
    if not isinstance(align_corners, bool):
        raise TypeError(f"align_corners: expected True or False, got {type(align_corners).__name__}")
    if interpolation == "nearest":
        defaults = PLAIN._asdict()
        chosen: dict[str, Any] = {"padding_mode": padding_mode, "align_corners": align_corners}
        for name, given in chosen.items():
            if given != defaults[name]:
                raise ValueError(
                    f"{name}: expected {defaults[name]!r} with interpolation='nearest', which always clamps the index "
                    f"int(location * size + 0.5) into the level, got {given!r}"
                )
    if num_points is not None:
        if not isinstance(num_points, (list, tuple)):
            raise TypeError(f"num_points: expected a list or tuple of ints, got {type(num_points).__name__}")
        num_points = tuple(_positive_int("num_points", count) for count in num_points)
        if len(num_points) != L:
            raise ValueError(f"num_points: expected one number per level, L = {L}, got {list(num_points)}")
    return Variant(num_points, interpolation, padding_mode, align_corners)


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


def _dimensions(name: str, view: View, symbols: str) -> tuple[int, ...]:
    if len(view.shape) != symbols.count(",") + 1:
        raise ValueError(f"{name}: expected shape {symbols}, got {list(view.shape)}")
    return view.shape


def _check_shape(name: str, view: View, symbols: str, expected: tuple[int, ...]) -> None:
    if view.shape != expected:
        raise ValueError(f"{name}: expected shape {symbols} = {list(expected)}, got {list(view.shape)}")


def _read_metadata(name: str, metadata: Any) -> View:
    """The view of integer metadata; Python sequences become NumPy arrays."""
    if isinstance(metadata, (list, tuple)):
        try:
            array = np.asarray(metadata)
        except ValueError:
            raise ValueError(f"{name}: expected rows of equal length, got {metadata!r}") from None
        if array.size == 0:
            array = np.zeros((0, 2) if name == "spatial_shapes" else (0,), np.int64)
        metadata = array
    view = arrays.view(name, metadata)
    if not view.dtype.startswith(("int", "uint")):
        raise TypeError(f"{name}: expected an integer dtype, got {view.dtype}")
    return view


def _read_starts(level_start_index: Any, L: int) -> View | None:
    if level_start_index is None:
        return None
    starts = _read_metadata("level_start_index", level_start_index)
    if starts.shape != (L,):
        raise ValueError(f"level_start_index: expected shape [L] with L = {L}, got {list(starts.shape)}")
    return starts


def _read_lengths(query_lengths: Any, N: int, Q: int, device: Device) -> View:
    """The view of the number of queries per image. On the host it is checked; on a GPU the kernels clamp it."""
    lengths = _read_metadata("query_lengths", query_lengths)
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


def _read_levels(shapes: View, starts: View | None, S: int) -> tuple[tuple[int, int, int], ...]:
    """(H, W, start) of each level; metadata on a GPU is read back."""
    sizes = arrays.to_numpy(shapes).tolist()
    firsts = contiguous_starts(sizes) if starts is None else arrays.to_numpy(starts).tolist()
    for level, ((h, w), start) in enumerate(zip(sizes, firsts, strict=True)):
        if h <= 0 or w <= 0:
            raise ValueError(f"spatial_shapes: expected positive (H, W), got ({h}, {w}) for level {level}")
        if start < 0:
            raise ValueError(f"level_start_index: expected starts of at least 0, got {start} for level {level}")
        if start + h * w > S:
            raise ValueError(
                f"spatial_shapes: expected level {level} of {h} x {w} pixels from pixel {start} to fit into S = {S}, "
                f"got an end of {start + h * w}"
            )
    return tuple((h, w, start) for (h, w), start in zip(sizes, firsts, strict=True))


def _positive_int(name: str, number: Any) -> int:
    if isinstance(number, (bool, np.bool_)):
        raise TypeError(f"{name}: expected a positive int, got {number!r}")
    try:
        result = operator.index(number)
    except TypeError:
        raise TypeError(f"{name}: expected a positive int, got {number!r}") from None
    if result <= 0:
        raise ValueError(f"{name}: expected a positive int, got {result}")
    return result


def _device_name(device: Device) -> str:
    return "cpu" if device[0] == "cpu" else f"cuda:{device[1]}"
