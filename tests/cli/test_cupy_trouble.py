"""CuPy without a folder for its kernels, or broken: the commands and the array functions say so and go on."""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import cupy_msda
from cupy_msda import arrays
from cupy_msda.arrays import cupy_module
from cupy_msda.cli import check, info

ROOT = Path(cupy_msda.__file__).parent.parent
NO_CUPY = pytest.mark.skipif(find_spec("cupy") is None, reason="needs CuPy")
COMMANDS = ("info", "check", "demo")


def run(command, folder, *paths, **variables):
    arguments = ["demo", "--out", str(folder / "demo.png"), str(folder / "in.png")] if command == "demo" else [command]
    if command == "demo":
        image = pytest.importorskip("PIL.Image")
        image.fromarray(np.random.default_rng(0).integers(0, 255, (20, 30, 3), np.uint8)).save(folder / "in.png")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, (*paths, ROOT)))} | variables
    for name in ("CUPY_CACHE_IN_MEMORY", "CUPY_CACHE_DIR"):
        if name not in variables:
            environment.pop(name, None)
    command = [sys.executable, "-m", "cupy_msda", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)


def unusable(folder, kind):
    """The variable that makes CuPy's cache folder one that even root cannot make."""
    a_file = folder / "file"
    a_file.touch()
    return {
        "file": {"CUPY_CACHE_DIR": str(a_file)},
        "below a file": {"CUPY_CACHE_DIR": str(a_file / "cache")},
        "nothing": {"CUPY_CACHE_DIR": ""},
        "no home": {"HOME": "/proc/nonexistent"},
        "a home that is a file": {"HOME": str(a_file)},
    }[kind]


KINDS = ("file", "below a file", "nothing", "no home", "a home that is a file")


@NO_CUPY
@pytest.mark.parametrize("kind", KINDS)
def test_info_says_which_cache_folder_cannot_be_used(tmp_path, kind):
    variables = unusable(tmp_path, kind)
    done = run("info", tmp_path, **variables)
    assert done.returncode == 0
    row = next(line for line in done.stdout.splitlines() if line.startswith("kernel cache"))
    assert "in memory, because " in row
    assert "set CUPY_CACHE_DIR to a folder that can be written" in row
    assert next(iter(variables.values())) in row
    assert "Traceback" not in done.stderr


@NO_CUPY
@pytest.mark.parametrize("command", COMMANDS)
def test_commands_go_on_without_a_cache_folder(tmp_path, command):
    done = run(command, tmp_path, **unusable(tmp_path, "file"))
    assert done.returncode == 0
    note = [line for line in done.stderr.splitlines() if "note: " in line]
    assert len(note) == 1
    assert f"CuPy cannot keep compiled kernels in {tmp_path / 'file'} (File exists)" in note[0]
    assert "Set CUPY_CACHE_DIR" in note[0]
    assert done.stderr.count("\n") == 1


@NO_CUPY
def test_who_chose_memory_gets_no_note(tmp_path):
    done = run("info", tmp_path, CUPY_CACHE_DIR=str(tmp_path / "cache"), CUPY_CACHE_IN_MEMORY="1")
    assert "in memory (CUPY_CACHE_IN_MEMORY is set)" in done.stdout
    assert done.stderr == ""


@NO_CUPY
def test_the_environment_still_names_the_folder_of_the_user(tmp_path):
    code = (
        "import os, warnings; from cupy_msda import arrays; before = dict(os.environ)\n"
        "with warnings.catch_warnings(record=True) as seen:\n"
        "    warnings.simplefilter('always'); arrays.require_cupy('x'); arrays.require_cupy('x')\n"
        "print(len(seen), {k: v for k, v in os.environ.items() if before.get(k) != v})"
    )
    variables = {"CUPY_CACHE_DIR": str(tmp_path / "file"), "PYTHONPATH": str(ROOT)}
    (tmp_path / "file").touch()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ | variables)
    assert done.stdout == "1 {'CUPY_CACHE_IN_MEMORY': '1'}\n", done.stderr


def test_info_makes_no_folder_where_cupy_is_missing(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "cupy", None)
    monkeypatch.setenv("CUPY_CACHE_DIR", str(tmp_path / "cache"))
    assert dict(info.describe())["kernel cache"] == str(tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


BROKEN = {
    "missing part": ("import fastrlock_that_is_missing", "No module named 'fastrlock_that_is_missing'"),
    "wrapped": (
        "try:\n    raise OSError('libcuda.so.1:\\ncannot open')\n"
        "except OSError as error:\n    raise ImportError('=' * 60) from error",
        "OSError: libcuda.so.1: cannot open",
    ),
    "another error": ("raise ValueError('numpy.dtype size changed')", "ValueError: numpy.dtype size changed"),
    "no message": ("assert False", "AssertionError"),
    "nothing in it": ("", "is not CuPy"),
}


@pytest.mark.parametrize(
    ("command", "kind"), [*(("info", kind) for kind in BROKEN), ("check", "another error"), ("demo", "nothing in it")]
)
def test_commands_go_on_with_a_broken_cupy(tmp_path, command, kind):
    text, words = BROKEN[kind]
    (tmp_path / "cupy").mkdir()
    (tmp_path / "cupy" / "__init__.py").write_text(text)
    done = run(command, tmp_path, tmp_path, CUPY_CACHE_DIR=str(tmp_path / "cache"))
    assert done.returncode == 0
    assert "Traceback" not in done.stderr
    if command != "demo":
        assert words in done.stdout
        assert "pip install" in done.stdout


class OnCuda:
    """An array of some framework on a CUDA device."""

    def __dlpack_device__(self):
        return 2, 0

    def __dlpack__(self, **_):
        raise AssertionError("is read only with a stream of CuPy")


@pytest.fixture
def cupy_of(tmp_path, monkeypatch):
    """Makes `import cupy` execute a text."""

    def make(text):
        (tmp_path / "cupy").mkdir()
        (tmp_path / "cupy" / "__init__.py").write_text(text)
        monkeypatch.syspath_prepend(str(tmp_path))
        monkeypatch.setitem(sys.modules, "cupy", None)
        monkeypatch.delitem(sys.modules, "cupy")

    return make


@pytest.mark.parametrize("kind", BROKEN)
def test_array_functions_name_a_broken_cupy(cupy_of, kind):
    text, words = BROKEN[kind]
    cupy_of(text)
    with pytest.raises(RuntimeError, match="needs CuPy") as error:
        cupy_msda.ms_deform_attn(OnCuda(), [(2, 3)], None, OnCuda(), OnCuda())
    assert words in str(error.value)
    assert "\n" not in str(error.value)
    assert "pip install" in str(error.value)
    assert words in arrays.cuda_unavailable()


def test_an_import_that_failed_for_its_cache_folder_names_the_variable(cupy_of, monkeypatch, tmp_path):
    """Somebody imported CuPy before and went on: CuPy cannot be imported again in this process."""
    cupy_of("raise AttributeError('partially initialized')")
    monkeypatch.setenv("CUPY_CACHE_DIR", str(tmp_path / "cupy" / "__init__.py"))
    monkeypatch.setenv("CUPY_CACHE_IN_MEMORY", "1")
    with pytest.raises(RuntimeError, match="Set CUPY_CACHE_DIR to a folder that can be written, and start again"):
        arrays.require_cupy("this array")


def test_a_missing_cupy_names_the_command(monkeypatch):
    monkeypatch.setitem(sys.modules, "cupy", None)
    with pytest.raises(RuntimeError, match="which is not installed: pip install 'cupy-cuda13x"):
        arrays.require_cupy("this array")


@pytest.mark.parametrize("error", [RuntimeError("no driver"), AttributeError("cuda"), OSError("libcudart.so")])
def test_a_device_count_that_fails_is_a_reason(monkeypatch, error):
    class Runtime:
        is_hip = False

        @staticmethod
        def getDeviceCount():
            raise error

    found = SimpleNamespace(cuda=SimpleNamespace(runtime=Runtime))
    monkeypatch.setattr(cupy_module, "require_cupy", lambda what: found)
    assert arrays.cuda_unavailable() == f"CuPy finds no usable CUDA device: {error}"


@pytest.mark.parametrize(("driver", "words"), [(0, "no NVIDIA driver"), (12040, "driver version is insufficient")])
def test_no_driver_and_an_old_driver_are_two_reasons(monkeypatch, driver, words):
    class Runtime:
        is_hip = False

        @staticmethod
        def driverGetVersion():
            return driver

        @staticmethod
        def getDeviceCount():
            raise RuntimeError("cudaErrorInsufficientDriver: CUDA driver version is insufficient")

    found = SimpleNamespace(cuda=SimpleNamespace(runtime=Runtime))
    monkeypatch.setattr(cupy_module, "require_cupy", lambda what: found)
    assert words in arrays.cuda_unavailable()


def test_rocm_is_a_reason(monkeypatch):
    found = SimpleNamespace(cuda=SimpleNamespace(runtime=SimpleNamespace(is_hip=True, getDeviceCount=lambda: 1)))
    monkeypatch.setattr(cupy_module, "require_cupy", lambda what: found)
    assert "ROCm" in arrays.cuda_unavailable()


class Gpus:
    """A runtime with three devices, of which the second cannot be asked, and without NVRTC."""

    is_hip = False

    def __init__(self, current):
        self.current = current

    def getDevice(self):
        return self.current

    def getDeviceCount(self):
        return 3

    def getDeviceProperties(self, device):
        if device == 1:
            raise RuntimeError("prohibited\nmode")
        return {"name": b"H100", "totalGlobalMem": 80 << 30, "major": 9, "minor": 0}

    def driverGetVersion(self):
        return 13010

    runtimeGetVersion = driverGetVersion


@pytest.fixture(params=[0, 1])
def gpus(monkeypatch, request):
    def getVersion():
        raise RuntimeError("CuPy failed to load\nlibnvrtc.so.13")

    cuda = SimpleNamespace(runtime=Gpus(request.param), nvrtc=SimpleNamespace(getVersion=getVersion))
    found = SimpleNamespace(cuda=cuda, __version__="14.2.0", asarray=None, asnumpy=None)
    monkeypatch.setattr(arrays, "require_cupy", lambda what: found)
    monkeypatch.setattr(arrays, "cuda_unavailable", lambda: None)
    return request.param


def test_info_shows_what_can_be_asked(gpus):
    rows = dict(info.describe())
    assert rows["GPU 0"] == rows["GPU 2"] == "H100, sm_90, 80 GiB"
    assert rows["GPU 1"] == "fails: prohibited mode"
    assert rows["CUDA of the driver"] == rows["CUDA runtime"] == "13.1"
    assert rows["NVRTC"] == "fails: CuPy failed to load libnvrtc.so.13"


def test_check_names_the_gpu(gpus):
    _, on_gpu = check.backends()
    expected = "GPU 0 (H100), none of the 2 others" if gpus == 0 else "a GPU that cannot be asked: prohibited mode"
    assert on_gpu.device == f"CuPy 14.2.0, {expected}"
