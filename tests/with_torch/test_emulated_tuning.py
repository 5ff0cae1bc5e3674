"""Measured choices in calls of torch, on an emulated GPU: launch plans take them, and deterministic calls keep bits."""

import pytest

import cupy_msda
from cupy_msda.cuda.tuning import loaded, tuned
from cupy_msda.cuda.tuning.tuned import Choices, Entry
from tests.helpers import emulated_torch, emulator
from tests.helpers.cases import Case
from tests.helpers.emulated_torch import deterministic_algorithms
from tests.helpers.emulated_torch_calls import Checked, Tensors, bits

pytestmark = pytest.mark.skipif(emulator.COMPILER is None, reason="needs g++")
# So many samples that lane groups share them.
SHARED = Case("shared", M=3, P=4)
torch_gpu = pytest.fixture(emulated_torch.fixture)


def groups_of(torch_gpu):
    """The lane groups of the last forward."""
    return [launch.spec.lane_groups for launch in torch_gpu.gpu.launches if launch.spec.kernel == "forward"][-1]


def choose(monkeypatch, problem, **axes):
    entry = Entry(tuned.subject_of("forward", problem), tuned.measured_of(problem), axes, 2.0, 1.0)
    monkeypatch.setattr(loaded, "_choices", {0: Choices([entry])})
    loaded.forget_launches()


def recorded_forward(calls):
    with cupy_msda.record() as found:
        calls.check()
    return found[0].problem


def test_launch_plans_are_made_anew_with_what_was_found(torch_gpu, monkeypatch):
    calls = Checked(torch_gpu, SHARED)
    problem, before = recorded_forward(calls), groups_of(torch_gpu)
    choose(monkeypatch, problem, lanes_per_query=1)
    for _ in range(3):
        calls.check()
        assert groups_of(torch_gpu) < before


@pytest.mark.parametrize("deterministic", [None, True])
def test_a_deterministic_forward_keeps_its_bits(torch_gpu, monkeypatch, deterministic):
    """Of one launch plan, while torch's switch changes."""
    calls = Checked(torch_gpu, SHARED)
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
