"""Calls of the array functions on an emulated GPU, held against the float64 reference."""

from typing import NamedTuple

import cupy_msda
from tests.helpers import cases
from tests.helpers.cases import Case
from tests.helpers.tolerance import assert_close

# Few kernels, each compiled once and then used by the tests of arrays and of torch.
PLAIN = Case("plain", M=3)  # N * M is not N + M
GAPS = Case("gaps", starts=(4, 50), S=64, M=3)
DENSE = Case("dense", M=3, queries=60)
HALF = ("float16", "float32")
FUSED = {"coordinates": 2}
PACKED_BOXES = {"coordinates": 4, "levels": 1, "packed": True}
NAMES = ("grad_value", "grad_locations", "grad_weights", "grad_references")


class Metadata(NamedTuple):
    """Shapes, starts and lengths as the caller passes them; None leaves them as the inputs have them."""

    shapes: object = None
    starts: object = None
    lengths: object = None


def run(gpu, inputs, device=0, metadata=Metadata(), **options):  # noqa: B008  (a tuple)
    """Output and gradients of value, locations, weights and references, as arrays of the device."""
    results = call(gpu, inputs, device, metadata, **options)
    gpu.check_device()
    return results


def call(gpu, inputs, device=0, metadata=Metadata(), **options):  # noqa: B008
    """The same, while other threads may be between two launches: the caller checks the GPU when all have ended."""
    value, locations, weights, grad_output = (
        part if part is None or isinstance(part, gpu.cupy.ndarray) else gpu.put(part, device)
        for part in (inputs.value, inputs.locations, inputs.weights, inputs.grad_output)
    )
    shapes = inputs.shapes if metadata.shapes is None else metadata.shapes
    starts = inputs.starts if metadata.starts is None else metadata.starts
    options["query_lengths"] = metadata.lengths
    if not hasattr(inputs, "references"):
        samples = (value, shapes, starts, locations, weights)
        output = cupy_msda.ms_deform_attn(*samples, **options)
        return output, (*cupy_msda.ms_deform_attn_backward(*samples, grad_output, 64, **options), None)
    references = gpu.put(inputs.references, device)
    samples = (value, shapes, starts, references, locations, weights)
    output = cupy_msda.ms_deform_attn_fused(*samples, **options)
    of_value, of_references, *of_samples = cupy_msda.ms_deform_attn_fused_backward(*samples, grad_output, **options)
    return output, (of_value, *of_samples, of_references)


def wanted(inputs, lengths=None, **variant):
    """Output and gradients of the reference, in the order of :func:`run`."""
    if hasattr(inputs, "references"):
        return cases.expected_fused(inputs, **variant)
    if lengths is not None:
        output, grads = cases.expected_ragged(inputs, lengths, **variant)
    else:
        output, grads = cases.expected(inputs, **variant)
    return output, (*grads, None)


def assert_results(results, want, inputs):
    """Within the tolerance table, and in the dtypes of the inputs; `inputs` are NumPy arrays."""
    (output, grads), (want_output, want_grads) = results, want
    assert_close(output.get(), want_output, inputs.value.dtype.name)
    like = (inputs.value, inputs.locations, inputs.weights, getattr(inputs, "references", None))
    for name, got, expected, part in zip(NAMES, grads, want_grads, like, strict=True):
        assert (got is None) == (expected is None), name
        if got is None:
            continue
        assert got.dtype == part.dtype
        assert got.device.id == output.device.id
        got = got.get()
        if name == "grad_locations" and not hasattr(inputs, "references") and got.ndim == 6:
            got, expected = (cases.pixel_units(grad, inputs.shapes) for grad in (got, expected))
        assert_close(got, expected, part.dtype.name, name)


def check(gpu, inputs, device=0, **options):
    """The results of a call are those of the reference; returns them."""
    results = run(gpu, inputs, device, **options)
    assert_results(results, wanted(inputs), inputs)
    return results
