"""python -m tests.packaging.check_release TAG [URL]: whether this tree may be published under a tag.

Version, tag, CHANGELOG.md and CITATION.cff have to agree, and the address has to be that of the repository.
"""

import argparse
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import yaml

ROOT = Path(__file__).parent.parent.parent


def found(pattern: str, *paths: Path) -> str:
    """The first group of the first line that matches."""
    text = "\n".join(path.read_text(encoding="utf-8") for path in paths)
    match = re.search(pattern, text, re.MULTILINE)
    if match is None:
        raise ValueError(f"{' or '.join(path.name for path in paths)} must have a line that matches {pattern}")
    return match[1]


def problems(tag: str, url: str | None, root: Path = ROOT) -> Iterator[str]:
    """What keeps the tree from being published, with what to change."""
    version = found(r'^__version__ = "(.*)"', *(root / "cupy_msda").glob("*.py"))
    address = found(r'^URL = "(.*)"', root / "setup.py")
    newest, date = found(r"^## (.*)", root / "CHANGELOG.md").split(", ")
    citation = yaml.safe_load((root / "CITATION.cff").read_text(encoding="utf-8"))
    if tag != f"v{version}":
        yield f"the tag must be v{version}, cupy_msda.__version__, got {tag}"
    if newest != version:
        yield f"CHANGELOG.md must begin with version {version}, got {newest}"
    if not re.fullmatch(r"\d{4}-\d\d-\d\d", date):
        yield f"CHANGELOG.md must give the date of {newest} as YYYY-MM-DD, got {date!r}"
    if str(citation["version"]) != version:
        yield f"version in CITATION.cff must be {version}, got {citation['version']}"
    if str(citation.get("date-released")) != date:
        yield f"date-released in CITATION.cff must be {date}, that of CHANGELOG.md, got {citation.get('date-released')}"
    if citation["repository-code"] != address:
        yield f"repository-code in CITATION.cff must be {address}, URL in setup.py, got {citation['repository-code']}"
    if "/OWNER/" in address:
        yield f"URL in setup.py must be the address of the repository, got the placeholder {address}"
    elif url is not None and address != url:
        yield f"URL in setup.py must be {url}, where this runs, got {address}"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.packaging.check_release", description=__doc__)
    parser.add_argument("tag", help="v and the version")
    parser.add_argument("url", nargs="?", help="address of the repository that publishes")
    options = parser.parse_args(arguments)
    lines = list(problems(options.tag, options.url))
    print("\n".join(lines) or f"{options.tag} may be published")
    return bool(lines)


if __name__ == "__main__":
    sys.exit(main())
