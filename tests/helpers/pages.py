"""What the tests read out of the pages of the documentation."""

import re
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
DOCS = ROOT / "docs"


def snippets(page, *, gpu=False):
    """The Python snippets of a page that run, in their order.

    A comment above a snippet may say `before`: code that the reader replaces; or `needs a GPU`.
    """
    found = re.findall(r"^(?:<!-- ([\w ]+) -->\n)?```python\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)
    skipped = ("before",) if gpu else ("before", "needs a GPU")
    assert {comment for comment, _ in found} <= {"", "before", "needs a GPU"}, page
    return [snippet for comment, snippet in found if comment not in skipped]


def command_after(page, marker):
    """The first line of the code block after a comment."""
    return re.search(rf"^<!-- {marker} -->\n```sh\n(.*)$", page.read_text(), re.MULTILINE)[1]


def anchors(page):
    """GitHub's anchors of the headings of a page, which the site has too."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def links(page):
    """(file, anchor or '') of each link of a page that stays in the repository."""
    return links_in(page.read_text(), page)


def links_in(text, page):
    """The same of a text, as a part of this page."""
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if not re.match(r"https?:|mailto:", target):
            name, _, anchor = target.partition("#")
            yield (page.parent / name if name else page), anchor


def table(page, heading):
    """The cells of the rows of the first table under a heading."""
    _, _, rest = page.read_text().partition(f"{heading}\n")
    rows = re.search(r"^\|.*?(?=\n\n|\Z)", rest, re.DOTALL | re.MULTILINE)[0].splitlines()
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in rows[2:]]
