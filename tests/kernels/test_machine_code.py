"""The comparison of machine code sees what a kernel does, and not what it is called."""

import pytest

from tests.kernels import machine_code

pytest.importorskip("cupy_backends.cuda.libs.nvrtc", reason="needs CuPy and NVRTC")

SOURCE = """
__device__ const float factors[4] = {1.5f, 2.5f, 4.5f, 6.5f};

extern "C" __global__ void kernel(const float* input, float* output, int count) {
  int place = blockIdx.x * blockDim.x + threadIdx.x;
  if (place < count) output[place] = input[place] * factors[place % 4] + 3.25f;
}
"""
OPTIONS = ("-arch=sm_90", "--ptxas-options=-v")


@pytest.fixture(autouse=True)
def cold(tmp_path, monkeypatch):
    monkeypatch.setattr(machine_code, "CACHE", tmp_path / "compiled")


def compared(old, new, kernel="kernel"):
    old, new = machine_code.measure(old, OPTIONS, "kernel"), machine_code.measure(new, OPTIONS, kernel)
    assert old["instructions"] > 0
    found = machine_code.compare({"problem": old}, {"problem": new})
    return next(what for what in ("equal", "different") if found[what])


def test_a_renamed_kernel_is_equal():
    assert compared(SOURCE, SOURCE.replace("kernel(", "copied_and_scaled("), "copied_and_scaled") == "equal"


def test_renamed_data_is_equal():
    assert compared(SOURCE, SOURCE.replace("factors", "weights")) == "equal"


def test_a_constant_that_no_code_uses_is_equal():
    assert compared(SOURCE, f"{SOURCE}\nconstexpr int unused = 9;") == "equal"
    assert compared(f"{SOURCE}\nconstexpr int unused = 9;", SOURCE) == "different"


def test_a_comment_is_equal():
    assert compared(SOURCE, "// One line more.\n" + SOURCE) == "equal"


@pytest.mark.parametrize(("before", "after"), [("3.25f", "3.5f"), ("6.5f", "7.5f"), ("* factors", "- factors")])
def test_a_changed_kernel_is_different(before, after):
    assert before in SOURCE
    assert compared(SOURCE, SOURCE.replace(before, after)) == "different"


def test_the_cache_returns_what_was_compiled():
    cold = machine_code.measure(SOURCE, OPTIONS, "kernel")
    assert len(list(machine_code.CACHE.iterdir())) == 1
    assert machine_code.measure(SOURCE, OPTIONS, "kernel") == cold


def test_problems_of_one_side_are_reported():
    entry = {"code": ["A"], "data": [], "registers": 1, "shared": 0, "spilled": 0, "instructions": 1}
    found = machine_code.compare({"both": entry, "old": entry}, {"both": entry, "new": entry})
    assert (found["equal"], found["only in old"], found["only in new"]) == (["both"], ["old"], ["new"])


def test_more_registers_are_reported():
    entry = {"code": ["A"], "data": [], "registers": 1, "shared": 0, "spilled": 0, "instructions": 1}
    found = machine_code.compare({"problem": entry}, {"problem": entry | {"registers": 2}})
    assert found["different"]["problem"]["registers"] == [1, 2]


def test_a_problem_is_read_from_its_text():
    rows = machine_code.specialisations.budgeted_rows()
    assert [machine_code.row_of(machine_code.specialisations.text_of(row)) for row in rows] == rows
    assert machine_code.row_of("pair=float128,float128") is None


def test_labels_do_not_depend_on_kernels():
    listed = machine_code.listed([90])
    roles = {label.rsplit(": ", 1)[1] for label in listed["kernels"]["90"]}
    naive = {role for role in roles if role.startswith("naive_")}
    assert roles - naive == {"forward", "backward", "references", "expand", "sort", "sum", "cast"}
    assert len(naive) == 4
    names = {str(spec) for spec in machine_code.specialisations.budgeted().values()}
    assert not any(name in label for name in names for label in listed["kernels"]["90"])
    assert listed["kernels"]["90"].keys() == machine_code.specialisations.budgeted().keys()
