"""The notebooks run from top to bottom, and are committed with all outputs of such a run."""

import runpy

import pytest

from tests.helpers import pages

nbformat = pytest.importorskip("nbformat")
pytest.importorskip("nbclient")

NOTEBOOKS = sorted(pages.ROOT.glob("notebooks/*.ipynb"))
READABLE_IN_TEN_MINUTES = 160  # lines of code


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_runs(path):
    notebook = runpy.run_path(str(pages.DOCS / "execute_notebooks.py"))["executed"](path)
    assert images_of(notebook) >= 2


def images_of(notebook):
    return sum("image/png" in output.get("data", {}) for cell in notebook.cells for output in cell.get("outputs", []))


@pytest.fixture(params=NOTEBOOKS, ids=lambda path: path.stem)
def committed(request):
    return nbformat.read(request.param, as_version=4)


def test_every_cell_has_been_run_in_order(committed):
    counts = [cell.execution_count for cell in committed.cells if cell.cell_type == "code"]
    assert counts == list(range(1, len(counts) + 1))
    assert committed.metadata.kernelspec.name == "python3"


def test_every_figure_is_there(committed):
    shown = sum("plt.show()" in cell.source for cell in committed.cells if cell.cell_type == "code")
    assert images_of(committed) == shown >= 2


def test_there_are_no_warnings_or_errors(committed):
    for cell in committed.cells:
        for output in cell.get("outputs", []):
            assert output.output_type != "error"
            assert output.get("name") != "stderr", output.text


def test_it_is_short(committed):
    lines = sum(len(cell.source.splitlines()) for cell in committed.cells if cell.cell_type == "code")
    assert lines <= READABLE_IN_TEN_MINUTES


def test_links_of_its_text_lead_somewhere(committed):
    for cell in committed.cells:
        if cell.cell_type == "markdown":
            for path, anchor in pages.links_in(cell.source, pages.ROOT / "notebooks" / "any.ipynb"):
                assert path.exists(), path
                assert not anchor or anchor in pages.anchors(path)
