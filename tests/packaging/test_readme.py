"""The README's snippets run in their order, and every link between files of the repository leads somewhere."""

import re
from pathlib import Path

import pytest

from tests.helpers import backends

ROOT = Path(__file__).parent.parent.parent
README = ROOT / "README.md"
SNIPPETS = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
PAGES = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]
SOURCES = [path for folder in ("cupy_msda", "cuda_src") for path in (ROOT / folder).rglob("*.*") if path.is_file()]


@pytest.mark.gpu_if_present
def test_snippets_run():
    assert len(SNIPPETS) == 9
    names = {}
    for snippet in SNIPPETS:
        if "import cupy\n" in snippet and not backends.GPU:
            continue
        exec(compile(snippet, str(README), "exec"), names)
    assert names["output"].shape == (2, 100, 256)
    assert names["value"].grad is not None
    names["extension"].uninstall()


def anchors_of(page):
    """GitHub's anchors of the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def links_of(page):
    """(file, anchor or '') of each link of a page that stays in the repository."""
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if not re.match(r"https?:|mailto:", target):
            name, _, anchor = target.partition("#")
            yield (page.parent / name if name else page), anchor


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_of_a_page_lead_somewhere(page):
    for path, anchor in links_of(page):
        assert path.exists(), path
        assert not anchor or anchor in anchors_of(path), f"{path.name}#{anchor}"


def test_readme_links_what_a_reader_needs():
    linked = {path.resolve().relative_to(ROOT).as_posix() for path, _ in links_of(README)}
    plots = {f"benchmarks/results/{name}.png" for name in ("benchmark", "backward", "fused", "models", "overhead")}
    plots |= {f"benchmarks/results/{name}.png" for name in ("detector", "scaling")}
    assert {"CONTRIBUTING.md", "CHANGELOG.md", "docs/demo.jpg"} | plots <= linked
    assert (ROOT / "LICENSE").is_file()


def test_links_of_sources_lead_to_headings():
    links = [
        (path.name, page, anchor)
        for path in SOURCES
        if path.suffix in (".py", ".cu", ".cuh")
        for page, anchor in re.findall(r"(docs/[\w/]+\.md)(?:#([\w-]+))?", path.read_text())
    ]
    assert len(links) > 10
    anchors = {page: anchors_of(ROOT / page) | {""} for page in {page for _, page, _ in links}}
    broken = [f"{source}: {page}#{anchor}" for source, page, anchor in links if anchor not in anchors[page]]
    assert not broken
