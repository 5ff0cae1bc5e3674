"""Calls of torch on an emulated GPU: the general path first, launch plans from then on, each held to the reference."""

import itertools
import threading

import numpy as np
import pytest
import torch

from cupy_msda import validate
from cupy_msda.call import Wanted
from cupy_msda.cuda import sorted_heuristics
from cupy_msda.torch import fast_path
from tests.helpers import emulated_torch, emulator
from tests.helpers.cases import PARTIAL_GRADIENTS, Case, gradient_names
from tests.helpers.emulated_calls import DENSE, FUSED, HALF, PACKED_BOXES, PLAIN
from tests.helpers.emulated_torch import deterministic_algorithms
from tests.helpers.emulated_torch_calls import (
    NOTHING,
    Checked,
    Tensors,
    assert_results,
    bits,
    reference,
    unaligned,
    with_strides,
)

pytestmark = pytest.mark.skipif(emulator.COMPILER is None, reason="needs g++")
torch_gpu = pytest.fixture(emulated_torch.fixture)

FORMS = [None, FUSED, PACKED_BOXES]
# The first call of a layout leaves its plan, the second one takes it from the plan cache, the third is a recent one.
REPEATED = range(3)


def kernels_of(torch_gpu):
    return [launch.spec.kernel for launch in torch_gpu.gpu.launches]


@pytest.mark.parametrize("device", [0, 1])
@pytest.mark.parametrize("form", FORMS, ids=str)
def test_repeated_calls_of_each_form(torch_gpu, form, device):
    calls = Checked(torch_gpu, PLAIN, form=form)
    for _ in REPEATED:
        calls.check(device=device)
    assert len(fast_path.plans) == 1
    assert {launch.device for launch in torch_gpu.gpu.launches} == {device}


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_launches_are_on_the_current_stream_of_torch(torch_gpu, form):
    """Which may change between calls of one layout, before and after there is a plan."""
    calls, streams = Checked(torch_gpu, PLAIN, form=form), torch_gpu.gpu.streams
    for use_second in (False, True, False, True, True):
        streams.use(use_second)
        torch_gpu.gpu.launches.clear()
        calls.check()
        assert streams.current(0) in {launch.stream for launch in torch_gpu.gpu.launches}
    streams.use(False)


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_a_recent_call_is_not_validated(torch_gpu, monkeypatch, form):
    calls = Checked(torch_gpu, PLAIN, form=form)
    for _ in REPEATED:
        calls.check()
    monkeypatch.setattr(validate, "read", None)
    monkeypatch.setattr(fast_path, "layout_key", None)
    calls.check()


def test_the_frozen_inputs_change_between_calls_of_one_layout(torch_gpu):
    calls = Checked(torch_gpu, PLAIN)
    subsets = [*PARTIAL_GRADIENTS, NOTHING, Wanted()]
    for wanted in (*subsets, *reversed(subsets), *subsets):
        calls.check(wanted)
        last = torch_gpu.gpu.launches[-1].spec
        computed = tuple(last.gradients.axes().values()) if any(wanted) else last.kernel
        assert computed == (wanted if any(wanted) else "forward")


@pytest.mark.parametrize("wanted", [*PARTIAL_GRADIENTS, Wanted()], ids=gradient_names)
def test_a_gradient_that_is_wanted_after_calls_without_any(torch_gpu, wanted):
    calls = Checked(torch_gpu, PLAIN)
    for asked in (NOTHING, NOTHING, NOTHING, wanted, wanted, NOTHING, wanted):
        calls.check(asked)


@pytest.mark.parametrize("form", [FUSED, PACKED_BOXES], ids=str)
def test_the_frozen_inputs_of_a_fused_call_change(torch_gpu, form):
    calls = Checked(torch_gpu, PLAIN, form=form)
    only_value, only_references = Wanted(True, False, False), Wanted(False, False, False, True)
    all_but_value = Wanted(False, True, True, True)
    for wanted in (only_value, only_references, all_but_value, NOTHING) * 3:
        calls.check(wanted)


def test_a_call_without_gradients_of_tensors_that_require_some(torch_gpu):
    calls = Checked(torch_gpu, PLAIN)
    for _ in REPEATED:
        inputs = calls.inputs()
        with torch.no_grad():
            output = Tensors(torch_gpu, inputs).forward()
        assert not output.requires_grad
        assert_results((output, {}), calls.reference(inputs), inputs)
        calls.check()


def test_deterministic_changes_between_calls_of_one_layout(torch_gpu):
    calls = Checked(torch_gpu, PLAIN)
    for deterministic, switch in (*itertools.product((None, False, True), (False, True)),) * 2:
        del torch_gpu.gpu.launches[:]
        with deterministic_algorithms(switch):
            calls.check(deterministic=deterministic)
        is_sorted = "bucket_sort" in kernels_of(torch_gpu)
        assert is_sorted == (switch if deterministic is None else deterministic)


@pytest.mark.parametrize("form", FORMS[:2], ids=str)
def test_the_switch_counts_when_the_backward_runs(torch_gpu, form):
    calls = Checked(torch_gpu, PLAIN, form=form)
    calls.check()
    for switch in (True, False, True):
        inputs = calls.inputs()
        tensors = Tensors(torch_gpu, inputs)
        with deterministic_algorithms(not switch):
            output = tensors.forward()
        del torch_gpu.gpu.launches[:]
        with deterministic_algorithms(switch):
            results = output, tensors.backward(output)
        assert ("bucket_sort" in kernels_of(torch_gpu)) == switch
        assert_results(results, calls.reference(inputs), inputs)


def test_the_switch_counts_in_calls_that_leave_no_plan(torch_gpu):
    calls = Checked(torch_gpu, PLAIN)
    for switch in (True, False, True):
        del torch_gpu.gpu.launches[:]
        with deterministic_algorithms(switch):
            calls.check(change=lambda tensors: setattr(tensors, "metadata", tensors.metadata_on_device(torch.int32)))
        assert ("bucket_sort" in kernels_of(torch_gpu)) == switch
    assert not fast_path.plans


@pytest.mark.parametrize("pair", [("float32", "float32"), HALF], ids="-".join)
def test_deterministic_gradients_have_the_same_bits(torch_gpu, pair):
    inputs = DENSE.inputs(*pair)
    found = {bits(Tensors(torch_gpu, inputs).results(deterministic=True)[1]["value"]) for _ in REPEATED}
    assert len(found) == 1


def test_deterministic_gradients_by_chunks_of_buckets(torch_gpu, monkeypatch):
    monkeypatch.setattr(sorted_heuristics, "SMALLEST_CHUNK", 64)
    calls = Checked(torch_gpu, DENSE)
    for _ in REPEATED:
        calls.check(deterministic=True)
    assert kernels_of(torch_gpu).count("reduce_buckets") == 3


def test_deterministic_gradients_of_samples_that_are_materialised(torch_gpu):
    calls = Checked(torch_gpu, Case("three", M=3, P=3), form=FUSED)
    for _ in REPEATED:
        calls.check(deterministic=True)
    assert kernels_of(torch_gpu).count("materialise") == 3


@pytest.mark.parametrize("form", [None, PACKED_BOXES], ids=str)
def test_sixteen_bits(torch_gpu, form):
    calls = Checked(torch_gpu, PLAIN, HALF, form)
    for _ in REPEATED:
        calls.check()
    assert kernels_of(torch_gpu).count("cast") == 3


def change_value(function):
    def change(tensors):
        tensors.value = function(tensors.value).requires_grad_()

    return change


def test_strides_of_value_change_between_calls(torch_gpu):
    calls = Checked(torch_gpu, PLAIN)
    channels_last = change_value(lambda value: value.detach().transpose(2, 3).contiguous().transpose(2, 3))
    for change in (None, change_value(with_strides), channels_last) * 3:
        calls.check(change=change)


@pytest.mark.parametrize("name", ["locations", "weights"])
def test_samples_with_strides(torch_gpu, name):
    def change(tensors):
        setattr(tensors, name, with_strides(getattr(tensors, name)).requires_grad_())

    calls = Checked(torch_gpu, PLAIN)
    for one in (None, change) * 3:
        calls.check(change=one)


def test_a_gradient_of_the_output_with_strides(torch_gpu):
    calls = Checked(torch_gpu, PLAIN)
    for _ in REPEATED:
        calls.check(change=lambda tensors: setattr(tensors, "grad_output", with_strides(tensors.grad_output)))


@pytest.mark.parametrize("elements", [1, 2])
@pytest.mark.parametrize("name", ["value", "locations", "weights", "grad_output"])
def test_an_address_without_alignment_between_others(torch_gpu, name, elements):
    def change(tensors):
        setattr(tensors, name, unaligned(torch_gpu, getattr(tensors, name), elements))

    calls = Checked(torch_gpu, PLAIN)
    for one in (None, change) * 3:
        calls.check(change=one)


@pytest.mark.parametrize("name", ["references", "locations"])
def test_an_address_without_alignment_of_a_fused_call(torch_gpu, name):
    def change(tensors):
        setattr(tensors, name, unaligned(torch_gpu, getattr(tensors, name), 2))

    calls = Checked(torch_gpu, PLAIN, form=PACKED_BOXES)
    for one in (None, change) * 3:
        calls.check(change=one)


@pytest.mark.parametrize("place", ["list", "int32 on the device", "int64 on the device"])
def test_query_lengths_go_to_the_registered_operator(torch_gpu, place):
    lengths = [3, 0]
    for _ in REPEATED:
        inputs = PLAIN.inputs()
        given = lengths if place == "list" else torch_gpu.put(torch.tensor(lengths, dtype=getattr(torch, place[:5])))
        results = Tensors(torch_gpu, inputs).results(query_lengths=given)
        assert_results(results, reference(inputs, lengths), inputs)


@pytest.mark.parametrize("case", [Case("N", N=0), Case("Q", queries=0), Case("D", D=0), Case("P", P=0)], ids=str)
def test_an_empty_problem_gives_zeros_without_a_launch(torch_gpu, case):
    for _ in REPEATED:
        output, grads = Tensors(torch_gpu, case.inputs()).results()
        assert not output.detach().cpu().any()
        assert not any(grad.cpu().any() for grad in grads.values())
    assert not torch_gpu.gpu.launches


@pytest.mark.parametrize("form", [None, PACKED_BOXES], ids=str)
def test_naive_kernels_leave_no_plan(torch_gpu, monkeypatch, form):
    monkeypatch.setenv("CUPY_MSDA_KERNELS", "naive")
    calls = Checked(torch_gpu, PLAIN, HALF, form)
    for wanted in (Wanted(references=True), Wanted(False, False, True), Wanted(True, False, False)):
        calls.check(wanted)
    assert not fast_path.plans


def test_validate_reads_arrays_of_the_device(torch_gpu):
    calls = Checked(torch_gpu, PLAIN)
    for device in (0, 1):
        calls.check(device=device, validate=True)


def test_two_devices_with_the_same_layout(torch_gpu):
    calls = Checked(torch_gpu, PLAIN)
    for device in (0, 1) * 3:
        del torch_gpu.gpu.launches[:]
        calls.check(device=device)
        assert {launch.device for launch in torch_gpu.gpu.launches} == {device}


def test_another_device_is_current(torch_gpu):
    torch_gpu.gpu.home = torch_gpu.gpu.device = 1
    calls = Checked(torch_gpu, PLAIN)
    for _ in REPEATED:
        calls.check(deterministic=True)
        assert torch_gpu.gpu.device == 1


def test_the_backward_in_a_thread_that_has_never_used_cuda(torch_gpu):
    calls, found = Checked(torch_gpu, PLAIN), []
    for deterministic in (False, True) * 3:
        inputs = calls.inputs()
        tensors = Tensors(torch_gpu, inputs, device=1)
        output = tensors.forward(deterministic=deterministic)
        thread = threading.Thread(target=lambda t=tensors, o=output: found.append((o, t.backward(o))))
        thread.start()
        thread.join()
        assert_results(found.pop(), calls.reference(inputs), inputs)


def test_threads_with_the_same_layout(torch_gpu):
    inputs = [PLAIN.inputs(seed=seed) for seed in range(3)]
    results = {}

    def work(seed):
        torch_gpu.gpu.streams.use(second=True)
        tensors = [Tensors(torch_gpu, inputs[seed]) for _ in range(4)]
        results[seed] = [one.results(deterministic=bool(seed % 2)) for one in tensors]

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 3
    for seed, found in results.items():
        want = reference(inputs[seed])
        for result in found:
            assert_results(result, want, inputs[seed])


@pytest.mark.parametrize("deterministic", [False, True])
def test_a_repeated_step_can_be_captured(torch_gpu, deterministic):
    calls, streams = Checked(torch_gpu, PLAIN), torch_gpu.gpu.streams
    for _ in REPEATED:
        calls.check(deterministic=deterministic)
    streams.capturing.add(streams.current(0))
    calls.check(deterministic=deterministic)
    streams.capturing.clear()


def test_a_first_backward_in_a_capture_is_refused(torch_gpu):
    streams = torch_gpu.gpu.streams
    tensors = Tensors(torch_gpu, PLAIN.inputs())
    for _ in REPEATED:
        output = tensors.forward()
    streams.capturing.add(streams.current(0))
    with pytest.raises(RuntimeError, match="compile and load a CUDA kernel"):
        tensors.backward(output)
    streams.capturing.clear()
    assert np.isfinite(tensors.backward(output)["value"].cpu().numpy()).all()


def test_a_result_outlives_its_plan_and_its_inputs(torch_gpu):
    calls = Checked(torch_gpu, PLAIN)
    for _ in REPEATED:
        inputs = calls.inputs()
        results = Tensors(torch_gpu, inputs).results()
        fast_path.plans.clear()
        assert_results(results, calls.reference(inputs), inputs)
