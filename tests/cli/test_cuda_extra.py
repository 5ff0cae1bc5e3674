"""`info` says which of cuda12 and cuda13 goes with the torch that is installed, without importing it."""

import importlib.machinery
import importlib.util

import pytest

from cupy_msda.cli import cuda_extra


@pytest.fixture
def torch_with(tmp_path, monkeypatch):
    """Makes a package torch with this version.py the one that is found."""

    def install(version_file):
        (tmp_path / "__init__.py").write_text("raise AssertionError('info imports torch')")
        if version_file is not None:
            (tmp_path / "version.py").write_text(version_file)
        spec = importlib.machinery.ModuleSpec("torch", None, origin=str(tmp_path / "__init__.py"))
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec)

    return install


@pytest.mark.parametrize(
    ("version_file", "words"),
    [
        ("cuda: Optional[str] = '13.0'\n", "cuda13, because torch is built for CUDA 13.0; the driver must be 580"),
        (
            "__version__ = '2.4.0'\ncuda = '12.4'\n",
            "cuda12, because torch is built for CUDA 12.4; the driver must be 525",
        ),
        ("cuda = '11.8'\n", "none: torch is built for CUDA 11.8"),
        ("cuda: Optional[str] = None\n", "no torch for CUDA"),
        ("hip = '6.0'\n", "no torch for CUDA"),
        ("no python", "no torch for CUDA"),
        (None, "no torch for CUDA"),
    ],
)
def test_the_extra_follows_the_cuda_of_torch(torch_with, version_file, words):
    torch_with(version_file)
    assert words in cuda_extra.describe()


def test_without_torch_the_driver_decides(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert cuda_extra.describe().startswith("cuda13 with a driver from 580 on, cuda12 with one from 525 on")


def test_this_environment_says_what_torch_says():
    torch = pytest.importorskip("torch")
    assert cuda_extra.cuda_of_torch() == torch.version.cuda
