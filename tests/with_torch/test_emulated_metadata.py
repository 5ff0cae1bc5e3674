"""Metadata of every kind in calls of torch on an emulated GPU, each held to the reference."""

import numpy as np
import pytest
import torch

from tests.helpers import emulated_torch, emulator
from tests.helpers.cases import Case
from tests.helpers.emulated_calls import GAPS, PLAIN
from tests.helpers.emulated_torch_calls import Checked, Tensors, assert_results, reference, unaligned

pytestmark = pytest.mark.skipif(emulator.COMPILER is None, reason="needs g++")
torch_gpu = pytest.fixture(emulated_torch.fixture)

# The first call of a layout leaves its plan, the second one takes it from the plan cache, the third is a recent one.
REPEATED = range(3)

METADATA = {
    "int64 on the device": lambda tensors: tensors.metadata_on_device(torch.int64),
    "int32 on the device": lambda tensors: tensors.metadata_on_device(torch.int32),
    "tensors on the host": lambda tensors: tuple(map(torch.from_numpy, (tensors.inputs.shapes, tensors.inputs.starts))),
    "lists": lambda tensors: (tensors.inputs.shapes.tolist(), tensors.inputs.starts.tolist()),
    "arrays": lambda tensors: (tensors.inputs.shapes, tensors.inputs.starts),
    "host and device": lambda tensors: (torch.from_numpy(tensors.inputs.shapes), tensors.metadata[1]),
    "tensors on another device": lambda tensors: tensors.metadata_on_device(torch.int64, device=1),
    "CuPy's on the device": lambda tensors: of_cupy(tensors, 0),
    "CuPy's on another device": lambda tensors: of_cupy(tensors, 1),
    "CuPy's int32 on the device": lambda tensors: of_cupy(tensors, 0, np.int32),
}


@pytest.mark.parametrize("place", ["shapes", "starts"])
def test_one_number_of_another_type_is_refused_although_its_plan_is_known(torch_gpu, place):
    """42.0 == 42, but not for the contract."""
    calls = Checked(torch_gpu, Case("types", levels=((42, 1), (1, 12)), starts=(0, 42)))
    for _ in REPEATED:
        calls.check(change=lambda tensors: setattr(tensors, "metadata", METADATA["lists"](tensors)))

    def change(tensors):
        shapes, starts = METADATA["lists"](tensors)
        if place == "shapes":
            shapes[0] = [42.0, 1]
        else:
            starts[1] = 42.0
        tensors.metadata = shapes, starts

    with pytest.raises((TypeError, ValueError), match=r"spatial_shapes|level_start_index"):
        calls.check(change=change)


def of_cupy(tensors, device, dtype=np.int64):
    """Metadata as arrays of another library on a device."""
    put = tensors.torch_gpu.gpu.put
    return put(tensors.inputs.shapes.astype(dtype), device), put(tensors.inputs.starts.astype(dtype), device)


def test_every_kind_of_metadata_of_one_layout(torch_gpu):
    calls = Checked(torch_gpu, GAPS)
    for kind in (*METADATA, *reversed(METADATA), *METADATA):
        calls.check(change=lambda tensors, kind=kind: setattr(tensors, "metadata", METADATA[kind](tensors)))


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_metadata_on_the_device_without_starts(torch_gpu, dtype):
    calls = Checked(torch_gpu, PLAIN)
    for _ in REPEATED:
        calls.check(change=lambda tensors: setattr(tensors, "metadata", tensors.metadata_on_device(dtype, False)))


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_metadata_with_strides_on_the_device(torch_gpu, dtype):
    def change(tensors):
        shapes, starts = tensors.metadata_on_device(dtype)
        tensors.metadata = torch_gpu.put(shapes.cpu().T.contiguous().T), starts

    calls = Checked(torch_gpu, PLAIN)
    for one in (None, change) * 3:
        calls.check(change=one)


@pytest.mark.parametrize("kind", ["int64 on the device", "tensors on the host", "lists"])
def test_level_sizes_that_change_between_calls_of_the_same_shapes(torch_gpu, kind):
    levels = [((6, 7), (3, 4)), ((7, 6), (4, 3)), ((2, 21), (6, 2))]
    for sizes in levels * 2:
        calls = Checked(torch_gpu, Case("sizes", levels=sizes, starts=(0, 42)))
        calls.check(change=lambda tensors: setattr(tensors, "metadata", METADATA[kind](tensors)))


def test_metadata_that_changes_before_the_backward_is_refused_on_the_device(torch_gpu):
    tensors = Tensors(torch_gpu, GAPS.inputs())
    for _ in REPEATED:
        output = tensors.forward()
        tensors.metadata[0].add_(0)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            tensors.backward(output)


@pytest.mark.parametrize("aligned", [True, False])
def test_lists_that_change_before_the_backward(torch_gpu, aligned):
    for _ in REPEATED:
        inputs = GAPS.inputs()
        tensors = Tensors(torch_gpu, inputs)
        tensors.metadata = METADATA["lists"](tensors)
        output = tensors.forward()
        tensors.metadata[0][0][:] = [1, 1]
        tensors.metadata[1][:] = [0, 0]
        if not aligned:  # the plan hands the call to the general path
            tensors.grad_output = unaligned(torch_gpu, tensors.grad_output)
        assert_results((output, tensors.backward(output)), reference(inputs), inputs)
