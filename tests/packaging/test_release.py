"""What a release needs agrees: version, date and address; workflows, classifiers and tools."""

import configparser
import re
import shutil
from pathlib import Path

import pytest
import yaml

import cupy_msda
from tests.packaging.check_release import main, problems

ROOT = Path(__file__).parent.parent.parent
URL = "https://github.com/someone/cupy_msda"
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))


@pytest.fixture
def ready(tmp_path):
    """A tree that may be published: this one with a date and an address."""
    (tmp_path / "cupy_msda").mkdir()
    (tmp_path / "cupy_msda" / "version.py").write_text('__version__ = "0.1.0"\n')
    for name in ("setup.py", "CHANGELOG.md", "CITATION.cff"):
        shutil.copy(ROOT / name, tmp_path / name)
    change(tmp_path / "setup.py", r'^URL = ".*"', f'URL = "{URL}"')
    change(tmp_path / "CITATION.cff", r"^repository-code: .*", f"repository-code: {URL}")
    change(
        tmp_path / "CITATION.cff", r"^(date-released: .*\n)?version: .*", "date-released: 2026-12-01\nversion: 0.1.0"
    )
    change(tmp_path / "CHANGELOG.md", r"^## .*", "## 0.1.0, 2026-12-01")
    return tmp_path


def change(path, pattern, replacement):
    text, count = re.subn(pattern, replacement, path.read_text(), count=1, flags=re.MULTILINE)
    assert count == 1, f"{path.name} has no {pattern}"
    path.write_text(text)


def test_a_tree_that_is_ready_may_be_published(ready):
    assert list(problems("v0.1.0", URL, ready)) == []


@pytest.mark.parametrize(
    ("name", "pattern", "replacement", "message"),
    [
        ("cupy_msda/version.py", "0.1.0", "0.2.0", "the tag must be v0.2.0"),
        ("CHANGELOG.md", "0.1.0", "0.2.0", "CHANGELOG.md must begin with version 0.1.0"),
        ("CHANGELOG.md", "2026-12-01", "unreleased", "CHANGELOG.md must give the date"),
        ("CITATION.cff", "2026-12-01", "2026-12-02", "date-released in CITATION.cff must be 2026-12-01"),
        ("CITATION.cff", "^version: .*", "version: 0.2.0", "version in CITATION.cff must be 0.1.0"),
        ("CITATION.cff", URL, f"{URL}-old", "repository-code in CITATION.cff must be"),
        ("setup.py", "/someone/", "/OWNER/", "URL in setup.py must be the address"),
        ("setup.py", "/someone/", "/another/", f"URL in setup.py must be {URL}"),
    ],
)
def test_what_does_not_agree_is_named(ready, name, pattern, replacement, message):
    change(ready / name, pattern, replacement)
    assert any(line.startswith(message) for line in problems("v0.1.0", URL, ready))


def test_the_command_refuses_another_tag(capsys):
    assert main(["v0.0.9"]) == 1
    assert "the tag must be" in capsys.readouterr().out


def test_the_citation_is_of_this_version_and_address():
    tag = f"v{cupy_msda.__version__}"
    about = [line for line in problems(tag, None) if line.startswith(("the tag", "version in", "repository-code"))]
    assert not about


def jobs():
    for path in WORKFLOWS:
        for name, job in yaml.safe_load(path.read_text())["jobs"].items():
            yield path.name, name, job


def test_classifiers_name_the_pythons_of_the_workflows():
    tested = {
        str(entry["python"])
        for workflow, _, job in jobs()
        if workflow == "tests.yml"
        for entry in job.get("strategy", {}).get("matrix", {}).get("include", [])
    }
    options = configparser.ConfigParser()
    options.read(ROOT / "setup.cfg")
    named = set(re.findall(r"Python :: (3\.\d+)$", options["metadata"]["classifiers"], re.MULTILINE))
    assert named == tested
    assert options["options"]["python_requires"] == f">={min(named)}"


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_every_action_is_pinned_to_a_commit(path):
    uses = re.findall(r"uses: (.*)", path.read_text())
    assert uses
    assert all(re.fullmatch(r"[\w/-]+@[0-9a-f]{40} # v[\d.]+", action) for action in uses)


def test_every_path_and_module_of_a_workflow_exists():
    for workflow, name, job in jobs():
        for step in job["steps"]:
            words = step.get("run", "").split()
            paths = [word for word in words if word.startswith("tests/")]
            paths += [word.replace(".", "/") for word in words if re.fullmatch(r"tests(\.\w+)+", word)]
            missing = [path for path in paths if not any((ROOT / f"{path}{suffix}").exists() for suffix in ("", ".py"))]
            assert not missing, f"{workflow}, {name}: {missing}"
