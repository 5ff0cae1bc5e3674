"""The README fits on a page, its snippets run on their own, and it says what other files say."""

import re
import warnings
from pathlib import Path

import pytest

from cupy_msda.cuda import gpu
from tests.helpers import pages

README = pages.ROOT / "README.md"
INSTALL = pages.ROOT / "docs" / "install.md"
SNIPPETS = pages.snippets(README)


def test_it_has_at_most_120_lines():
    assert len(README.read_text().splitlines()) <= 120


def test_it_has_a_snippet_of_each_kind():
    kinds = ("import numpy", "MSDeformAttn", "cupy_msda.torch.patch", "import jax")
    assert len(SNIPPETS) == len(kinds)
    assert all(kind in snippet for kind, snippet in zip(kinds, SNIPPETS, strict=True))


@pytest.mark.parametrize("snippet", SNIPPETS)
def test_a_snippet_runs_on_its_own(snippet):
    for name in ("torch", "transformers", "jax"):
        if f"import {name}" in snippet or f"from {name}" in snippet:
            pytest.importorskip(name)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="cupy_msda")
        exec(compile(snippet, str(README), "exec"), {})


def test_its_commands_are_those_that_ci_reads():
    demo, tests = (pages.command_after(README, marker) for marker in ("demo", "tests"))
    assert demo.startswith("python3 -m venv")
    assert demo.endswith("python -m cupy_msda demo")
    assert "pytest" in tests
    assert demo in INSTALL.read_text()
    assert tests in INSTALL.read_text()


def test_links_what_a_reader_needs():
    linked = {path.resolve().relative_to(pages.ROOT).as_posix() for path, _ in pages.links(README)}
    guides = {"numpy", "torch", "models", "jax", "migrating", "deployment", "several_gpus", "tuning", "troubleshooting"}
    assert {f"docs/{name}.md" for name in guides} | {"CONTRIBUTING.md", "CHANGELOG.md", "docs/demo.jpg"} <= linked


@pytest.mark.parametrize("page", [README, INSTALL], ids=lambda page: page.name)
def test_it_quotes_what_an_old_gpu_gets(page):
    said = re.sub(r"\s+", " ", page.read_text().replace("\n>", ""))
    assert gpu.refusal(61, 13) in said


@pytest.mark.parametrize("page", [README, INSTALL], ids=lambda page: page.name)
def test_it_names_the_versions_of_setup_cfg(page):
    setup, text = (pages.ROOT / "setup.cfg").read_text(), page.read_text()
    for package, name in {"numpy": "NumPy", "torch": "torch", "cupy-cuda13x": "CuPy", "cupy-cuda12x": "CuPy"}.items():
        oldest = re.search(rf"^ +{package}>=(\S+)", setup, re.MULTILINE)[1]
        assert f"{oldest} or newer" in text, f"{name} {oldest}"
    oldest, too_new = re.search(r"^ +jax>=([\d.]+),<0\.(\d+)$", setup, re.MULTILINE).groups()
    assert f"{oldest} to 0.{int(too_new) - 1}" in text
    python = re.search(r"^python_requires = >=(\S+)", setup, re.MULTILINE)[1]
    assert f"{python} to " in text


def test_it_names_every_architecture_that_is_compiled():
    listed = [f"{number / 10:.1f}" for number in sorted(gpu.ARCHITECTURES)]
    text = f"{', '.join(listed[:-1])} and {listed[-1]}"
    for page in (README, INSTALL):
        assert text in re.sub(r"\s+", " ", page.read_text()), page.name


def test_the_site_and_the_workflow_build_in_one_way():
    ci = (pages.ROOT / ".ci" / "run").read_text()
    assert ".ci/docs" in ci
    assert Path(pages.ROOT / ".ci" / "docs").stat().st_mode & 0o111
