"""The CUDA sources with indices beyond 32 bits, run on the CPU: arrays that are not in memory, and constants."""

import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace

import numpy as np
import pytest

from cupy_msda.call import ALL, ValueStrides, Wanted
from cupy_msda.cuda import plan, plan_backward
from cupy_msda.cuda.gpu import H100
from cupy_msda.cuda.sorted_specs import TABLE_BYTES
from tests.helpers import cases, emulator
from tests.helpers.cases import Case
from tests.helpers.tolerance import assert_close

pytestmark = pytest.mark.skipif(emulator.COMPILER is None, reason="needs g++")

SMALL = Case("first_heads", levels=((2, 3),), N=1, M=4, D=4, P=8, queries=4)
# So many that 3 numbers per sample of all queries are beyond 2**31, and 2 are not.
HEADS = 33_000_000


def with_heads(array):
    """`array` [N, ., M, ...] as the first heads of many. Zeros that nobody touches take no memory."""
    whole = np.zeros((*array.shape[:2], HEADS, *array.shape[3:]), array.dtype)
    whole[:, :, : array.shape[2]] = array
    return whole


def run_first_head(launch, blocks, arguments):
    """The blocks of the first head."""
    assert list(arguments) == [parameter.name for parameter in launch.spec.parameters]
    words = []
    for argument in arguments.values():
        for word in argument if isinstance(argument, list) else [argument]:
            array, offset = word if isinstance(word, emulator.Inside) else (word, 0)
            words.append(array.ctypes.data + offset if isinstance(array, np.ndarray) else array)
    emulator.run(replace(launch, grid=(blocks, 1, 1)), words)


def packed_inputs():
    return cases.to_fused(SMALL.inputs("float16", seed=3), packed=True)


def compute_first_head():
    """Output and gradients of the first head of a packed call, and its gradient of value in the order of samples."""
    inputs = packed_inputs()
    problem = replace(emulator.prepare(inputs, False, None), M=HEADS)
    by_head = (1, 4, 4, 4)  # N, Q, M, D
    value, packed, grad_output = (
        with_heads(array) for array in (inputs.value, inputs.locations, inputs.grad_output.reshape(by_head))
    )
    logits_at = 2 * problem.K * packed.itemsize
    metadata = [np.array([[2, 3]], np.int64), np.array([0], np.int64)]
    samples = {"metadata": metadata, "locations": packed, "weights": emulator.Inside(packed, logits_at)}
    samples |= {"references": inputs.references, "lengths": 0}
    sizes = dict(zip(("S", "Q", "image_stride", "head_stride", "heads"), plan.size_words(problem), strict=True))

    output = with_heads(np.zeros(by_head, np.float16))
    launch = plan.forward(problem, 16, H100)
    run_first_head(launch, launch.grid[0], {"value": value} | samples | {"output": output} | sizes)

    totals = with_heads(np.zeros(inputs.value.shape, np.float32))
    grads = with_heads(np.zeros_like(inputs.locations))
    launch = plan.backward(problem, 16, H100, ALL)
    arguments = {"value": value} | samples | {"grad_output": grad_output, "grad_value": totals}
    arguments |= {"grad_locations": grads, "grad_weights": emulator.Inside(grads, logits_at), "grad_references": 0}
    run_first_head(launch, launch.grid[0], arguments | sizes)

    in_order = with_heads(np.zeros_like(inputs.value))
    summed = plan_backward.summation(replace(problem, deterministic=True), 16, H100)
    starts = np.zeros((summed.runs, 2 * summed.buckets + 2), np.uint16)
    table = np.zeros(TABLE_BYTES, np.uint8)
    contributions = np.zeros((summed.runs, summed.capacity, 4), np.float32)
    assert not summed.queued
    slab = {"first_head": 0, "heads": HEADS, "first_pixel": 0, "buckets": summed.buckets}
    arguments = {"locations": samples.pop("locations"), "metadata": samples.pop("metadata")} | samples
    arguments |= {"segment_starts": starts, "contributions": contributions, "table": table, "queue": 0, "queued": 0}
    arguments |= {"contributions_per_bucket": summed.contributions_per_bucket, "S": problem.S, "Q": problem.Q}
    arguments |= slab | {"pixels": summed.pixels}
    run_first_head(summed.sort, summed.runs, arguments)
    arguments = {"grad_output": grad_output, "contributions": contributions, "segment_starts": starts}
    arguments |= {"grad_value": in_order, "table": table, "S": problem.S, "Q": problem.Q, "runs": summed.runs}
    arguments |= {"capacity": summed.capacity} | slab
    arguments |= {"queue": 0, "chunk_sums": 0, "chunk_size": summed.chunk_size}
    run_first_head(summed.reduce, -(-summed.buckets // summed.reduce.spec.block.warps), arguments)
    return [array[:, :, 0].copy() for array in (output, totals, grads, in_order)]


def test_first_of_very_many_heads():
    """In a process of its own, which an index that wraps around ends."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        output, grad_value, grads, in_order = pool.submit(compute_first_head).result()
    want_output, want_grads = cases.expected_fused(packed_inputs())
    assert_close(output, want_output.reshape(1, 4, 4, 4)[:, :, 0], "float16")
    for got, want in ((grad_value, want_grads[0]), (grads, want_grads[1]), (in_order, want_grads[0])):
        assert_close(got, want[:, :, 0], "float16")


@pytest.mark.parametrize(("value_dtype", "D"), [("float32", 256), ("float16", 512)])
def test_channels_beyond_a_stride_of_31_bits(value_dtype, D):
    """One pixel, and samples outside of it: the address of a neighbour is computed, and nothing is read there."""
    inputs = Case("wide", levels=((1, 1),), N=1, M=1, D=D, P=1, queries=2).inputs(value_dtype, "float32", seed=4)
    inputs.locations[...] = 9
    problem = replace(emulator.prepare(inputs, False, None), value_strides=ValueStrides(0, 2**31 - 8, D))
    launch = plan.backward(problem, 16, H100, Wanted(False, True, True))
    assert launch.spec.pixel_stride + launch.spec.channels.channel_tile >= 2**31
    grads = np.ones_like(inputs.locations), np.ones_like(inputs.weights)
    arguments = {"value": inputs.value, "metadata": [np.array([[1, 1]], np.int64), np.array([0], np.int64)]}
    arguments |= {"locations": inputs.locations, "weights": inputs.weights, "references": None, "lengths": None}
    arguments |= {"grad_output": inputs.grad_output, "grad_value": None}
    arguments |= {"grad_locations": grads[0], "grad_weights": grads[1], "grad_references": None}
    sizes = zip(("S", "Q", "image_stride", "head_stride", "heads"), plan.size_words(problem), strict=True)
    emulator.launch(launch, arguments | dict(sizes), sanitize=True)
    assert not any(grad.any() for grad in grads)


@pytest.mark.parametrize("variant", [{"padding_mode": "border"}, {"interpolation": "nearest"}], ids=str)
def test_clamped_coordinate_is_inside_a_level_whose_last_pixel_is_no_float(variant):
    W = 2**24 + 4
    assert np.float32(W - 1) == W
    inputs = Case("wide", levels=((1, W),), N=1, M=1, D=1, P=1, queries=1).inputs(seed=5)
    inputs.value[...] = 1
    inputs.locations[...] = 2
    output = emulator.forward(inputs, variant=variant, sanitize=True)
    np.testing.assert_array_equal(output[..., 0], inputs.weights.reshape(1, 1))
