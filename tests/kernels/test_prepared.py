"""Launches are prepared once per problem, alignment and wanted gradients, and remembered."""

from types import SimpleNamespace

import pytest

from cupy_msda.call import ALL
from cupy_msda.cuda import gpu, run, session
from tests.helpers import random_problems


@pytest.fixture
def prepared(monkeypatch):
    """The launches that are prepared, by stubs."""
    launches = []

    def prepare(launch, device, stream):
        launches.append(launch)
        return SimpleNamespace(taking=lambda *names: launch, run=launch, spec=launch.spec)

    monkeypatch.setattr(run, "_prepared", {})
    monkeypatch.setattr(run, "_prepare", prepare)
    monkeypatch.setattr(gpu, "of_device", lambda device: gpu.H100)
    return launches


@pytest.fixture
def problem():
    return next(a.problem for a in random_problems.draw(50) if not a.problem.fused and not a.problem.deterministic)


def test_an_alignment_beyond_16_bytes_prepares_nothing_new(prepared, problem):
    first = run.prepare_forward(problem, 16, 0)
    assert all(run.prepare_forward(problem, alignment, 0) is first for alignment in (32, 512, 4096, 2**20))
    assert len(prepared) == 1
    assert run.prepare_forward(problem, 4, 0) is not first


def test_gradients_that_are_wanted_are_prepared_apart(prepared, problem, monkeypatch):
    monkeypatch.setattr(run, "PreparedBackward", lambda *arguments: object())
    first = run.prepare_backward(problem, 16, 0, ALL)
    assert run.prepare_backward(problem, 4096, 0, ALL) is first
    assert run.prepare_backward(problem, 16, 0, ALL._replace(value=False)) is not first


@pytest.mark.parametrize(
    ("addresses", "alignment"), [((4096, 512), 16), ((4096, 24), 8), ((2, 16), 2), ((0, 4096), 16), ((7, 16), 1)]
)
def test_the_alignment_of_addresses_is_a_power_of_two_up_to_16(addresses, alignment):
    assert session.alignment_of(*addresses) == alignment


def test_problems_that_never_repeat_do_not_fill_the_memory(prepared, problem, monkeypatch):
    monkeypatch.setattr(run, "_MOST_PREPARED", 2)
    for alignment in (2, 4, 8, 16):
        run.prepare_forward(problem, alignment, 0)
    assert len(run._prepared) <= 2
