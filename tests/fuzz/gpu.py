"""Drawn specialisations of the CUDA kernels, with many drawn calls each: hostile numbers, layouts and metadata.

A specialisation is what kernels are compiled for: a Form, few or many samples, where the metadata is, and which
gradients are wanted, in which order of sums. Each call goes one way to the kernels and is held against the float64
reference; calls that fill the GPU are compared now and then.
"""

from __future__ import annotations

import hashlib
import random
import time
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from tests.helpers.cases import DTYPE_PAIRS

from .compare import Failure, Outcome, compare
from .draw import VARIANTS, Case, Form, draw
from .expected import expected
from .hostile import fitting_levels, with_hostile_metadata
from .paths import run_paths
from .record import Count
from .result import Expected

CHANNELS = (1, 2, 3, 4, 8, 16, 24, 30, 32, 32, 33, 36, 48, 64, 71, 80, 96, 128, 256)
# Layouts of a specialisation: its calls come back to them, as those of the layers of a model do.
LAYOUTS_PER_FORM = 3
# Calls that fill the GPU take a tenth of a second to compare.
COMPARED_LARGE = 10
CALLS_APART = 100_000
WAYS = ("eager", "eager", "array", "registered")
_dead: list[str] = []


@dataclass(frozen=True)
class Specialisation:
    """What the kernels of some calls are compiled for."""

    number: int
    form: Form
    large: bool
    on_device: bool
    deterministic: bool | None
    wanted: tuple[str, ...]


def draw_specialisation(number: int, seed: int) -> Specialisation:
    """The specialisation of this number; two of one seed hardly ever agree."""
    pick = random.Random(f"specialisation {seed} {number}")
    choice, chance = pick.choice, pick.random
    large = chance() < 0.2
    pair, L = choice(DTYPE_PAIRS), choice((1, 1, 2, 3, 4, 4, 5, 9 if not large else 2))
    per_level = chance() < 0.25
    most = max(1, min(8, 32 // L))
    points = tuple(pick.randint(1, most) for _ in range(L)) if per_level else (pick.randint(1, most),) * L
    interpolation, padding_mode, align_corners = choice(VARIANTS)
    fused = chance() < 0.4
    references = choice((pair[0], "float32")) if pair[0] in ("float16", "bfloat16") else pair[0]
    D = choice(CHANNELS)
    form = Form(
        M=choice((1, 2, 3, 4, 8) if D <= 64 else (1, 2)),
        D=D,
        points=points,
        per_level=per_level,
        dtypes=(*pair, references),
        interpolation=interpolation,
        padding_mode=padding_mode,
        align_corners=align_corners,
        coordinates=choice((2, 2, 4)) if fused else 0,
        reference_levels=choice((1, L)) if fused else 0,
        packed=fused and chance() < 0.4,
        ragged=chance() < 0.2,
    )
    names = ("value", "locations" if form.packed else "weights") if form.interpolation == "nearest" else form.names
    names = tuple(name for name in names if not (form.packed and name == "weights"))
    if chance() < 0.3:
        names = tuple(name for name in names if chance() < 0.6)
    return Specialisation(number, form, large, chance() < 0.5, choice((None, False, True)), names)


def draw_call(one: Specialisation, seed: int) -> Case:
    """A call of a specialisation: drawn numbers in one of its layouts."""
    layout = random.Random(seed).randrange(LAYOUTS_PER_FORM)
    at = 1_000 * one.number + layout
    case = draw(seed, one.form, layout_seed=at, large=one.large)
    while case.invalid or 0 in case.sizes.values() or case.sizes["S"] > 50_000:
        at += 1_000_003
        case = draw(seed, one.form, layout_seed=at, large=one.large)
    framework = "cupy" if one.form.dtypes[0] != "bfloat16" and seed % 3 == 0 else "torch"
    layouts = {name: layout for name, layout in case.layouts.items() if layout != "reversed"}
    if framework == "cupy":
        layouts = {name: layout for name, layout in layouts.items() if layout != "negated"}
    case = replace(
        case, framework=framework, deterministic=one.deterministic, wanted=one.wanted, changes=None, layouts=layouts,
        small_blocks=False,
    )  # fmt: skip
    if not one.on_device:
        return case
    pick = random.Random(f"metadata {seed}")
    if pick.random() < 0.5:
        return with_hostile_metadata(case, pick)
    good = {name: form if form == "tensor:int32" else "tensor" for name, form in case.forms.items()}
    return replace(case, forms=good | {"num_points": "tuple"}, on_device=True)


def check_call(one: Specialisation, seed: int) -> tuple[Case, dict[str, Outcome], list[Failure]]:
    """A call by one way, and how it breaks the contract. A large one is compared with the reference now and then."""
    import torch

    case = draw_call(one, seed)
    way = random.Random(f"way {seed}").choice(WAYS)
    outcomes = run_paths(case, [way], "cuda")
    torch.cuda.synchronize()
    if one.deterministic and seed % 5 == 0:
        outcomes[way].wrong += _other_bits(outcomes[way], run_paths(case, [way], "cuda")[way])
    if one.large and seed % COMPARED_LARGE:
        wrong = outcomes[way]
        failures = [Failure("error", way, "", str(wrong.error)[:200])] if wrong.error else []
        return case, outcomes, failures + _not_finite(case, outcomes[way])
    levels = fitting_levels(case) if case.on_device else None
    want = _expected_on_gpu(case, levels) if one.large else expected(case, levels)
    return case, outcomes, compare(case, outcomes, want)


def _other_bits(first: Outcome, second: Outcome) -> list[str]:
    """Results of a deterministic call that are not the same in a second run."""
    names = [name for name, result in first.results.items() if result.tobytes() != second.results[name].tobytes()]
    return [f"{name}: other bits in a second deterministic run" for name in names]


def _not_finite(case: Case, outcome: Outcome) -> list[Failure]:
    """What a call of finite numbers and good metadata has that is not finite."""
    if case.style not in ("finite", "kinks", "outside") or (case.on_device and None in fitting_levels(case)):
        return []
    names = [name for name, result in outcome.results.items() if not np.isfinite(result.astype(np.float64)).all()]
    return [Failure("contract", "large", name, "not finite") for name in names]


def _expected_on_gpu(case: Case, levels: Any) -> dict[str, Expected]:
    """The reference, computed by CuPy."""
    import cupy

    arrays = {name: cupy.asarray(array.astype(np.float64)) for name, array in case.arrays.items()}
    found = expected(replace(case, arrays=arrays), levels)
    cupy.get_default_memory_pool().free_all_blocks()
    return {name: Expected(*(part.get() for part in one)) for name, one in found.items()}


def run_specialisation(number: int, seed: int, calls: int, deadline: float) -> dict[str, Any] | None:
    """The counts of all calls of a specialisation; None after the deadline, and where an error took the context."""
    from cupy_msda.cuda import kernels

    if _dead or time.time() > deadline:
        return None
    one, found, slowest = draw_specialisation(number, seed), Count(), 0.0
    for at in range(first_seed(number, seed), first_seed(number, seed) + calls):
        begin = time.monotonic()
        try:
            found.add(*check_call(one, at))
        except Exception as error:  # what follows in this process would fail too
            _dead.append(str(error))
            case = draw_call(one, at)
            found.add(case, {}, [Failure("crash", "cuda", "", f"specialisation {number}: {error!r}"[:300])])
            break
        slowest = max(slowest, time.monotonic() - begin)
    names = {hashlib.sha256(repr(spec).encode()).hexdigest()[:12] for spec, _ in kernels._functions}
    return found.data | {"kernels": sorted(names), "slowest_call": round(slowest, 2)}


def first_seed(number: int, seed: int) -> int:
    """The seed of the first call of a specialisation."""
    return seed + number * CALLS_APART
