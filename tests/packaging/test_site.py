"""The check of the built site finds links that lead nowhere and what other hosts would have to send."""

import runpy

import pytest

from tests.helpers import pages

problems = runpy.run_path(str(pages.DOCS / "check_site.py"))["problems"]
GOOD = '<a href="other.html#here">x</a><a href="https://host/">x</a><img src="a%20b.svg"><script src="own.js"></script>'


@pytest.fixture
def site(tmp_path):
    (tmp_path / "index.html").write_text(GOOD)
    (tmp_path / "other.html").write_text('<h1 id="here">x</h1><a href="#here">x</a>')
    (tmp_path / "a b.svg").touch()
    (tmp_path / "own.js").touch()
    return tmp_path


def test_a_good_site_has_no_problems(site):
    assert problems(site) == []


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ('<a href="none.html">x</a>', "none.html is not there"),
        ('<a href="other.html#there">x</a>', "other.html#there has no such anchor"),
        ('<a href="#there">x</a>', "#there has no such anchor"),
        ('<img src="none.png">', "none.png is not there"),
        ('<script src="https://host/a.js"></script>', "loads https://host/a.js"),
        ('<link rel="stylesheet" href="//host/a.css">', "loads //host/a.css"),
    ],
)
def test_a_problem_is_named(site, wrong, words):
    (site / "index.html").write_text(GOOD + wrong)
    assert problems(site) == [f"index.html: {words}"]


def test_an_empty_folder_is_a_problem(tmp_path):
    (line,) = problems(tmp_path)
    assert "expected a folder with HTML files" in line


def test_the_drawings_are_what_their_script_draws():
    draw = runpy.run_path(str(pages.DOCS / "figures" / "draw.py"))
    files = {path.stem: path.read_text() for path in (pages.DOCS / "figures").glob("*.svg")}
    assert files == {function.__name__: function().svg() for function in draw["DRAWINGS"]}
