"""onnx's reference evaluator with this package's operator as the node of TensorRT's plugin."""

import numpy as np
import onnx
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun

import cupy_msda

INPUTS = ("value", "spatial_shapes", "level_start_index", "sampling_locations", "attention_weights")


class MultiscaleDeformableAttnPlugin_TRT(OpRun):
    """What the plugin demands of its inputs, and what it computes. The class has the name of the node."""

    op_domain = "trt.plugins"

    def _run(self, value, shapes, starts, locations, weights, plugin_version=None, plugin_namespace=None):
        assert plugin_version in ("1", "2")
        assert plugin_namespace == ""
        assert value.dtype == locations.dtype == weights.dtype == np.float32
        assert shapes.dtype == starts.dtype == np.int32
        (_, _, M, D), (N, Q) = value.shape, locations.shape[:2]
        (L,), P = starts.shape, locations.shape[4]
        assert shapes.shape == (L, 2)
        assert locations.shape == (len(value), Q, M, L, P, 2)
        assert weights.shape == locations.shape[:-1]
        output = cupy_msda.ms_deform_attn(value, shapes, starts, locations, weights)
        return (output.reshape(N, Q, M, D),)


class GatherElements(OpRun):
    """onnx's own takes at most 64 elements along an axis."""

    op_domain = ""

    def _run(self, data, indices, axis=0):
        return (np.take_along_axis(data, indices, axis),)


def evaluate(path, inputs):
    """The first output of an ONNX file that the checker accepts, for inputs by their place."""
    model = onnx.load(path)
    onnx.checker.check_model(model, full_check=True)
    session = ReferenceEvaluator(model, new_ops=[MultiscaleDeformableAttnPlugin_TRT, GatherElements])
    names = [given.name for given in model.graph.input]
    feed = {name: tensor.numpy() for name, tensor in zip(names, inputs, strict=True)}
    return session.run(None, feed)[0]


def nodes(path):
    """The nodes of the plugin in an ONNX file, and the operator types of all others."""
    graph = onnx.load(path).graph
    plugins = [node for node in graph.node if node.domain == "trt.plugins"]
    return plugins, {node.op_type for node in graph.node if node.domain != "trt.plugins"}
