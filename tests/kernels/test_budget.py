"""Every kernel compiles to machine code for every architecture, without a GPU and within its budget."""

import json

import pytest

from cupy_msda.cuda import kernels
from cupy_msda.cuda.gpu import ARCHITECTURES
from tests.helpers import specialisations
from tests.helpers.specialisations import BUDGET

pytest.importorskip("cupy_backends.cuda.libs.nvrtc", reason="needs CuPy and NVRTC")
MORE_REGISTERS = 8  # than the budget says: a jump
COMMAND = "python -m tests.helpers.specialisations writes the budget anew"


@pytest.fixture(
    scope="module", params=[True, pytest.param(False, marks=pytest.mark.long)], ids=["thinned", "all architectures"]
)
def compiled(request):
    return specialisations.compile_all(specialisations.budgeted_rows(), thinned=request.param)


def test_kernels_compile_without_warnings(compiled):
    noisy = {
        f"sm_{arch} {label}": found["warnings"] for (label, arch), (_, found) in compiled.items() if found["warnings"]
    }
    assert not noisy


def test_the_budget_lists_what_the_planner_chooses():
    listed = json.loads(BUDGET.read_text())["kernels"].keys()
    chosen = specialisations.budgeted().keys()
    assert listed == chosen, f"{len(listed ^ chosen)} kernels differ: {COMMAND}"


def test_the_budget_has_all_architectures():
    assert json.loads(BUDGET.read_text())["architectures"] == list(ARCHITECTURES)


def test_registers_and_spills_stay_within_the_budget(compiled):
    budget = json.loads(BUDGET.read_text())
    if specialisations.nvrtc_version() != budget["nvrtc"]:
        pytest.skip(f"the budget is for NVRTC {budget['nvrtc']}")
    over = []
    for (label, arch), (spec, found) in compiled.items():
        entry, column = budget["kernels"][label], budget["architectures"].index(arch)
        registers, spilled = entry["registers"][column], entry["spilled"][column]
        if found["registers"] > registers + MORE_REGISTERS or found["spilled"] > spilled:
            over.append(f"sm_{arch} {label}, {spec}: {found}, budget {registers} registers, {spilled} bytes spilled")
    assert not over, f"{COMMAND}\n" + "\n".join(over)


def test_every_spill_has_a_reason():
    for label, entry in json.loads(BUDGET.read_text())["kernels"].items():
        assert any(entry["spilled"]) == ("reason" in entry), f"{label}: {COMMAND}"


def test_what_models_use_spills_nowhere_but_on_hopper():
    """Where launches are derived, nothing that 32 channels and 16 samples need is spilled."""
    budget, column = json.loads(BUDGET.read_text()), list(ARCHITECTURES).index(90)
    rows = tuple(map(specialisations.text_of, specialisations.common_rows()))
    labels = [label for label in budget["kernels"] if label.startswith(rows)]
    assert len(labels) > 40
    for label in labels:
        spilled = budget["kernels"][label]["spilled"]
        assert not any(spilled[:column] + spilled[column + 1 :]), label


def test_shared_memory_needs_no_opt_in():
    budget = json.loads(BUDGET.read_text())["kernels"]
    for label, spec in specialisations.budgeted().items():
        assert budget[label]["shared"] == (spec.shared_bytes or 0) <= 48 * 1024, label


def test_a_spill_is_reported(compiled):
    problem = next(key for key, (spec, _) in compiled.items() if spec.kernel == "forward")
    spec, found = compiled[problem]
    with pytest.raises(AssertionError, match="10000"):
        test_registers_and_spills_stay_within_the_budget(compiled | {problem: (spec, dict(found, spilled=10**4))})


def test_a_source_that_does_not_compile_names_the_specialisation(monkeypatch):
    spec = next(iter(specialisations.budgeted().values()))
    monkeypatch.setattr(kernels, "source", lambda kernel: "this is no CUDA C")
    with pytest.raises(RuntimeError, match=rf"sm_90 {spec.kernel}\[.*value_dtype="):
        specialisations.resources(spec, 90)


@pytest.mark.full_matrix
def test_every_specialisation_compiles():
    found = specialisations.compile_all(specialisations.every_row())
    assert not any(measured["warnings"] for _, measured in found.values())
