"""Metadata is an input like any other: a change between forward and backward raises, or changes nothing.

A tensor is saved as autograd saves tensors, so a change raises. Sequences and arrays of other libraries are copied.
"""

import numpy as np
import pytest
import torch

from cupy_msda.torch import ms_deform_attn, ms_deform_attn_fused
from tests.helpers.torch_calls import DEVICES

SIZES, STARTS, LENGTHS = [[2, 3], [3, 2]], [0, 6], [2, 3]
OTHER_SIZES, OTHER_STARTS, OTHER_LENGTHS = [[3, 2], [2, 3]], [6, 0], [3, 1]


def inputs(device, fused):
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, 12, 1, 4), *([(2, 3, 2, 2)] if fused else []), (2, 3, 1, 2, 2, 2), (2, 3, 1, 2, 2)]
    return [torch.rand(shape, generator=generator).to(device).requires_grad_() for shape in shapes]


def call(given, sizes, starts, lengths, fused):
    function = ms_deform_attn_fused if fused else ms_deform_attn
    return function(given[0], sizes, starts, *given[1:], query_lengths=lengths)


def grads(output, given):
    return torch.autograd.grad(output, given, torch.ones_like(output), retain_graph=True)


def fill(metadata, numbers):
    """Changes the numbers of `metadata` in place."""
    if isinstance(metadata, torch.Tensor):
        metadata.copy_(torch.tensor(numbers))
    else:
        metadata[:] = numbers


AS_TENSORS = {"int64": torch.tensor, "int32": lambda numbers: torch.tensor(numbers, dtype=torch.int32)}
NOT_TENSORS = {"list": lambda numbers: [*numbers], "array": np.array}
CHANGED = {"sizes": OTHER_SIZES, "starts": OTHER_STARTS, "lengths": OTHER_LENGTHS}


def metadata_of(make, ragged):
    return {"sizes": make(SIZES), "starts": make(STARTS), "lengths": make(LENGTHS) if ragged else None}


@pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])
@pytest.mark.parametrize("ragged", [False, True])
def test_a_change_that_autograd_does_not_see_changes_nothing(ragged, fused):
    given = inputs("cpu", fused)
    made = metadata_of(np.array, ragged)
    output = call(given, *(None if part is None else torch.from_numpy(part) for part in made.values()), fused)
    want = grads(output, given)
    for name, numbers in CHANGED.items():
        if made[name] is not None:
            made[name][:] = numbers
    assert all(map(torch.equal, grads(output, given), want))


@pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])
@pytest.mark.parametrize("ragged", [False, True])
def test_metadata_made_in_inference_mode_trains(ragged, fused):
    given = inputs("cpu", fused)
    with torch.inference_mode():
        made = metadata_of(torch.tensor, ragged)
        if fused:
            given[1] = given[1].clone()
    leaves = [tensor for tensor in given if tensor.requires_grad]
    output = call(given, *made.values(), fused)
    want = call(given, *metadata_of(torch.tensor, ragged).values(), fused)
    assert all(map(torch.equal, grads(output, leaves), grads(want, leaves)))


@pytest.mark.parametrize("calls", [1, 3], ids=["first call", "repeated call"])
@pytest.mark.parametrize("create_graph", [False, True])
@pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])
@pytest.mark.parametrize(("name", "ragged"), [("sizes", False), ("starts", False), ("sizes", True), ("lengths", True)])
@pytest.mark.parametrize("kind", AS_TENSORS)
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("where", ["cpu", "device"])
def test_a_tensor_that_is_refilled_raises(device, where, kind, name, ragged, fused, create_graph, calls):
    given = inputs(device, fused)
    made = metadata_of(lambda numbers: AS_TENSORS[kind](numbers).to("cpu" if where == "cpu" else device), ragged)
    for _ in range(calls):
        output = call(given, *made.values(), fused)
    fill(made[name], CHANGED[name])
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(output, given, torch.ones_like(output), create_graph=create_graph)


@pytest.mark.parametrize("create_graph", [False, True])
@pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])
@pytest.mark.parametrize(("name", "ragged"), [("sizes", False), ("starts", False), ("sizes", True), ("lengths", True)])
@pytest.mark.parametrize("kind", NOT_TENSORS)
@pytest.mark.parametrize("device", DEVICES)
def test_a_sequence_or_array_that_is_refilled_changes_nothing(device, kind, name, ragged, fused, create_graph):
    given = inputs(device, fused)
    made = metadata_of(NOT_TENSORS[kind], ragged)
    output = call(given, *made.values(), fused)
    want = grads(output, given)
    fill(made[name], CHANGED[name])
    have = torch.autograd.grad(output, given, torch.ones_like(output), create_graph=create_graph)
    for one, other in zip(have, want, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_levels_within_a_list_are_copied_too():
    given, sizes = inputs("cpu", False), [[2, 3], [3, 2]]
    output = call(given, sizes, None, None, False)
    want = grads(output, given)
    sizes[0][:] = [3, 2]
    for one, other in zip(grads(output, given), want, strict=True):
        assert torch.equal(one, other)
