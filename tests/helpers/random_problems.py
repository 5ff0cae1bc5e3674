"""Random problems for the tests of the planner: plain data, the same numbers on every run."""

import random
from dataclasses import replace
from typing import NamedTuple

from cupy_msda.call import FusedFrontEnd, Problem, ValueStrides, Variant, Wanted
from tests.helpers.cases import DTYPE_PAIRS

CHANNELS = (1, 2, 3, 4, 8, 16, 24, 30, 32, 33, 36, 40, 48, 64, 71, 80, 96, 128, 256, 300, 512, 1025)
VARIANTS = (("bilinear", "zeros", False), ("bilinear", "border", False), ("bilinear", "zeros", True),
            ("bilinear", "border", True), ("nearest", "zeros", False))  # fmt: skip
WANTED = (
    (True, True, True), (True, True, True), (True, False, False), (False, True, True), (False, True, False),
    (False, False, True), (True, True, False), (True, False, True),
)  # fmt: skip


class Asked(NamedTuple):
    """One question to the planner."""

    problem: Problem
    alignment: int
    wanted: Wanted


def draw(count: int, seed: int = 0) -> list[Asked]:
    """`count` problems that do not depend on the planner."""
    generator = random.Random(seed)
    return [_draw(generator) for _ in range(count)]


def draw_large(count: int, seed: int = 0) -> list[Asked]:
    """`count` problems with many samples per query, many levels and few channels: blocks with much shared memory."""
    generator = random.Random(seed)
    return [_draw_large(generator) for _ in range(count)]


def _draw_large(generator: random.Random) -> Asked:
    pick = generator.choice
    asked = _draw(generator)
    L = pick((1, 2, 4, 4, 5, 16, 20, 32, 33, 64, 120))
    points = tuple(generator.randint(1, 40) for _ in range(L)) if generator.random() < 0.2 else None
    S = int(2 ** generator.uniform(9, 18))
    dtypes = pick((("float32", "float32"), *DTYPE_PAIRS))
    fused = asked.problem.fused if generator.random() < 0.7 else None
    if fused:
        fused = fused._replace(levels=pick((1, L)), dtype=pick(("float32", dtypes[0])))
    problem = replace(
        asked.problem,
        N=pick((1, 4, 16, 64)),
        D=pick((4, 8, 16, 16, 32, *(D for D in CHANNELS if D <= 512))),
        L=L,
        P=0 if points else pick((1, 4, 8, 16, 25, 64, 100, 300, 1000, 3000)),
        S=S,
        Q=S if generator.random() < 0.8 else int(2 ** generator.uniform(0, 17)),
        levels=None,
        variant=asked.problem.variant._replace(num_points=points),
        value_strides=None,
        fused=fused,
        value_dtype=dtypes[0],
        location_dtype=dtypes[1],
    )
    wanted = asked.wanted._replace(references=asked.wanted.references and fused is not None)
    return Asked(problem, asked.alignment, wanted)


def _draw(generator: random.Random) -> Asked:
    pick = generator.choice
    pair, D, M = pick(DTYPE_PAIRS), pick(CHANNELS), pick((1, 2, 3, 4, 6, 7, 8, 8, 8, 16, 32))
    L = pick((1, 2, 3, 4, 4, 4, 5, 6, 8, 9, 33, 70))
    points = tuple(generator.randint(1, 8) for _ in range(L)) if generator.random() < 0.15 else None
    P = 0 if points else pick((1, 2, 3, 4, 4, 4, 5, 8, 9, 20, 100))
    N = pick((1, 1, 2, 4, 8, 100, 9000))
    S = int(2 ** generator.uniform(3, 18)) if generator.random() < 0.97 else 2 ** generator.randint(21, 28)
    Q = S if generator.random() < 0.4 else int(2 ** generator.uniform(0, 16))
    form = Variant(points, *pick(VARIANTS)) if generator.random() < 0.4 else Variant(points)
    strides = ValueStrides(*pick(((2 * S * M * D, 2 * M * D, 2 * D), (S * M * D, D, S * D), (0, M * D, D))))
    fused = None
    if generator.random() < 0.3:
        references = pick(("float32", pair[0]))
        fused = FusedFrontEnd(pick((2, 4)), pick((1, L)), references, generator.random() < 0.5)
    problem = Problem(
        N=N, S=S, M=M, D=D, L=L, P=P, Q=Q, value_dtype=pair[0], location_dtype=pair[1], device=("cuda", 0),
        levels=((1, 1, 0),) * L if generator.random() < 0.5 else None,
        deterministic=generator.random() < 0.3,
        variant=form,
        value_strides=strides if generator.random() < 0.15 else None,
        ragged=generator.random() < 0.15,
        fused=fused,
    )  # fmt: skip
    wanted = Wanted(*pick(WANTED), references=fused is not None and generator.random() < 0.5)
    return Asked(problem, pick((16, 16, 16, 8, 4, 2)), problem.computed(wanted))
