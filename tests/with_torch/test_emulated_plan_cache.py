"""Launch plans of one layout never serve another: calls that differ in one thing, each as without a plan.

Launches compute nothing here. What is compared is every word that the driver gets.
"""

import pytest
import torch

from cupy_msda.cuda import run
from cupy_msda.torch import fast_path
from tests.helpers import emulated_torch
from tests.helpers.drawn_layouts import OTHERS, Call, Layout, pairs

FORMS = ("plain", "fused", "packed")


@pytest.fixture
def torch_gpu(monkeypatch):
    return emulated_torch.install(monkeypatch, run=lambda planned, words: None)


def forget():
    fast_path.plans.clear()
    run._prepared.clear()
    for form in fast_path.recent:
        fast_path.recent[form] = ()


def without_plans(torch_gpu, layout):
    """The outcome of a first call that leaves no plan."""
    forget()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fast_path, "_repeatable", lambda call: False)
        return Call(torch_gpu, layout).outcome()


@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize("form", FORMS)
def test_calls_that_differ_in_one_thing(torch_gpu, form, name):
    torch.manual_seed(0)
    known = {}
    for pair in pairs(form, name):
        want = [known.get(repr(layout)) or without_plans(torch_gpu, layout) for layout in pair]
        known |= dict(zip(map(repr, pair), want, strict=True))  # by what is printed: True == 1
        assert isinstance(want[0][0], dict), want[0]
        forget()
        for number in (0, 1) * 3:
            assert Call(torch_gpu, pair[number]).outcome() == want[number], pair


def test_the_calls_that_are_compared_leave_plans(torch_gpu):
    for _ in range(3):
        for form in FORMS:
            Call(torch_gpu, Layout(form)).outcome()
    assert len(fast_path.plans) == len(FORMS)
    assert all(fast_path.recent.values())
