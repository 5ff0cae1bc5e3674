"""The CUDA kernels of a drawn call on the CPU: what the planner launches for the forward and for both backwards."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any
from unittest import mock

import numpy as np

from cupy_msda.call import Wanted
from tests.helpers import emulator
from tests.helpers.cases import FusedInputs, Inputs

from .compare import Failure, Outcome, compare
from .draw import Case, draw
from .expected import expected
from .hostile import fitting_levels, with_hostile_metadata
from .passing import Memory
from .paths import canonical, run_paths
from .record import Count

# Layouts of value that kernels read in place; the library copies all other inputs that are not contiguous.
IN_PLACE = ("interleaved",)


def draw_emulated(seed: int) -> Case:
    """The call of a seed, with the layouts that reach a kernel; one in three with hostile metadata on the device."""
    while True:
        case = draw(seed)
        if 0 not in case.sizes.values() and not case.invalid and case.sizes["S"] < 1000:
            break
        seed += 1_000_003
    layouts = {name: layout for name, layout in case.layouts.items() if name == "value" and layout in IN_PLACE}
    arrays = {name: np.ascontiguousarray(array) for name, array in case.arrays.items()}
    case = replace(case, layouts=layouts, arrays=arrays, changes=None)
    pick = random.Random(seed)
    return with_hostile_metadata(case, pick) if pick.random() < 0.35 else case


def run_emulated(case: Case) -> dict[str, Outcome]:
    """The outcomes of the atomic and of the sorted backward; both have the output of the forward."""
    form = case.form
    memory = Memory(case)
    arrays = memory.arrays
    starts = None if case.starts is None else np.array(case.starts, np.int64)
    shapes = np.array(case.levels, np.int64).reshape(-1, 2)
    options: dict[str, Any] = {"variant": form.variant, "lengths": None}
    if form.per_level:
        options["variant"] = options["variant"] | {"num_points": form.points}
    if case.lengths is not None:
        options["lengths"] = np.array(case.lengths, np.int64)
    checked_shapes, checked_starts = shapes, starts
    if case.on_device:  # validation sees levels of one pixel, and the planner nothing
        checked_shapes = np.ones_like(shapes)
        checked_starts = None if starts is None else np.zeros_like(starts)
        options |= {"metadata_on_device": True, "shapes": shapes, "starts": starts}
    parts = (arrays["value"], checked_shapes, checked_starts, arrays["locations"], arrays.get("weights"))
    inputs: Any = Inputs(*parts, arrays["grad_output"])
    if form.fused:
        inputs = FusedInputs(*parts, arrays["grad_output"], arrays["references"])
    wanted = Wanted(references=form.fused)
    # A small GPU is filled by a few queries, and launches what a large one does for many.
    gpu = emulator.SMALL_GPU if case.seed % 2 else emulator.H100
    order = case.seed % 3
    with mock.patch.object(emulator, "prepare", _prepare_with(case)):
        output = emulator.forward(inputs, gpu=gpu, order=order, **options)
        names = ("value", "locations", "weights", "references") if form.fused else ("value", "locations", "weights")
        grads = emulator.backward(inputs, gpu=gpu, order=order, wanted=wanted, **options)
        summed = emulator.summation(inputs, order=order, **options)
    atomic = Outcome({"output": output} | {n: g for n, g in zip(names, grads, strict=True) if g is not None})
    atomic.wrong = [f"{name}: written to" for name in memory.written()]
    outcomes = {"emulated": atomic, "emulated, sorted": Outcome({"value": summed})}
    for outcome in outcomes.values():
        outcome.results = canonical(case, outcome.results)
    return outcomes


def _prepare_with(case: Case) -> Callable[..., Any]:
    """The emulator's `prepare`, which validates: with lengths that pass where those on the device do not."""
    prepare = emulator.prepare

    def with_valid_lengths(inputs: Any, metadata_on_device: bool, variant: Any, lengths: Any = None) -> Any:
        return prepare(inputs, metadata_on_device, variant, None if lengths is None else np.clip(lengths, 0, case.Q))

    return with_valid_lengths


def check_emulated(seed: int) -> tuple[Case, dict[str, Outcome], list[Failure]]:
    """The call of a seed, its outcomes and how they break the contract."""
    case = draw_emulated(seed)
    try:
        outcomes = run_emulated(case)
        if not case.on_device:
            outcomes |= run_paths(case, ["array"])
    except (emulator.EmulatorError, NotImplementedError) as error:
        outcomes = {"emulated": Outcome(error=error)}
    want = expected(case, fitting_levels(case) if case.on_device else None)
    return case, outcomes, compare(case, outcomes, want)


def run_emulated_chunk(first: int, count: int) -> dict[str, Any]:
    """The counts of the calls of these seeds."""
    found = Count()
    for seed in range(first, first + count):
        case, outcomes, failures = check_emulated(seed)
        found.add(replace(case, seed=seed), outcomes, failures)
    return found.data
