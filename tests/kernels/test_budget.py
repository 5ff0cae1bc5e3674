"""Every kernel compiles to machine code for every architecture, without a GPU and within its budget."""

import json

import pytest

from cupy_msda.cuda import kernels
from tests.helpers import specialisations
from tests.helpers.specialisations import ARCHITECTURES, BUDGET

pytest.importorskip("cupy_backends.cuda.libs.nvrtc", reason="needs CuPy and NVRTC")
MORE_REGISTERS = 8  # than the budget says: a jump
COMMAND = "python tests/specialisations.py writes the budget anew"


@pytest.fixture(scope="module")
def compiled():
    return specialisations.compile_all(specialisations.budgeted())


def test_compiles_without_warnings(compiled):
    noisy = {f"sm_{arch} {key}": found["warnings"] for (key, arch), found in compiled.items() if found["warnings"]}
    assert not noisy


def test_budget_lists_what_the_planner_chooses():
    listed = json.loads(BUDGET.read_text())["kernels"].keys()
    chosen = {str(key) for key in specialisations.budgeted()}
    assert listed == chosen, f"{len(listed ^ chosen)} specialisations differ: {COMMAND}"


def test_stays_within_the_budget(compiled):
    budget = json.loads(BUDGET.read_text())
    if specialisations.nvrtc_version() != budget["nvrtc"]:
        pytest.skip(f"the budget is for NVRTC {budget['nvrtc']}")
    over = []
    for (key, arch), found in compiled.items():
        entry, column = budget["kernels"][str(key)], ARCHITECTURES.index(arch)
        registers, spilled = entry["registers"][column], entry["spilled"][column]
        if found["registers"] > registers + MORE_REGISTERS or found["spilled"] > spilled:
            over.append(f"sm_{arch} {key}: {found}, budget {registers} registers, {spilled} bytes spilled")
    assert not over, f"{COMMAND}\n" + "\n".join(over)


def test_shared_memory_is_in_the_budget():
    for name, entry in json.loads(BUDGET.read_text())["kernels"].items():
        assert entry["shared"] <= 48 * 1024, name


def test_a_spill_and_a_jump_are_reported(compiled):
    key, arch = next(k for k in compiled if k[0].kind == "forward")
    worse = dict(compiled[key, arch], spilled=10**4)
    with pytest.raises(AssertionError, match="10000"):
        test_stays_within_the_budget(compiled | {(key, arch): worse})


def test_broken_source_names_the_specialisation(monkeypatch):
    key = specialisations.pairwise()[0]
    monkeypatch.setattr(kernels, "source", lambda kind: "this is no CUDA C")
    with pytest.raises(RuntimeError, match=rf"sm_90 {key.kind}\[value_dtype="):
        specialisations.resources(key, 90)


@pytest.mark.full_matrix
def test_every_specialisation_compiles():
    found = specialisations.compile_all(specialisations.every())
    assert not any(entry["warnings"] for entry in found.values())
