"""``tune`` and ``explain`` on the command line, without a GPU but for the files and the plans."""

import json
import re

import pytest

from cupy_msda import Sizes, arrays
from cupy_msda.__main__ import main
from cupy_msda.cli import sizes_argument, tune
from cupy_msda.cli.output import CommandError
from cupy_msda.cuda.tuning import file_format, storage
from cupy_msda.cuda.tuning.file_format import Key, TuningFile
from tests.helpers.drawn_entries import some_entries

KEY = Key("0.1.0", "8.0", 108, 12040)


@pytest.fixture
def folder(monkeypatch, tmp_path):
    monkeypatch.setenv(storage.VARIABLE, str(tmp_path / "tuning"))
    monkeypatch.setattr(arrays, "cuda_unavailable", lambda: "CuPy finds no CUDA device")
    return tmp_path / "tuning"


def run(capsys, *arguments):
    try:
        code = main([str(argument) for argument in arguments])
    except SystemExit as stop:
        code = stop.code
    captured = capsys.readouterr()
    return code, captured.out, captured.err


@pytest.fixture
def exported(tmp_path):
    path = tmp_path / "a100.json"
    path.write_text(file_format.encode(TuningFile("NVIDIA A100", {KEY: some_entries()})))
    return path


def test_a_file_goes_in_and_out(capsys, folder, exported, tmp_path):
    code, out, _ = run(capsys, "tune", "--import", exported)
    assert (code, out.startswith("imported")) == (0, True)
    code, out, _ = run(capsys, "tune", "--show")
    assert "NVIDIA A100: version 0.1.0, compute capability 8.0, 108 multiprocessors, driver for CUDA 12.4" in out
    assert len(re.findall("us -> ", out)) == len(some_entries())
    assert run(capsys, "tune", "--export", tmp_path / "out.json")[0] == 0
    assert (tmp_path / "out.json").read_text() == exported.read_text()
    assert run(capsys, "tune", "--clear")[0] == 0
    assert not list(folder.iterdir())
    assert run(capsys, "tune", "--show")[:2] == (0, f"folder      {folder}\nnothing is tuned\n")
    assert run(capsys, "tune", "--clear")[:2] == (0, f"nothing to delete in {folder}\n")


def test_files_of_others_are_kept(capsys, folder, exported):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "package.json").write_text('{"name": "x"}')
    (folder / "nvidia_a100.json").write_text("not ours")
    assert run(capsys, "tune", "--import", exported)[0] == 0
    assert (folder / "nvidia_a100.json.bak").read_text() == "not ours"
    code, out, _ = run(capsys, "tune", "--clear")
    assert code == 0
    assert "package.json, which is no tuning file" in out
    assert {path.name for path in folder.iterdir()} == {"package.json", "nvidia_a100.json.bak"}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--import", "{broken}"], "is no tuning file: it is no JSON"),
        (["--import", "{missing}"], "No such file"),
        (["--export", "{missing}"], "there is nothing to export"),
        (["--budget", "soon"], "--budget: expected a time such as 60s or 5m, got 'soon'"),
        (["--budget", "0s"], "--budget: expected a time"),
        (["--sizes", "N=2"], "--sizes: expected sizes as 'levels="),
        ([], "CuPy finds no CUDA device"),
        (["--show", "--clear"], "not allowed with"),
    ],
)
def test_bad_requests_are_refused(capsys, folder, tmp_path, arguments, words):
    broken = tmp_path / "broken.json"
    broken.write_text("{")
    names = {"broken": broken, "missing": tmp_path / "missing.json"}
    code, _, err = run(capsys, "tune", *(word.format(**names) for word in arguments))
    assert code == 2
    assert words in err


def test_an_import_with_tuning_switched_off_is_refused(capsys, folder, exported, monkeypatch):
    monkeypatch.setenv(storage.VARIABLE, "off")
    code, _, err = run(capsys, "tune", "--import", exported)
    assert code == 2
    assert "CUPY_MSDA_TUNING is off" in err


def test_a_broken_file_is_shown_as_such(capsys, folder):
    folder.mkdir()
    (folder / "x.json").write_text(json.dumps({"format": 2}))
    code, out, _ = run(capsys, "tune", "--show")
    assert code == 0
    assert "x.json: no tuning file: expected a tuning file of format 1" in out


@pytest.mark.parametrize(("text", "seconds"), [("60s", 60), ("5m", 300), ("1.5h", 5400), ("7", 7)])
def test_times(text, seconds):
    assert tune._seconds(text) == seconds


@pytest.mark.parametrize(
    ("text", "sizes"),
    [
        ("levels=8x6", Sizes(((8, 6),))),
        ("levels=8x6,4x3 N=2 Q=300 D=16 P=3", Sizes(((8, 6), (4, 3)), N=2, Q=300, D=16, P=3)),
        ("levels=8x6 reference_coordinates=4 packed", Sizes(((8, 6),), reference_coordinates=4, packed=True)),
        ("levels=8x6 num_points=3 interpolation=nearest", Sizes(((8, 6),), num_points=(3,), interpolation="nearest")),
    ],
)
def test_sizes_as_text(text, sizes):
    assert sizes_argument.read(text) == sizes


@pytest.mark.parametrize("text", ["", "levels", "levels=8", "levels=8x6 N=-1", "levels=8x6 N=two", "levels=8x6 O=1"])
def test_other_text_is_refused(text):
    with pytest.raises(CommandError, match="--sizes: expected"):
        sizes_argument.read(text)


@pytest.mark.parametrize(
    ("gpu", "name"),
    [
        ("75", "a GPU that is not here (sm_75, 40 multiprocessors)"),
        ("12.0", "a GPU that is not here (sm_120, 170 multiprocessors)"),
        ("sm_70", "a GPU that is not here (sm_70, 80 multiprocessors)"),
        ("10.3", "with the limits of the nearest one that is listed (sm_103, 148 multiprocessors)"),
    ],
)
def test_explain_says_which_kernels_run_and_why(capsys, folder, gpu, name):
    code, out, _ = run(capsys, "explain", "--sizes", "decoder_300", "--dtype", "float16", "--gpu", gpu)
    assert code == 0
    assert name in out
    assert "the queries do not fill the GPU" in out
    assert "groups of lanes share the samples of a query" in out
    assert re.search(r"^forward +\d+\.\d MB at least$", out, re.MULTILINE)
    assert out.count("backward:") >= 2


def test_explain_takes_the_dtype_of_locations(capsys, folder):
    code, out, _ = run(capsys, "explain", "--sizes", "decoder_300", "--dtype", "bfloat16/float32", "--gpu", 80)
    assert code == 0
    assert re.search(r"^call +ms_deform_attn of bfloat16 and float32, ", out, re.MULTILINE)


@pytest.mark.parametrize("command", [["explain", "--sizes", "decoder_300", "--dtype"], ["tune", "--dtypes"]])
def test_dtypes_that_are_none_are_refused(capsys, folder, command):
    code, _, err = run(capsys, *command, "float32/float16")
    assert code == 2
    assert "a dtype: expected float16, bfloat16, float32, float64, float16/float32 or bfloat16/float32" in err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--sizes", "decoder_300", "--gpu", "42"], "gpu: a GPU of compute capability 4.2 is too old: expected 7.5"),
        (["--sizes", "decoder_300", "--gpu", "9"], "--gpu: expected a compute capability such as 8.6, 86 or sm_86"),
        (["--sizes", "levels=0x3"], "--sizes: levels: expected levels of positive"),
        ([], "--sizes"),
    ],
)
def test_explain_refuses_bad_requests(capsys, folder, arguments, words):
    code, _, err = run(capsys, "explain", *arguments)
    assert code == 2
    assert words in err


def test_explain_without_a_gpu_describes_the_cpu(capsys, folder, monkeypatch):
    monkeypatch.setenv("CUPY_MSDA_CPU", "numpy")
    code, out, _ = run(capsys, "explain", "--sizes", "decoder_300")
    assert code == 0
    assert out.splitlines()[1].split(maxsplit=1)[1] == "CPU, NumPy (CUPY_MSDA_CPU=numpy); CuPy finds no CUDA device"
    assert len(out.splitlines()) == 2


def test_ctrl_c_says_what_is_kept(capsys, folder, monkeypatch):
    def interrupted(*arguments, **settings):
        raise KeyboardInterrupt

    monkeypatch.setattr(tune, "tune", interrupted)
    code, _, err = run(capsys, "tune")
    assert code == 130
    assert "what was found is kept" in err


def test_info_says_what_is_tuned(capsys, folder, exported, monkeypatch):
    def row():
        return next(line for line in run(capsys, "info")[1].splitlines() if line.startswith("tuning"))

    assert row().endswith(f"{folder}: nothing is tuned")
    run(capsys, "tune", "--import", exported)
    assert row().endswith(f"{folder}: nvidia_a100")
    monkeypatch.setenv(storage.VARIABLE, "off")
    assert row().endswith("off (CUPY_MSDA_TUNING)")
