"""Drawn calls agree on every path: the array functions, eager, registered and decomposed; a share of tests/fuzz.

The seeds of today are new every day. `python -m tests.fuzz --seed N --cases 1 --shrink` repeats one and makes it small.
"""

import datetime

import pytest

from tests.fuzz.__main__ import CPU_PATHS
from tests.fuzz.draw import draw
from tests.fuzz.record import check

FIXED, CHUNK = 200, 25
TODAY = int(datetime.date.today().strftime("%y%m%d")) * 10_000


def failures_of(seeds):
    """The failures of these seeds, as text with the command that repeats the first one."""
    found = [f"seed {seed}: {failure}" for seed in seeds for failure in check(draw(seed), CPU_PATHS)[1]]
    if found:
        seed = found[0].split(":")[0].removeprefix("seed ")
        found.insert(0, f"python -m tests.fuzz --seed {seed} --cases 1 --shrink")
    return "\n".join(found)


@pytest.mark.parametrize("chunk", range(FIXED // CHUNK))
def test_every_path_agrees(chunk):
    assert not failures_of(range(CHUNK * chunk, CHUNK * (chunk + 1)))


@pytest.mark.parametrize("chunk", range(4))
def test_every_path_agrees_on_calls_of_today(chunk):
    assert not failures_of(range(TODAY + CHUNK * chunk, TODAY + CHUNK * (chunk + 1)))
