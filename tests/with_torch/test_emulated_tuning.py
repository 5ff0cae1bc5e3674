"""Measured choices in calls of torch, on an emulated GPU: launch plans take them, and deterministic calls keep bits."""

import pytest

import cupy_msda
from cupy_msda.cuda import tuned, tuning
from cupy_msda.cuda.tuned import Choices, Entry
from tests.helpers import emulated_torch, emulator
from tests.helpers.emulated_calls import PLAIN
from tests.helpers.emulated_torch import deterministic_algorithms
from tests.helpers.emulated_torch_calls import Checked, Tensors, bits

pytestmark = pytest.mark.skipif(emulator.COMPILER is None, reason="needs g++")
torch_gpu = pytest.fixture(emulated_torch.fixture)


def groups_of(torch_gpu):
    """The lane groups of the last forward."""
    return [launch.spec.lane_groups for launch in torch_gpu.gpu.launches if launch.spec.kernel == "forward"][-1]


def choose(monkeypatch, problem, **axes):
    entry = Entry(tuned.subject_of("forward", problem), tuned.measured_of(problem), axes, 2.0, 1.0)
    monkeypatch.setattr(tuning, "_choices", {0: Choices([entry])})
    tuning.forget_launches()


def recorded_forward(calls):
    with cupy_msda.record() as found:
        calls.check()
    return found[0].problem


def test_launch_plans_are_made_anew_with_what_was_found(torch_gpu, monkeypatch):
    calls = Checked(torch_gpu, PLAIN)
    problem, before = recorded_forward(calls), groups_of(torch_gpu)
    choose(monkeypatch, problem, lanes_per_query=1)
    for _ in range(3):
        calls.check()
        assert groups_of(torch_gpu) < before


@pytest.mark.parametrize("deterministic", [None, True])
def test_a_deterministic_forward_keeps_its_bits(torch_gpu, monkeypatch, deterministic):
    """Of one launch plan, while torch's switch changes."""
    calls = Checked(torch_gpu, PLAIN)
    problem = recorded_forward(calls)
    before = groups_of(torch_gpu)
    tensors = Tensors(torch_gpu, calls.inputs(0))
    want = bits(tensors.forward())
    choose(monkeypatch, problem, lanes_per_query=1)
    for switch in (False, True, False, True, True):
        with deterministic_algorithms(switch):
            output = tensors.forward(deterministic=deterministic)
        if switch or deterministic:
            assert groups_of(torch_gpu) == before
            assert bits(output) == want
        else:
            assert groups_of(torch_gpu) < before
