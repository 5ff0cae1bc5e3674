"""The benchmark times only valid implementations, and the documentation repeats the recorded results."""

import json
import re

import pytest
import torch

from benchmarks import cases, compare_kernels, implementations, models_report, operator_report, records, report, run
from benchmarks.robust_gradients import make_gradients_robust
from cupy_msda.call import Problem
from cupy_msda.cuda import kernels, plan
from cupy_msda.cuda.gpu import H100
from cupy_msda.torch import MSDeformAttn

SMALL = {
    "workloads": {
        "small": {"N": 2, "M": 2, "D": 4, "levels": [[6, 5], [3, 2]], "P": 2, "queries": None, "sampling": "local"},
        "points": {"N": 1, "M": 2, "D": 4, "levels": [[6, 5]], "P": 2, "queries": 7, "sampling": "uniform"},
    }
}
WRONG = """
class Wrong:
    name = "wrong"
    def unavailable(self, device):
        return None
    def forward(self, inputs):
        return inputs.grad_output
    def prepare_backward(self, inputs):
        return lambda: (inputs.value, inputs.sampling_locations, inputs.attention_weights)
class Absent(Wrong):
    name = "absent"
    def unavailable(self, device):
        return "it was never built"
IMPLEMENTATIONS = [Wrong(), Absent()]
"""


@pytest.fixture
def workload_file(tmp_path):
    path = tmp_path / "workloads.json"
    path.write_text(json.dumps(SMALL))
    return path


def test_valid_implementations_are_timed(workload_file, tmp_path, capsys):
    out = tmp_path / "out.json"
    arguments = [
        "--workload-file",
        workload_file,
        "--device",
        "cpu",
        "--repeats",
        "3",
        "--out",
        out,
        "--dtypes",
        "float64",
    ]
    assert run.main([str(a) for a in arguments]) == 0
    result = json.loads(out.read_text())
    assert result["provenance"]["packages"]["numpy"]
    names = {(r["workload"], r["implementation"]) for r in result["records"]}
    assert names >= {(w, i) for w in ("small", "points") for i in ("cupy_msda", "grid_sample")}
    for record in result["records"]:
        assert record["valid"]
        assert max(record["errors"].values()) < 1e-12
        for direction in ("forward", "backward"):
            assert 0 < record[direction]["q1_us"] <= record[direction]["median_us"] <= record[direction]["q3_us"]


def test_an_invalid_implementation_is_not_timed(workload_file, tmp_path, capsys):
    adapter, out = tmp_path / "adapter.py", tmp_path / "out.json"
    adapter.write_text(WRONG)
    arguments = ["--workload-file", workload_file, "--workloads", "small", "--device", "cpu", "--adapter", adapter]
    arguments += ["--implementations", "wrong", "absent", "--out", out]
    assert run.main([str(a) for a in arguments]) == 1
    (record,) = json.loads(out.read_text())["records"]
    assert not record["valid"]
    assert "forward" not in record
    assert "left out: absent: it was never built" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--workloads", "nothing"], "--workloads: expected names from encoder_800x1333"),
        (["--implementations", "nothing"], "--implementations: expected names from cupy_msda"),
        (["--dtypes", "int8"], "invalid choice"),
    ],
)
def test_unknown_names_are_refused(arguments, words, capsys):
    with pytest.raises(SystemExit) as stop:
        run.main(arguments)
    assert stop.value.code == 2
    assert words in capsys.readouterr().err


def test_an_adapter_must_be_a_python_file():
    with pytest.raises(ValueError, match=r"--adapter: expected a Python file, got nowhere\.py"):
        implementations.load_adapter("nowhere.py")


@pytest.mark.parametrize("name", cases.load())
def test_inputs_have_the_sizes_and_sampling_of_their_workload(name):
    workload = cases.load()[name]
    N = cases.on_cpu(workload).N
    inputs = cases.make_inputs(cases.on_cpu(workload), torch.float32, "cpu")
    assert inputs.value.shape == (N, workload.S, workload.M, workload.D)
    assert inputs.sampling_locations.shape == (N, workload.Q, workload.M, len(workload.levels), workload.P, 2)
    torch.testing.assert_close(inputs.attention_weights.sum((-1, -2)), torch.ones(N, workload.Q, workload.M))
    centre = inputs.sampling_locations.mean((0, 1, 2, 3, 4))
    torch.testing.assert_close(centre, torch.full((2,), 0.5), atol=0.3, rtol=0)
    if workload.sampling == "uniform":
        assert 0 <= inputs.sampling_locations.min() <= inputs.sampling_locations.max() <= 1


def test_robust_gradients_have_offsets_off_pixels_and_the_weights_of_he():
    torch.manual_seed(0)
    model = torch.nn.ModuleDict({"convolution": torch.nn.Conv2d(64, 64, 3), "attention": MSDeformAttn(64, 2, 4, 4)})
    whole = model["attention"].sampling_offsets.bias
    before = whole.detach().clone()
    make_gradients_robust(model)
    moved = (whole - before).detach().abs()
    assert moved.min() > 0
    assert 0.1 < moved.mean() < 0.5
    torch.testing.assert_close(model["convolution"].weight.std(), torch.tensor((2 / 576) ** 0.5), rtol=0.05, atol=0)


@pytest.mark.long
@pytest.mark.filterwarnings("ignore")
def test_a_patched_model_agrees_with_the_original(tmp_path):
    models = pytest.importorskip("benchmarks.models", reason="needs transformers", exc_type=ImportError)
    # Two images: with one, torch 2.13's batch norm on a CPU gives wrong gradients for incoming ones with strides.
    small = ["--size", "160", "160", "--batch", "2", "--repeats", "2", "--device", "cpu"]
    chosen = ["--models", "D-FINE", "--modes", "eager", "gradients", "--dtypes", "float32"]
    assert models.main([*chosen, *small, "--out", str(tmp_path)]) == 0
    original, patched, gradients = json.loads((tmp_path / "models_d_fine.json").read_text())["records"]
    assert (original["patched"], patched["patched"]) == (False, True)
    assert patched["largest_difference"] < 1e-5
    for record in (original, patched):
        assert 0 < record["share_of_operator"] < 1
        assert record["images_per_second"] > 0
    assert gradients["parameters"] > 100
    assert gradients["gradient_error_patched"] < 2 * gradients["gradient_error_original"] < 1e-4


def test_the_newest_record_of_each_model_counts(tmp_path):
    def row(mode, number):
        return {"model": "D-FINE", "dtype": "float32", "mode": mode, "number": number}

    dated = {"old": ("2026-01-01", [row("eager", 1), row("compiled", 2)]), "new": ("2026-01-02", [row("compiled", 3)])}
    for name, (date, rows) in dated.items():
        result = {"provenance": {"date": date}, "records": rows}
        (tmp_path / f"{name}.json").write_text(json.dumps(result))
    found = models_report.newest(tmp_path.glob("*.json"))
    assert {path.stem: [r["number"] for r in result["records"]] for path, result in found.items()} == {
        "old": [1],
        "new": [3],
    }


def test_records_with_old_keys_are_read(tmp_path):
    record = {"model": "D-FINE", "dtype": "float32", "mode": "gradients", "served": True, "gradient_error_as_it_is": 1}
    path = tmp_path / "old.json"
    path.write_text(json.dumps({"provenance": {"date": "2026-01-01"}, "records": [record]}))
    (found,) = models_report.newest([path])[path]["records"]
    assert (found["patched"], found["gradient_error_original"]) == (True, 1)
    times = {"default": {"median_us": 3.0}}
    assert (
        operator_report.backward_times({"ways": times})
        == operator_report.backward_times({"times": times})
        == {"default": 3.0}
    )


@pytest.mark.parametrize("part", report.PARTS)
def test_a_page_repeats_the_latest_result(part):
    assert report.enclosed(part) in report.PARTS[part][0].read_text()


def test_plots_are_those_of_the_latest_results(tmp_path):
    """The same files, and the same words: coordinates and ticks depend on the version of matplotlib."""
    pytest.importorskip("matplotlib")
    report.write_plots(tmp_path)
    made = {path.name: words_of(path) for path in tmp_path.iterdir()}
    assert made == {path.name: words_of(path) for path in report.PLOTS.iterdir()}
    assert all(made.values())


def words_of(path):
    return [text for text in re.findall(r"<text[^>]*>([^<]*)</text>", path.read_text()) if re.search("[a-z]{2}", text)]


def test_every_plot_is_on_the_page():
    page = report.PERFORMANCE.read_text()
    assert {f"plots/{path.name}" for path in report.PLOTS.iterdir()} == set(re.findall(r"\]\((plots/[^)]+)\)", page))


def test_a_record_without_a_description_is_named():
    with pytest.raises(ValueError, match=r"unheard_of_h100\.json: expected a name from backward"):
        records.content_of("unheard_of_h100")


def test_a_page_without_markers_is_named(tmp_path, monkeypatch):
    page = tmp_path / "page.md"
    page.write_text("<!-- records: made by python -m benchmarks.report -->")
    monkeypatch.setitem(report.PARTS, "records", (page, str))
    with pytest.raises(ValueError, match=r"expected the lines .* and <!-- end of records -->"):
        report.write_table("records")


def test_a_candidate_replaces_sources_and_launch_only_inside_its_context(tmp_path):
    (tmp_path / "forward.cu").write_text("#pragma once\n// another forward\n")
    levels = ((8, 8, 0),)
    problem = Problem(1, 64, 2, 32, 1, 4, 64, "float32", "float32", ("cuda", 0), levels)
    planned, source = plan.forward(problem, 16, H100), kernels.source("forward")
    candidate = compare_kernels.Candidate(tmp_path, compare_kernels.parse_launch("warps=4,unroll=2"))
    with compare_kernels.installed(candidate):
        launch = plan.forward(problem, 16, H100)
        assert (launch.spec.block.warps, launch.spec.block.unroll, launch.threads) == (4, 2, 128)
        assert launch.grid[0] * 4 == planned.grid[0] * planned.spec.block.warps
        assert kernels.source("forward") == "// another forward\n"
    assert plan.forward(problem, 16, H100) == planned
    assert kernels.source("forward") == source
    assert compare_kernels.parse_launch("") == {}
