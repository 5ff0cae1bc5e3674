"""Two builds of the source distribution and the wheel, for every test of what they contain."""

import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
TIME = 1_700_000_000


@dataclass(frozen=True)
class Distributions:
    """What one build made."""

    sdist: Path
    wheel: Path


def _copy_of_the_repository(folder: Path) -> None:
    """The files that git tracks or would track, with the permissions and times of now."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("needs a checkout of git, which says what belongs to the repository")
    for name in filter(None, listed.stdout.split("\0")):
        if (ROOT / name).exists():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes((ROOT / name).read_bytes())
            (folder / name).chmod(0o755 if os.access(ROOT / name, os.X_OK) else 0o644)


def _build(source: Path, out: Path, *options: str, environment: Mapping[str, str]) -> Distributions:
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), *options, str(source)]
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stdout + result.stderr
    return Distributions(next(out.glob("*.tar.gz")), next(out.glob("*.whl")))


@pytest.fixture(scope="session")
def builds(tmp_path_factory) -> tuple[Distributions, Distributions]:
    """The wheel by way of the source distribution, and in place, where an earlier build has left a file.

    The second one has other permissions, file times and locale.
    """
    environment = {**os.environ, "SOURCE_DATE_EPOCH": str(TIME)}
    first, second = tmp_path_factory.mktemp("first"), tmp_path_factory.mktemp("second")
    for folder in (first, second):
        _copy_of_the_repository(folder / "source")
    stale = second / "source" / "build" / "lib" / "cupy_msda" / "stale.py"
    stale.parent.mkdir(parents=True)
    stale.write_text("")
    for path in (second / "source").rglob("*"):
        path.chmod(path.stat().st_mode | 0o020)
        os.utime(path, (TIME - 86_400, TIME - 86_400))
    return (
        _build(first / "source", first / "dist", environment=environment),
        _build(second / "source", second / "dist", "--sdist", "--wheel", environment={**environment, "LC_ALL": "C"}),
    )
