"""How the commands end in a shell: statuses, closed output, Ctrl-C, odd encodings, and what is missing or broken."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import cupy_msda
from cupy_msda import __main__
from cupy_msda.cli import check, demo, environment
from cupy_msda.cuda.tuning import storage

ROOT = Path(cupy_msda.__file__).parent.parent
COMMAND = (sys.executable, "-m", "cupy_msda")


def shell(*arguments, code=None, folders=(), **variables):
    """The finished process of a command; `code` runs before it, `folders` come first on the path of modules."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, (*folders, ROOT)))} | variables
    command = [*COMMAND, *arguments]
    if code:
        begin, end = "import sys", f"from cupy_msda.__main__ import main; sys.exit(main({list(arguments)!r}))"
        command = [sys.executable, "-c", "\n".join((begin, code, end))]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)


def shell_of(text, **variables):
    """A line of bash, in which $M stands for the command."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "M": " ".join(COMMAND)} | variables
    return subprocess.run(["bash", "-c", text], capture_output=True, text=True, env=environment, timeout=120)


def test_version():
    assert shell("--version").stdout == f"cupy_msda {cupy_msda.__version__}\n"


@pytest.mark.parametrize("command", ["demo", "check", "info"])
def test_help_names_every_default(capsys, command):
    with pytest.raises(SystemExit):
        __main__.main([command, "--help"])
    text = " ".join(capsys.readouterr().out.split())
    if command == "demo":
        assert text.count("(default: ") == 3
        assert "128,000,000 pixels" in text
        assert "256 pixels" in text
        assert "1540 x 1540 pixels" in text
    if command == "check":
        assert "Exit status: 0" in text


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("command", ["check", "--version", "demo --help"])
def test_a_closed_pipe_gives_no_traceback(command, unbuffered):
    done = shell_of(f"($M {command}; echo $? >&2) | exec 0<&-", PYTHONUNBUFFERED=unbuffered)
    assert done.stderr.strip() in ("141", "0")  # 0: argparse ignores it


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_full_disk_is_a_sentence(unbuffered):
    done = shell_of("$M info > /dev/full", PYTHONUNBUFFERED=unbuffered)
    assert done.returncode == 2
    assert done.stderr == "cupy_msda: cannot write to standard output: No space left on device\n"


def test_no_standard_output_and_no_standard_error():
    assert shell_of("$M info >&-").returncode == 0
    assert shell_of("$M demo nowhere.png >&- 2>&-").returncode == 2


@pytest.fixture
def small(tmp_path):
    path = tmp_path / "small.png"
    pytest.importorskip("PIL.Image").new("RGB", (12, 9), "red").save(path)
    return path


def test_a_name_that_the_terminal_cannot_show(tmp_path, small):
    done = shell_of(
        f"cd {tmp_path} && $M demo {small} --backend cpu --out $'\\xff\\xc3\\xa4.png'",
        PYTHONIOENCODING="ascii",
        PYTHONUTF8="1",
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines()[-1][24:] == "\\udcff\\xe4.png"
    assert len(list(tmp_path.iterdir())) == 2


def test_ctrl_c_ends_quietly(tmp_path):
    code = """
import os, signal, threading
from cupy_msda.cli import demo
signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in what a shell runs in the background
measure, demo.REPEATS = demo._median_seconds, 10**6
def measure_and_interrupt(*arguments):  # not during an import, which may catch it
    threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT)).start()
    return measure(*arguments)
demo._median_seconds = measure_and_interrupt
"""
    done = shell("demo", "--backend", "cpu", "--out", str(tmp_path / "a.png"), code=code)
    assert (done.returncode, done.stdout, done.stderr) == (128 + signal.SIGINT, "", "")
    assert not list(tmp_path.iterdir())


def test_the_last_line_of_check_says_that_all_is_right(capsys):
    assert __main__.main(["check"]) == 0
    lines = capsys.readouterr().out.splitlines()
    cases = len(list(check.folder().glob("*.npz")))
    dtypes = sum(len(check.dtypes_of(backend)) for backend in check.backends())
    assert lines[-1].startswith(f"all right: {cases * dtypes} of ")


@pytest.mark.parametrize("setting", ["numpy", None])
def test_check_and_demo_name_the_tier_that_ran(capsys, monkeypatch, tmp_path, small, setting):
    if setting is None:
        pytest.importorskip("numba")
        monkeypatch.delenv("CUPY_MSDA_CPU", raising=False)
    else:
        monkeypatch.setenv("CUPY_MSDA_CPU", setting)
    expected = "numba" if setting is None else "NumPy (CUPY_MSDA_CPU=numpy)"
    assert __main__.main(["check"]) == 0
    (row,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("checked") and "cpu" in line]
    assert row.split(maxsplit=1)[1] == f"cpu: arrays of NumPy {np.__version__}, computed by {expected}"
    assert __main__.main(["demo", str(small), "--backend", "cpu", "--out", str(tmp_path / "a.png")]) == 0
    assert capsys.readouterr().out.splitlines()[0].split(maxsplit=1) == ["backend", f"cpu, computed by {expected}"]


def test_check_says_what_it_did_not_check(capsys, monkeypatch):
    pytest.importorskip("ml_dtypes")
    monkeypatch.setattr(check.arrays, "cuda_unavailable", lambda: "CuPy finds no CUDA device")
    __main__.main(["check"])
    left_out = [line for line in capsys.readouterr().out.splitlines() if line.startswith("not checked")]
    assert any("cuda: CuPy finds no CUDA device" in line for line in left_out)
    assert not any("bfloat16" in line for line in left_out)


def test_check_runs_bfloat16_where_numpy_has_it(capsys, monkeypatch):
    pytest.importorskip("ml_dtypes")
    monkeypatch.setattr(check.arrays, "cuda_unavailable", lambda: "CuPy finds no CUDA device")
    __main__.main(["check"])
    assert " bfloat16 " in capsys.readouterr().out
    monkeypatch.setitem(sys.modules, "ml_dtypes", None)
    __main__.main(["check"])
    (row,) = [line for line in capsys.readouterr().out.splitlines() if "bfloat16" in line]
    assert row.endswith("  bfloat16, which is a dtype of ml_dtypes: pip install 'ml_dtypes>=0.5'")


def test_the_last_line_of_check_says_what_is_wrong(capsys, monkeypatch):
    backward = check.api.ms_deform_attn_backward

    def wrong(value, *arguments):
        grads = backward(value, *arguments)
        return (grads[0] * (1.001 if value.dtype == np.float32 else 1), *grads[1:])

    monkeypatch.setattr(check.api, "ms_deform_attn_backward", wrong)
    assert __main__.main(["check"]) == 1
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith("WRONG: ")
    assert " on cpu" in last


def test_a_case_that_raises_is_wrong(capsys, monkeypatch):
    def fails(*_, **__):
        raise RuntimeError("no\nkernel")

    monkeypatch.setattr(check.api, "ms_deform_attn_forward", fails)
    assert __main__.main(["check"]) == 1
    out = capsys.readouterr().out
    assert "RuntimeError: no kernel  FAILED" in out
    assert out.splitlines()[-1].startswith("WRONG: ")


def test_check_without_its_cases(capsys, monkeypatch):
    monkeypatch.setattr(check.Path, "glob", lambda *_: iter(()))
    assert __main__.main(["check"]) == 2
    assert "the golden cases of cupy_msda are missing" in capsys.readouterr().err


@pytest.mark.parametrize("empty", ["", " "])
def test_an_empty_variable_is_none(monkeypatch, empty):
    before = storage.folder()
    for name in ("CUPY_MSDA_CPU", "CUPY_MSDA_NUM_THREADS", "CUPY_MSDA_KERNELS"):
        monkeypatch.setenv(name, empty)
    environment.refuse_wrong_variables()
    assert before is None  # tests run without tuning
    monkeypatch.setenv("CUPY_MSDA_TUNING", empty)
    assert storage.folder() == Path.home() / ".cupy_msda" / "tuning"


@pytest.mark.parametrize("command", ["check", "demo", "explain", "tune"])
@pytest.mark.parametrize(
    ("variable", "expected"),
    [
        ("CUPY_MSDA_NUM_THREADS", "a positive int, got '0'"),
        ("CUPY_MSDA_KERNELS", "'fast' or 'naive', got '0'"),
        ("CUPY_MSDA_CPU", "'numpy' or 'numba', got '0'"),
    ],
)
def test_a_wrong_variable_ends_a_command_with_its_name(capsys, monkeypatch, tmp_path, command, variable, expected):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(variable, "0")
    sizes = ["--sizes", "decoder_300"] if command == "explain" else []
    assert __main__.main([command, *sizes]) == 2
    out, err = capsys.readouterr()
    assert (out, err) == ("", f"cupy_msda {command}: {variable}: expected {expected}\n")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("module", ["PIL", "matplotlib"])
def test_demo_without_a_module_that_it_draws_with(tmp_path, module):
    done = shell("demo", "--out", str(tmp_path / "a.png"), code=f"sys.modules[{module!r}] = None")
    assert done.returncode == 2
    assert (
        done.stderr
        == "cupy_msda demo: the demo needs Pillow and matplotlib: pip install 'pillow>=10' 'matplotlib>=3.8'\n"
    )


@pytest.mark.parametrize("module", ["PIL", "matplotlib"])
def test_demo_with_a_broken_module(tmp_path, module):
    (tmp_path / module).mkdir()
    (tmp_path / module / "__init__.py").write_text("raise OSError('libfoo.so:\\ncannot open')")
    done = shell("demo", "--out", str(tmp_path / "a.png"), folders=[tmp_path])
    assert done.returncode == 2
    assert "cannot be imported (libfoo.so: cannot open)" in done.stderr
    assert done.stderr.count("\n") == 1


def test_settings_of_matplotlib_that_are_wrong(tmp_path):
    done = shell("demo", "--out", str(tmp_path / "a.png"), MPLBACKEND="nonsense")
    assert done.returncode == 2
    assert "matplotlib cannot be imported (Key backend: 'nonsense'" in done.stderr
    assert done.stderr.count("\n") == 1


def test_too_little_memory_is_a_sentence(capsys, monkeypatch):
    def fails(*_):
        raise MemoryError

    monkeypatch.setattr(demo, "make_scene", fails)
    assert __main__.main(["demo"]) == 2
    assert capsys.readouterr().err == "cupy_msda demo: there is not enough memory\n"


def test_auto_goes_on_on_the_cpu_where_the_gpu_fails(capsys, monkeypatch, tmp_path, small):
    run = demo.run

    def without_nvrtc(scene, backend):
        if backend == "cuda":
            raise RuntimeError("CuPy failed to load\nlibnvrtc.so.13")
        return run(scene, backend)

    monkeypatch.setattr(demo.arrays, "cuda_unavailable", lambda: None)
    monkeypatch.setattr(demo, "run", without_nvrtc)
    assert __main__.main(["demo", str(small), "--out", str(tmp_path / "a.png")]) == 0
    captured = capsys.readouterr()
    assert captured.out.splitlines()[0].split()[:2] == ["backend", "cpu,"]
    assert "the backend cuda fails here: CuPy failed to load libnvrtc.so.13; it runs on cpu instead" in captured.err
    assert __main__.main(["demo", str(small), "--backend", "cuda", "--out", str(tmp_path / "b.png")]) == 2
    assert "the backend cuda fails here" in capsys.readouterr().err


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="needs Linux")
@pytest.mark.parametrize(
    ("mode", "size"), [("L", (1, 500)), ("RGBA", (9000, 1000)), ("P", (60000, 2)), ("I;16", (2, 60000))]
)
def test_memory_is_bounded_for_any_shape(tmp_path, mode, size):
    pytest.importorskip("PIL.Image").new(mode, size).save(tmp_path / "in.png")
    code = "import atexit; atexit.register(lambda: print(open('/proc/self/status').read()))"
    done = shell("demo", str(tmp_path / "in.png"), "--backend=cpu", f"--out={tmp_path / 'out.png'}", code=code)
    assert done.returncode == 0, done.stderr
    peak = next(line for line in done.stdout.splitlines() if line.startswith("VmHWM"))
    assert int(peak.split()[1]) < 700_000  # KiB
