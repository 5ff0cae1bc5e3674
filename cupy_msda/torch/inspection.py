"""Sampling points and weights of the layers of a model, which the fused operator does not write to memory."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import operator
import threading
import warnings
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..call import Arguments
from ..options import requested_variant
from . import checks, compat
from .metadata import tensor_of
from .samples import in_float, masked, plain_samples
from .watchers import watchers


@dataclasses.dataclass(frozen=True, eq=False)
class Record:
    """The samples of one call: N images, Q recorded queries, M heads, L levels, P points, K = sum(num_points).

    Tensors are detached copies on the CPU, in float64 if the call computes in float64, else in float32.

    Attributes
    ----------
    layer : str
        Name of the module that made the call, as in ``model.named_modules()``; ``""`` is the model itself.
    queries : tuple of int
        Index of each recorded query among all queries of the call.
    sampling_locations : Tensor [N, Q, M, L, P, 2], or [N, Q, M, K, 2]
        (x, y), normalised: 0 is the left or top edge of the level, 1 the right or bottom one. The second shape is that
        of a call with `num_points`, the points of each level after those of the level before it. NaN in queries that
        are padding.
    attention_weights : Tensor [N, Q, M, L, P], or [N, Q, M, K]
        In a fused call after the softmax. 0 in queries that are padding.
    reference_points : Tensor [N, Q, L or 1, 2 or 4], or None
        Points (x, y) or boxes (x, y, width, height) of a fused call.
    spatial_shapes : tuple of (int, int)
        (H, W) of each level.
    num_points : tuple of int
        Points of each level, also where all levels have P.
    align_corners : bool
        Option of the call. If True, locations 0 and 1 are the centres of the outermost pixels.
    """

    layer: str
    queries: tuple[int, ...] = dataclasses.field(repr=False)
    sampling_locations: Tensor = dataclasses.field(repr=False)
    attention_weights: Tensor = dataclasses.field(repr=False)
    reference_points: Tensor | None = dataclasses.field(repr=False)
    spatial_shapes: tuple[tuple[int, int], ...]
    num_points: tuple[int, ...]
    align_corners: bool = False


@contextlib.contextmanager
def inspect(
    model: nn.Module, layers: Iterable[str] | None = None, queries: Iterable[int] | None = None
) -> Iterator[list[Record]]:
    """Inside this context, record the sampling points and weights of the calls that the layers of a model make.

    Seen are :func:`ms_deform_attn`, :func:`ms_deform_attn_fused`, ``MSDeformAttnFunction.apply`` and the forward of
    :mod:`cupy_msda.torch.extension`, and so every layer of this package and every patched model of transformers, mmcv
    and others. Results and gradients have the same bits as without this context.

    Parameters
    ----------
    model : torch.nn.Module
        Calls outside of it are not recorded.
    layers : iterable of str, optional
        Names of modules, as in ``model.named_modules()``, whose calls are recorded; by default all of them. A record
        has the name of the innermost of these modules that runs.
    queries : iterable of int, optional
        Which queries to record; by default all. An encoder has as many as its levels have pixels: choose a few there.

    Returns
    -------
    context manager
        It gives a list that grows by one :class:`Record` per call, in the order of the calls.

    Raises
    ------
    TypeError
        For other kinds of arguments.
    ValueError
        For names that the model does not have, and for negative queries.
    IndexError
        In the call of the layer, for a query that it does not have.

    Warns
    -----
    UserWarning
        At the end, where no call was recorded: a model of another package has to be patched first.

    Notes
    -----
    What ``torch.compile``, ``torch.export`` or ``torch.jit.trace`` has compiled is not seen: inspect the model as it
    was before. Nor are calls inside the transforms of torch.func or under dispatch modes, and tensors without elements
    (meta, fake). Activation checkpointing calls a layer again in the backward, which is one more record. On a GPU each
    record waits for the results, so that it cannot be made during the capture of a CUDA graph.

    Examples
    --------
    >>> with cupy_msda.torch.inspect(model, layers=["decoder.5"], queries=[17]) as records:  # doctest: +SKIP
    ...     model(images)
    >>> cupy_msda.plot.sampling_points(records[0], image, query=17)  # doctest: +SKIP
    """
    chosen = _chosen_modules(model, layers)
    indices = None if queries is None else _indices(queries)
    running = _Running()
    records: list[Record] = []

    def watch(arguments: Arguments) -> None:
        if running.names and _readable(arguments):
            records.append(_record(running.names[-1], arguments, indices))

    with contextlib.ExitStack() as stack:
        for name, module in chosen.items():
            if not isinstance(module, torch.jit.ScriptModule):  # it takes no hooks, and is compiled
                for handle in running.register(name, module):
                    stack.callback(handle.remove)
        watchers.append(watch)
        stack.callback(watchers.remove, watch)
        yield records
    if not records:
        warnings.warn(
            "cupy_msda: no call was recorded. A model of another package has to be patched first (with "
            "cupy_msda.torch.patch(model), cupy_msda.torch.inspect(model) as records), and compiled code is not seen",
            stacklevel=3,
        )


class _Running(threading.local):
    """The names of the chosen modules that run in this thread, outermost first."""

    def __init__(self) -> None:
        self.names: list[str] = []

    def register(self, name: str, module: nn.Module) -> tuple[Any, ...]:
        """Hooks of a module that keep its name here while its forward runs."""

        def enter(*_: Any) -> None:
            if not torch.compiler.is_compiling():
                self.names.append(name)

        def leave(*_: Any) -> None:
            if not torch.compiler.is_compiling() and name in self.names:
                # An interruption (BaseException) skips hooks, and so leaves the names of inner modules.
                while self.names.pop() != name:
                    pass

        # Before all other hooks, one of which may fail: `leave` then finds the name.
        entering = module.register_forward_pre_hook(enter, prepend=True)
        return entering, module.register_forward_hook(leave, always_call=True)


def _chosen_modules(model: Any, layers: Any) -> dict[str, nn.Module]:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    if layers is None:
        return dict(model.named_modules())
    if isinstance(layers, str) or not isinstance(layers, Iterable):
        raise TypeError(f"layers: expected a list of names, got {layers!r}")
    modules = dict(model.named_modules(remove_duplicate=False))
    names = list(layers)
    unknown = [name for name in names if name not in modules]
    if unknown:
        raise ValueError(f"layers: expected names as in model.named_modules(), got {unknown}")
    return {name: modules[name] for name in names}


def _indices(queries: Any) -> tuple[int, ...]:
    try:
        indices = tuple(operator.index(query) for query in queries)
    except TypeError:
        raise TypeError(f"queries: expected a list of ints, got {queries!r}") from None
    if any(query < 0 for query in indices):
        raise ValueError(f"queries: expected indices of at least 0, got {list(indices)}")
    return indices


def _readable(arguments: Arguments) -> bool:
    """Whether all operands are tensors whose elements are known now."""
    given = (arguments.value, arguments.locations, arguments.weights, arguments.reference_points)
    tensors = [part for part in given if part is not None]
    metadata = (arguments.spatial_shapes, arguments.query_lengths)
    tensors += [part for part in metadata if isinstance(part, Tensor)]
    if not all(isinstance(tensor, Tensor) and not tensor.is_meta for tensor in tensors):
        return False
    return not torch.compiler.is_compiling() and compat.all_known(tensors)


# In this order: leaving the mode of inference switches gradients on.
@torch.inference_mode(False)
@torch.no_grad()
def _record(layer: str, arguments: Arguments, queries: tuple[int, ...] | None) -> Record:
    Q = arguments.locations.shape[1]
    if queries is None:
        queries = tuple(range(Q))
    if queries and max(queries) >= Q:
        raise IndexError(f"queries: expected indices below Q = {Q} in the layer {layer!r}, got {max(queries)}")
    variant = requested_variant(*arguments.variant)
    arguments = checks.with_metadata_tensors(dataclasses.replace(arguments, variant=variant))
    at = torch.tensor(queries, dtype=torch.int64, device=arguments.value.device)
    few = _of_queries(arguments, at)
    references = few.reference_points
    locations, weights = plain_samples(few)[1:3]
    shapes = tuple((int(height), int(width)) for height, width in arguments.spatial_shapes.tolist())
    num_points = variant.num_points
    if num_points is None:
        N, _, M = weights.shape[:3]
        L = len(shapes)
        P = math.prod(weights.shape[3:]) // max(L, 1)
        num_points = (P,) * L
        locations = locations.reshape(N, len(queries), M, L, P, 2)
        weights = weights.reshape(N, len(queries), M, L, P)
    if arguments.query_lengths is not None:
        lengths = tensor_of(arguments.query_lengths, at.device).to(torch.int64)
        valid = at < lengths[:, None]
        locations, weights = masked(locations, valid, torch.nan), masked(weights, valid)
    return Record(
        layer, queries, locations.cpu(), weights.cpu(), None if references is None else references.cpu(), shapes,
        num_points, variant.align_corners,
    )  # fmt: skip


def _of_queries(arguments: Arguments, at: Tensor) -> Arguments:
    """Copies of the samples of the queries `at`, in the dtype of the arithmetic, without the elements of value."""
    samples: dict[str, Any] = {
        name: None if (tensor := getattr(arguments, name)) is None else tensor.index_select(1, at)
        for name in ("locations", "weights", "reference_points")
    }
    value = arguments.value.new_empty(0)
    return in_float(dataclasses.replace(arguments, value=value, query_lengths=None, **samples))
