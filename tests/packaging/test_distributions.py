"""The source distribution is the repository, the wheel is the package, and both have the same bytes on every build."""

import email
import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
MODULES = {str(path.relative_to(ROOT)) for path in (ROOT / "cupy_msda").rglob("*.py")}
SOURCES = {f"cupy_msda/{path.relative_to(ROOT)}" for path in (ROOT / "cuda_src").rglob("*.*")}
GOLDEN = {f"cupy_msda/golden_cases/{path.name}" for path in (ROOT / "tests" / "golden").glob("*.npz")}
# The package of golden cases is their folder, with the command that makes them.
COMMANDS = {f"cupy_msda/golden_cases/{path.name}" for path in (ROOT / "tests" / "golden").glob("*.py")}
DATA = {"cupy_msda/py.typed", "cupy_msda/data/chelsea.jpg", "cupy_msda/data/README.md"}


def entries_of_sdist(build):
    with tarfile.open(build.sdist) as archive:
        return archive.getmembers()


def entries_of_wheel(build):
    with zipfile.ZipFile(build.wheel) as archive:
        return archive.infolist()


def names_in_wheel(build):
    return {entry.filename for entry in entries_of_wheel(build)}


@pytest.fixture(scope="module")
def metadata(builds):
    name = next(name for name in names_in_wheel(builds[0]) if name.endswith(".dist-info/METADATA"))
    with zipfile.ZipFile(builds[0].wheel) as archive:
        return email.message_from_bytes(archive.read(name))


@pytest.mark.parametrize("kind", ["sdist", "wheel"])
def test_two_builds_have_the_same_bytes(builds, kind):
    first, second = (getattr(build, kind) for build in builds)
    assert first.name == second.name
    assert first.read_bytes() == second.read_bytes()


def test_the_times_in_both_are_those_of_the_environment(builds):
    assert {entry.mtime for entry in entries_of_sdist(builds[0])} == {1_700_000_000}
    assert {entry.date_time[:3] for entry in entries_of_wheel(builds[0])} == {(2023, 11, 14)}


def test_the_source_distribution_is_the_repository(builds):
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    tracked = {name for name in listed if (ROOT / name).exists()}
    packed = {entry.name.partition("/")[2] for entry in entries_of_sdist(builds[1]) if entry.isfile()}
    made = {name for name in packed if name == "PKG-INFO" or name.startswith("cupy_msda.egg-info/")}
    assert packed - made == tracked


def test_the_wheel_is_the_package_and_nothing_else(builds):
    names = {name for name in names_in_wheel(builds[0]) if ".dist-info/" not in name}
    assert names == MODULES | SOURCES | GOLDEN | COMMANDS | DATA
    assert len(SOURCES) > 20
    assert len(GOLDEN) == 5


def test_the_wheel_has_no_file_of_an_earlier_build(builds):
    assert "cupy_msda/stale.py" not in names_in_wheel(builds[1])
    assert "cupy_msda/api.py" in names_in_wheel(builds[1])


def test_the_page_on_pypi_has_no_relative_link(metadata):
    links = re.findall(r"\]\(([^)\s]+)\)", metadata.get_payload())
    assert len(links) > 10
    assert all(re.match(r"https://|#", link) for link in links)


def test_pictures_on_pypi_are_files_and_other_links_are_pages(metadata):
    page = metadata.get_payload()
    assert re.search(r"!\[[^\]]*\]\(https://[^)]+/raw/v[^)]+\.(jpg|png)\)", page)
    assert re.search(r"(?<!!)\[[^\]]*\]\(https://[^)]+/blob/v[^)]+\.md", page)
    assert not re.search(r"!\[[^\]]*\]\([^)]+/blob/", page)


def test_metadata_names_author_license_and_addresses(metadata):
    assert metadata["Author"] == "cupy_msda contributors"
    assert metadata["License-Expression"] == "Apache-2.0"
    urls = dict(entry.split(", ") for entry in metadata.get_all("Project-URL"))
    assert set(urls) == {"Source", "Documentation", "Changelog", "Issues"}
    assert all(url.startswith(urls["Source"]) for url in urls.values())


def test_twine_finds_nothing_wrong(builds):
    pytest.importorskip("twine")
    command = [sys.executable, "-m", "twine", "check", "--strict", builds[0].sdist, builds[0].wheel]
    result = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
