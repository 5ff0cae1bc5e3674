"""Problems that nobody thought of, drawn by seed: sizes, dtypes and forms together, plain and with a front end."""

import random

import pytest

from tests.contract import test_fused, test_operator
from tests.helpers.cases import DTYPE_PAIRS, Case

FORMS = (
    {},
    {"padding_mode": "border"},
    {"align_corners": True},
    {"padding_mode": "border", "align_corners": True},
    {"interpolation": "nearest"},
)


def drawn(seed):
    """A case and a pair of dtypes."""
    draw = random.Random(seed)
    levels = tuple((draw.randint(1, 9), draw.randint(1, 9)) for _ in range(draw.randint(1, 4)))
    variant = dict(draw.choice(FORMS))
    if draw.random() < 0.4:
        variant["num_points"] = tuple(draw.randint(1, 5) for _ in levels)
    case = Case(
        f"seed{seed}",
        levels=levels,
        N=draw.randint(1, 3),
        M=draw.randint(1, 3),
        D=draw.choice((1, 2, 3, 4, 5, 8, 12, 16, 32, 33, 40, 96)),
        P=draw.randint(1, 6),
        queries=draw.choice((None, 1, 2, 3, 17, 40)),
        variant=variant,
    )
    return case, draw.choice(DTYPE_PAIRS), draw


@pytest.mark.parametrize("seed", range(40))
def test_plain(main_backend, seed):
    case, pair, _ = drawn(seed)
    test_operator.check(main_backend, case.inputs(*pair, seed=seed), *pair, **case.variant)


@pytest.mark.parametrize("seed", range(100, 140))
def test_with_a_front_end(main_backend, seed):
    case, pair, draw = drawn(seed)
    form = {"coordinates": draw.choice((2, 4)), "levels": draw.choice((None, 1)), "packed": draw.random() < 0.5}
    test_fused.check(main_backend, case, pair, seed, reference_dtype=draw.choice(pair), **form)
