"""Export to ONNX for TensorRT: the operator as the plugin that TensorRT ships, ``MultiscaleDeformableAttnPlugin_TRT``.

The plugin samples bilinearly, with zeros outside a level, and takes as many points in each level. Every other call
becomes one of that form.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..call import Arguments, Variant
from . import compat
from .metadata import tensor_of
from .operators import ATTENTION
from .samples import in_float, level_of_samples, plain_samples, to_pixels

# ModelOpt's and ONNX Runtime's name for TensorRT's plugins. TensorRT's parser looks at the name of the node alone.
_NODE = "trt.plugins::MultiscaleDeformableAttnPlugin_TRT"
_PLUGIN_VERSIONS = (1, 2)
# A location outside of every level.
_OUTSIDE = -1.0
_plugin_version: int | None = None


@contextlib.contextmanager
def tensorrt(plugin_version: int = 2) -> Iterator[None]:
    """Inside this context, ``torch.onnx.export`` writes each call of the operator as a node of TensorRT's plugin.

    TensorRT ships the plugin, ``MultiscaleDeformableAttnPlugin_TRT``; ``init_libnvinfer_plugins`` registers it. Other
    runtimes do not know it: without this context the operator is exported as ``grid_sample``. The plugin computes in
    float32 here, whatever the dtype of the arrays. Holds for the whole process.

    Parameters
    ----------
    plugin_version : int
        2 for TensorRT 10.11 and later, 1 for TensorRT 8.4 to 10.10.

    Examples
    --------
    >>> with cupy_msda.torch.onnx.tensorrt():
    ...     torch.onnx.export(model, inputs, "model.onnx", dynamo=True)

    Raises
    ------
    TypeError
        In the export, for float64, which the plugin does not have.
    """
    if plugin_version not in _PLUGIN_VERSIONS:
        raise ValueError(f"plugin_version: expected 1 or 2, got {plugin_version!r}")
    global _plugin_version
    before, _plugin_version = _plugin_version, plugin_version
    try:
        yield
    finally:
        _plugin_version = before


def exports_plugin() -> bool:
    """Whether ``torch.onnx.export`` runs, inside :func:`tensorrt`."""
    return _plugin_version is not None and torch.onnx.is_in_onnx_export()


def plugin_attention(arguments: Arguments) -> Tensor:
    """The call as a node of the plugin."""
    value, dtype = arguments.value, arguments.value.dtype
    if dtype == torch.float64:
        raise TypeError(
            "value: expected float32 or a 16-bit dtype, which TensorRT has, got float64: export model.float()"
        )
    arguments, locations, weights, _ = plain_samples(in_float(arguments))
    N, Q, M = locations.shape[:3]
    shapes = tensor_of(arguments.spatial_shapes, value.device).reshape(-1, 2)
    L, variant = shapes.shape[0], arguments.variant
    if 0 in (N, Q, M, L):
        raise ValueError(f"expected N, Q, M and L of at least 1 in TensorRT's plugin, got {(N, Q, M, L)}")
    points = variant.num_points or (locations.shape[-2],) * L
    locations, weights = locations.reshape(N, Q, M, sum(points), 2), weights.reshape(N, Q, M, sum(points))
    if variant.clamped or variant.align_corners:
        sizes = shapes.flip(-1).to(locations.dtype).index_select(0, level_of_samples(points, value.device))
        locations = _plain_locations(locations, sizes, variant)
    most = max(points)
    locations = _with_equal_points(locations, points, _OUTSIDE).reshape(N, Q, M, L, most, 2)
    weights = _with_equal_points(weights[..., None], points, 0.0).reshape(N, Q, M, L, most)
    starts = arguments.level_start_index
    starts = _contiguous_starts(shapes) if starts is None else tensor_of(starts, value.device)
    output = _node(arguments.value, shapes.to(torch.int32), starts.to(torch.int32), locations, weights)
    return output.reshape(N, Q, M * value.shape[3]).to(dtype)


def _plain_locations(locations: Tensor, sizes: Tensor, variant: Variant) -> Tensor:
    """Locations at which bilinear sampling with zeros outside gives what the variant gives. `sizes` are (W, H)."""
    counts = (locations == locations) if variant.clamped else locations.abs() < torch.inf
    # What lies this far outside is the same as at infinity.
    pixels = to_pixels(locations.clamp(-1, 2), sizes, variant)
    if variant.nearest:
        pixels = pixels.floor()
    if variant.clamped:
        pixels = torch.minimum(pixels.clamp_min(0), sizes - 1)
    return torch.where(counts.all(-1, keepdim=True), (pixels + 0.5) / sizes, _OUTSIDE)


def _with_equal_points(samples: Tensor, points: Sequence[int], fill: float) -> Tensor:
    """[N, Q, M, K, ...] with as many samples in each level as in the largest: new ones hold `fill`."""
    if min(points) == max(points):
        return samples
    K, indices, first = sum(points), [], 0
    for count in points:
        indices += [first + point if point < count else K for point in range(max(points))]
        first += count
    with_fill = F.pad(samples, (0, 0, 0, 1), value=fill)
    return with_fill.index_select(3, torch.tensor(indices, device=samples.device))


def _contiguous_starts(shapes: Tensor) -> Tensor:
    """The first pixel of each level, without CumSum, which TensorRT does not have for integers."""
    starts = [torch.zeros_like(shapes[0, 0])]
    for pixels in (shapes[:-1, 0] * shapes[:-1, 1]).unbind():
        starts.append(starts[-1] + pixels)
    return torch.stack(starts)


def _node(value: Tensor, shapes: Tensor, starts: Tensor, locations: Tensor, weights: Tensor) -> Tensor:
    """[N, Q, M, D], by the exporter that runs."""
    inputs = (value, shapes, starts, locations, weights)
    if compat.tracing():
        return _PluginNode.apply(*inputs, str(_plugin_version))
    operators: Any = getattr(torch.onnx, "ops", None)
    if operators is None:
        raise RuntimeError(
            "torch.onnx.export: this torch writes nodes of plugins with dynamo=False alone; torch 2.8 does both"
        )
    attributes = {"plugin_version": str(_plugin_version), "plugin_namespace": ""}
    shape = (value.shape[0], locations.shape[1], *value.shape[2:])
    return operators.symbolic(_NODE, inputs, attributes, dtype=value.dtype, shape=shape, version=1)


class _PluginNode(torch.autograd.Function):
    """The node in what ``torch.jit.trace`` records for ``torch.onnx.export(dynamo=False)``."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        value, shapes, starts, locations, weights, _ = inputs
        output = ATTENTION.forward(value, shapes, starts, locations, weights)
        return output.reshape(*output.shape[:2], *value.shape[2:])

    @staticmethod
    def symbolic(g: Any, *inputs: Any) -> Any:
        *tensors, version = inputs
        node = g.op(_NODE, *tensors, plugin_version_s=version, plugin_namespace_s="")
        value, locations = (tensors[place].type().sizes() for place in (0, 3))
        if value is not None and locations is not None:
            node.setType(tensors[0].type().with_sizes([value[0], locations[1], *value[2:]]))
        return node
