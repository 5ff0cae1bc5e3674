"""The small calls that compute-sanitizer runs reach every specialisation of the kernel budget."""

import pytest

from cupy_msda.cuda.gpu import H100
from tests.helpers import smallest_calls, specialisations


@pytest.fixture(scope="module")
def calls():
    """Specialisations and the small call that is to reach them."""
    return [(specs, smallest_calls.smallest(row, specs)) for row, specs in smallest_calls.specs_by_row()]


def test_every_budgeted_specialisation_is_asked_for_once(calls):
    asked = [spec for specs, _ in calls for spec in specs]
    assert len(asked) == len(set(asked))
    assert set(asked) == set(specialisations.budgeted(H100.architecture).values())


def test_the_planner_answers_each_with_its_specialisations(calls, monkeypatch):
    for specs, call in calls:
        assert call is not None, specs
        with monkeypatch.context() as forced:
            smallest_calls.force(forced, call.row, specs)
            assert specs <= {launch.spec for launch in call.launches()}


def test_calls_are_small(calls):
    assert all(call.samples <= smallest_calls.MAX_SAMPLES for _, call in calls)


def test_most_have_more_than_a_block_for_each_head(calls):
    """A block that is full, and one that is not: the others have too many samples in a block."""
    assert sum(smallest_calls.fills(call, call.launches()[0]) for _, call in calls) >= 0.95 * len(calls)
