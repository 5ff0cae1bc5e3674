"""Calls of the torch functions on an emulated GPU, held against the float64 reference."""

import numpy as np
import torch

from cupy_msda.call import Wanted
from cupy_msda.torch import ms_deform_attn, ms_deform_attn_fused
from tests.helpers import cases
from tests.helpers.tolerance import assert_close

EVERY = Wanted(references=True)
NOTHING = Wanted(False, False, False, False)
NAMES = ("value", "locations", "weights", "references")


class Tensors:
    """NumPy inputs as tensors of a device; the `wanted` ones require a gradient.

    Attributes may be replaced before the call. `metadata` is on the device unless replaced.
    """

    def __init__(self, torch_gpu, inputs, wanted=EVERY, device=0):
        self.inputs, self.torch_gpu, self.device = inputs, torch_gpu, device
        arrays = (inputs.value, inputs.locations, inputs.weights, getattr(inputs, "references", None))
        self.value, self.locations, self.weights, self.references = (
            None if array is None else torch_gpu.put(torch.from_numpy(array), device, asked)
            for array, asked in zip(arrays, wanted, strict=True)
        )
        self.grad_output = torch_gpu.put(torch.from_numpy(inputs.grad_output), device)
        self.metadata = self.metadata_on_device(torch.int64)

    def metadata_on_device(self, dtype, starts=True, device=None):
        shapes = torch.from_numpy(self.inputs.shapes)
        given = self.inputs.starts
        first = shapes.prod(1).cumsum(0) - shapes.prod(1) if given is None else torch.from_numpy(given)
        put, device = self.torch_gpu.put, self.device if device is None else device
        return put(shapes.to(dtype), device), put(first.to(dtype), device) if starts else None

    def forward(self, **options):
        samples = (self.locations, self.weights)
        if self.references is None:
            return ms_deform_attn(self.value, *self.metadata, *samples, **options)
        return ms_deform_attn_fused(self.value, *self.metadata, self.references, *samples, **options)

    def leaves(self):
        """The tensors that require a gradient, by their names."""
        given = {name: getattr(self, name) for name in NAMES}
        return {name: tensor for name, tensor in given.items() if tensor is not None and tensor.requires_grad}

    def backward(self, output):
        """The gradients by their names."""
        leaves = self.leaves()
        grads = torch.autograd.grad(output, list(leaves.values()), self.grad_output) if leaves else ()
        return dict(zip(leaves, grads, strict=True))

    def results(self, **options):
        """Output and gradients."""
        output = self.forward(**options)
        return output, self.backward(output)


def reference(inputs, lengths=None, **variant):
    """Output, and gradients by their names."""
    if hasattr(inputs, "references"):
        output, grads = cases.expected_fused(inputs, **variant)
    elif lengths is None:
        output, grads = cases.expected(inputs, **variant)
    else:
        output, grads = cases.expected_ragged(inputs, lengths, **variant)
    return output, dict(zip(NAMES, grads, strict=False))


def assert_results(results, want, inputs):
    """Within the tolerance table, on the device and in the dtypes of the inputs."""
    (output, grads), (want_output, want_grads) = results, want
    assert_close(output.detach().cpu().numpy(), want_output, inputs.value.dtype.name)
    for name, grad in grads.items():
        got, expected = grad.cpu().numpy(), want_grads[name]
        dtype = getattr(inputs, name).dtype
        assert got.dtype == dtype
        assert grad.device == output.device
        assert output.is_cuda
        if name == "locations" and not hasattr(inputs, "references"):
            got, expected = (cases.pixel_units(part, inputs.shapes) for part in (got, expected))
        assert_close(got, expected, dtype.name, name)


class Checked:
    """Calls of one case, with other numbers each time; the numbers of a seed have their results computed once."""

    def __init__(self, torch_gpu, case, pair=("float32", "float32"), form=None):
        self.torch_gpu, self._case, self._pair, self._form = torch_gpu, case, pair, form
        self._known, self._seed = {}, 0

    def inputs(self, seed=None):
        """Those of the next seed of three, or of this one."""
        self._seed = (self._seed + 1) % 3
        inputs = self._case.inputs(*self._pair, seed=self._seed if seed is None else seed)
        return cases.to_fused(inputs, **self._form) if self._form else inputs

    def reference(self, inputs):
        key = inputs.value.tobytes()
        if key not in self._known:
            self._known[key] = reference(inputs)
        return self._known[key]

    def check(self, wanted=EVERY, change=None, device=0, **options):
        """One call; `change` may replace tensors before it. Returns output and gradients."""
        inputs = self.inputs()
        tensors = Tensors(self.torch_gpu, inputs, wanted, device)
        if change is not None:
            change(tensors)
        results = tensors.results(**options)
        assert_results(results, self.reference(inputs), inputs)
        asked = {name for name, one in wanted._asdict().items() if one}
        assert set(results[1]) == {name for name in asked if getattr(inputs, name, None) is not None}
        return results


def with_strides(tensor):
    """The same numbers with pixel and head the other way round in memory."""
    return tensor.detach().transpose(1, 2).contiguous().transpose(1, 2)


def unaligned(torch_gpu, tensor, elements=1):
    """The same numbers so many elements after an aligned address."""
    whole = torch_gpu.put(torch.cat((tensor.detach().flatten()[:elements], tensor.detach().flatten())))
    return whole[elements:].view(tensor.shape).requires_grad_(tensor.requires_grad)


def bits(tensor):
    return np.ascontiguousarray(tensor.detach().cpu().numpy()).tobytes()
