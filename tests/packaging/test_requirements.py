"""Commands that install something work in a checkout: the package is on no index before its release."""

import configparser
import json
import re

import pytest

from cupy_msda import arrays
from cupy_msda.cli import photograph
from cupy_msda.requirements import REQUIREMENTS, install, quoted
from tests.helpers import pages

INSTALL = pages.DOCS / "install.md"
SOURCES = sorted((pages.ROOT / "cupy_msda").rglob("*.py"))
NOTEBOOKS = sorted((pages.ROOT / "notebooks").glob("*.ipynb"))
PAGES = [*pages.ROOT.glob("*.md"), *pages.DOCS.rglob("*.md")]
# `pip install` of this package by its name, or its name with an extra.
BY_NAME = re.compile(r"pip install (-\w+ )*['\"]?cupy[-_]msda|cupy-msda\[")


def extras():
    setup = configparser.ConfigParser()
    setup.read(pages.ROOT / "setup.cfg")
    return {name: text.split() for name, text in setup["options.extras_require"].items()}


@pytest.mark.parametrize("distribution", REQUIREMENTS)
def test_a_requirement_is_that_of_an_extra(distribution):
    of_users = ("cuda12", "cuda13", "cpu", "torch", "jax", "demo")
    named = [line for extra in (*of_users, "test") for line in extras()[extra]]
    assert REQUIREMENTS[distribution] in named


@pytest.mark.parametrize("extra", ["cuda12", "cuda13", "cpu", "torch", "jax", "demo"])
def test_what_an_extra_installs_is_known(extra):
    assert {*extras()[extra]} - {"tqdm"} <= {*REQUIREMENTS.values()}


def test_the_command_for_cupy_installs_what_its_extra_does():
    of_cuda13, of_cuda12 = arrays.INSTALL_CUPY.split(" (with a driver older than 580: ")
    assert {*of_cuda13.replace("'", "").split()[2:]} == {*extras()["cuda13"]} - {"tqdm"}
    assert {*of_cuda12.rstrip(")").replace("'", "").split()} == {*extras()["cuda12"]} - {"tqdm"}


def test_a_shell_reads_a_requirement_as_one_word():
    assert install("jax") == "pip install 'jax>=0.6,<0.12'"
    assert quoted("nvidia-cuda-nvrtc-cu12") == "nvidia-cuda-nvrtc-cu12"
    assert photograph.INSTALL_DEMO == "pip install 'pillow>=10' 'matplotlib>=3.8'"


@pytest.mark.parametrize("path", [*SOURCES, *NOTEBOOKS, *PAGES], ids=lambda path: str(path.relative_to(pages.ROOT)))
def test_only_one_page_installs_the_package_by_its_name(path):
    text = path.read_text()
    if path.suffix == ".ipynb":
        text = "\n".join("".join(cell["source"]) for cell in json.loads(text)["cells"])
    assert path == INSTALL or not BY_NAME.search(text)
    if path.suffix == ".py":
        literal = re.findall(r"pip install '?(\w+)", text)
        assert not {name for name in literal if name in REQUIREMENTS}, "cupy_msda.requirements has its range"


def test_that_page_says_from_when_on_this_works():
    before, found, after = INSTALL.read_text().partition("From the release on")
    assert found
    assert not BY_NAME.search(before)
    assert "pip install 'cupy-msda[torch,cuda13]'" in after.partition("\n\n")[0].replace("\n", " ")
