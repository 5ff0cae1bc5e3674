"""The benchmark of tuning: on an emulated GPU up to the timing, which runs on the CPU."""

import json

import pytest

from benchmarks import tuning as benchmark
from benchmarks.grid_cells import Cell
from cupy_msda.cuda import plan
from cupy_msda.cuda.gpu import H100
from cupy_msda.cuda.tuner import device_arrays
from tests.helpers import emulated_gpu

CELLS = [
    Cell("tiny", ((6, 4),), N=1, Q=Q, M=2, D=8, P=2, dtype=dtype, sampling="local", fused=fused)
    for Q, dtype, fused in ((24, "float32", False), (7, "float16", True))
]


@pytest.fixture
def gpu(monkeypatch):
    """Launches compute nothing; few resident warps are fast."""
    monkeypatch.setattr(benchmark, "drawn", lambda count, seed: CELLS[:count])
    monkeypatch.setattr(device_arrays.DeviceArrays, "agree", lambda self, one, other: True)
    found = emulated_gpu.install(monkeypatch, run=lambda planned, words: None)
    found.milliseconds = lambda launch: 0.01 * launch.spec.axes().get("warps", 1)
    return found


def run(monkeypatch, out, *arguments):
    """The second process in this one."""
    monkeypatch.setattr(benchmark, "in_another_process", benchmark.main)
    benchmark.main(["--device", "cpu", "--out", str(out), "--cells", "2", "--seed", "x", *arguments])
    return json.loads(out.read_text())


def test_it_tunes_times_and_sums_up(gpu, monkeypatch, tmp_path):
    result = run(monkeypatch, tmp_path / "out.json", "--repaired", "1")
    assert result["summary"]["calls"] == 4
    assert result["summary"]["repaired_calls"] == 2
    assert set(result["rows"][0]["times"]["forward"]) == {"default", "tuned", "spoilt", "repaired"}
    entries = benchmark.entries_of(result["rows"][0]["entries"])
    assert any(entry.axes for entry in entries)
    assert result["provenance"]["packages"]["numpy"]


def test_it_goes_on_where_it_was_stopped(gpu, monkeypatch, tmp_path):
    first = run(monkeypatch, tmp_path / "out.json", "--repaired", "0")
    del first["rows"][1]["entries"], first["rows"][1]["times"]
    (tmp_path / "out.json").write_text(json.dumps(first))
    again = []
    original = benchmark.tuned
    monkeypatch.setattr(benchmark, "tuned", lambda cell, budget: again.append(cell) or original(cell, budget))
    second = run(monkeypatch, tmp_path / "out.json", "--repaired", "0")
    assert again == CELLS[1:]
    assert second["rows"][0] == first["rows"][0]
    assert "times" in second["rows"][1]


def test_what_is_compiled_first_is_what_is_measured_first(gpu):
    for cell in CELLS:
        expected = benchmark.first_specs(cell)
        measured = {spec for spec in expected if spec.kernel == "forward"}
        assert plan.forward(benchmark.problem_of(cell), 16, H100).spec in measured
        assert len(measured) > 3


def test_choices_and_the_spoilt_table_hold_within_a_call(gpu):
    problem = benchmark.problem_of(CELLS[0])

    def planned():
        return plan.forward(problem, 16, benchmark.loaded.gpu_of(0)).spec.axes()["warps"]

    before = planned()
    text = benchmark.tuned(CELLS[0], 1000)
    assert planned() == before
    assert benchmark.with_choices(planned, text)() < before
    assert benchmark.with_choices(planned, None, spoil=True)() == before // 2
    assert planned() == before


@pytest.mark.parametrize(("after", "before", "is_slower"), [(102, 100, False), (103, 100, True), (5.4, 5, False)])
def test_slower(after, before, is_slower):
    assert benchmark.slower(after, before) == is_slower
