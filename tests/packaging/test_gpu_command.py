"""``python -m tests.gpu`` selects GPU tests by marker and parameter, runs all of them, and reports what failed."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
# The NumPy backend stands in for a CUDA one.
CONFTEST = """
from tests.helpers import backends
backends.GPU, backends.CUDA_BACKENDS = True, backends.CPU_BACKENDS[:1]
from tests.conftest import *
"""
TESTS = {
    "contract/test_parameters.py": """
import pytest
from tests.helpers import backends
pytestmark = pytest.mark.sanitizer
@pytest.mark.parametrize("backend", backends.CPU_BACKENDS, ids=lambda b: b.name)
def test_by_parameter(backend):
    assert backend.name == "numpy"
def test_on_the_cpu():
    raise AssertionError("not a GPU test")
""",
    "cuda/test_markers.py": """
import os, pytest
pytestmark = [pytest.mark.gpu, pytest.mark.sanitizer]
def test_skipped():
    pytest.skip("needs two devices")
@pytest.mark.exclusive
def test_exclusive():
    assert "PYTEST_XDIST_WORKER" not in os.environ
@pytest.mark.no_sanitizer("initcheck")
def test_workers():
    assert "PYTEST_XDIST_WORKER" in os.environ or os.environ["TOOL"] == "memcheck"
@pytest.mark.no_sanitizer
def test_never_under_a_sanitizer():
    assert "TOOL" not in os.environ
""",
    "packaging/test_snippets.py": """
import pytest
@pytest.mark.gpu_if_present
def test_snippets():
    raise AssertionError("snippet")
""",
}
SANITIZER = """#!/bin/sh
export TOOL="${1#--tool=}"
while [ "${1#*python}" = "$1" ]; do shift; done
exec "$@"
"""


@pytest.fixture
def project(tmp_path):
    for name, text in {"conftest.py": CONFTEST, **TESTS}.items():
        path = tmp_path / "tests" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    (tmp_path / "pyproject.toml").write_text((ROOT / "pyproject.toml").read_text())
    sanitizer = tmp_path / "bin" / "compute-sanitizer"
    sanitizer.parent.mkdir()
    sanitizer.write_text(SANITIZER)
    sanitizer.chmod(0o755)
    return tmp_path


def run_gpu_tests(project, *arguments):
    """Exit status, output and record of the command on another folder of tests."""
    program = f"""
import sys
from pathlib import Path
from tests import gpu
gpu.ROOT, gpu.provenance = Path({str(project)!r}), lambda device: {{"device": device}}
gpu.has_gpu = lambda: True
sys.exit(gpu.main(sys.argv[1:]))
"""
    environment = os.environ | {
        "PATH": f"{project / 'bin'}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
    }
    for name in ("PYTEST_XDIST_WORKER", "PYTEST_CURRENT_TEST"):
        environment.pop(name, None)
    command = [sys.executable, "-c", program, "--out", project / "out", "--workers", "2", *arguments]
    ended = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=project)
    record = project / "out" / "gpu_tests.json"
    return ended.returncode, ended.stdout, json.loads(record.read_text()) if record.exists() else None


def count(summary):
    """Pytest's counts without what was deselected."""
    return ", ".join(re.findall(r"\d+ (?:failed|passed|skipped)", summary[-1]))


def test_every_gpu_test_runs_and_a_failure_is_reported(project):
    status, _, record = run_gpu_tests(project, "--sanitizer", "memcheck", "initcheck")
    assert status == 1
    assert record["planned"] == 6
    counts = {name: [room[kind] for kind in ("passed", "failed", "skipped")] for name, room in record["rooms"].items()}
    assert counts == {"contract": [1, 0, 0], "cuda": [3, 0, 1], "packaging": [0, 1, 0]}
    assert record["failed"] == ["tests/packaging/test_snippets.py::test_snippets"]
    checks = {check["check"]: (check["exit"], count(check["summary"])) for check in record["checks"]}
    assert checks == {
        "shared": (1, "1 failed, 3 passed, 1 skipped"),
        "exclusive": (0, "1 passed"),
        "memcheck, tests/contract/test_parameters.py": (0, "1 passed"),
        "memcheck, tests/cuda/test_markers.py": (0, "1 passed, 1 skipped"),
        "memcheck, tests/cuda/test_markers.py, exclusive": (0, "1 passed"),
        "initcheck, tests/contract/test_parameters.py": (0, "1 passed"),
        "initcheck, tests/cuda/test_markers.py": (0, "1 skipped"),
        "initcheck, tests/cuda/test_markers.py, exclusive": (0, "1 passed"),
    }


SHARED = """
import pytest
pytestmark = [pytest.mark.gpu, pytest.mark.sanitizer, pytest.mark.processes(2)]
@pytest.mark.parametrize("number", range(4))
def test_number(number):
    pass
@pytest.mark.no_sanitizer
def test_never_under_a_sanitizer():
    pass
@pytest.mark.exclusive
def test_exclusive():
    pass
"""


def test_processes_share_the_tests_of_a_module(project):
    (project / "tests/cuda/test_shared.py").write_text(SHARED)
    status, _, record = run_gpu_tests(project, "--sanitizer", "memcheck", "--tests", "tests/cuda/test_shared.py")
    checks = {check["check"]: count(check["summary"]) for check in record["checks"]}
    assert (status, checks) == (
        0,
        {
            "shared": "5 passed",
            "exclusive": "1 passed",
            "memcheck, tests/cuda/test_shared.py, --slice=1/2": "2 passed",
            "memcheck, tests/cuda/test_shared.py, --slice=2/2": "2 passed",
            "memcheck, tests/cuda/test_shared.py, exclusive": "1 passed",
        },
    )
    assert len(list((project / "out").glob("memcheck*.txt"))) == 3


def test_modules_that_ask_for_a_gpu_have_marked_tests():
    """Such tests pass on every machine: without the mark they silently miss from the GPU tests."""
    texts = {path: path.read_text() for path in ROOT.glob("tests/*/test_*.py") if path != Path(__file__)}
    asking = {path for path, text in texts.items() if "backends.GPU" in text}
    assert asking
    assert not {path for path in asking if "pytest.mark.gpu_if_present" not in texts[path]}


def test_a_dry_run_prints_the_commands_and_runs_none(project):
    status, output, record = run_gpu_tests(project, "--dry-run")
    assert (status, record) == (0, None)
    assert "GPU tests: 6, exclusive: 1" in output
    assert "--dist worksteal" in output
    assert not (project / "out").exists()


def test_a_suite_that_cannot_be_collected_is_an_error(project):
    (project / "tests" / "cuda" / "test_broken.py").write_text("import nothing_of_this_name")
    status, _, record = run_gpu_tests(project)
    assert (status, record) == (1, None)
