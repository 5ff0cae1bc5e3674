"""Randomly drawn problems agree with the float64 reference: sizes, dtypes and variants together, plain and fused."""

import random

import pytest

from tests.helpers.cases import DTYPE_PAIRS, Case
from tests.helpers.checks import check_fused, check_operator

VARIANTS = (
    {},
    {"padding_mode": "border"},
    {"align_corners": True},
    {"padding_mode": "border", "align_corners": True},
    {"interpolation": "nearest"},
)


def drawn(seed):
    """A case, a pair of dtypes and the generator for further choices."""
    draw = random.Random(seed)
    levels = tuple((draw.randint(1, 9), draw.randint(1, 9)) for _ in range(draw.randint(1, 4)))
    variant = dict(draw.choice(VARIANTS))
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
def test_plain_call_agrees_with_the_reference(main_backend, seed):
    case, pair, _ = drawn(seed)
    check_operator(main_backend, case.inputs(*pair, seed=seed), *pair, **case.variant)


@pytest.mark.parametrize("seed", range(100, 140))
def test_fused_call_agrees_with_the_reference(main_backend, seed):
    case, pair, draw = drawn(seed)
    form = {"coordinates": draw.choice((2, 4)), "levels": draw.choice((None, 1)), "packed": draw.random() < 0.5}
    check_fused(main_backend, case, pair, seed, reference_dtype=draw.choice(pair), **form)
