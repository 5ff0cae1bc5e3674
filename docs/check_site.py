"""python docs/check_site.py FOLDER: every link of the built site leads somewhere, and no other host is asked."""

from __future__ import annotations

import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit


class Page(HTMLParser):
    """What a page has (`anchors`), leads to (`links`) and loads (`resources`)."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.anchors: set[str] = set()
        self.links: list[str] = []
        self.resources: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Sort the addresses of a tag by what a browser does with them."""
        found = {name: value for name, value in attrs if value}
        self.anchors |= {found[name] for name in ("id", "name") if name in found}
        if tag == "a" and "href" in found:
            self.links.append(found["href"])
        if tag == "link" and found.get("rel") in ("stylesheet", "preload", "icon") and "href" in found:
            self.resources.append(found["href"])
        if tag in ("script", "img", "iframe", "source") and "src" in found:
            self.resources.append(found["src"])


def problems(site: Path) -> list[str]:
    """A line for each link that leads nowhere and each resource of another host."""
    pages = {path.resolve(): Page(path.read_text()) for path in sorted(site.rglob("*.html"))}
    found = []
    for path, page in pages.items():
        name = path.relative_to(site.resolve())
        for address in page.resources:
            parts = urlsplit(address)
            if parts.netloc:
                found.append(f"{name}: loads {address}")
            elif parts.scheme != "data" and not (path.parent / unquote(parts.path)).is_file():
                found.append(f"{name}: {address} is not there")
        for address in page.links:
            parts = urlsplit(address)
            if parts.scheme or parts.netloc:
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            if not target.is_file():
                found.append(f"{name}: {address} is not there")
            elif parts.fragment and target in pages and unquote(parts.fragment) not in pages[target].anchors:
                found.append(f"{name}: {address} has no such anchor")
    if not pages:
        found.append(f"{site}: expected a folder with HTML files")
    return found


if __name__ == "__main__":
    lines = problems(Path(sys.argv[1]))
    print("\n".join(lines))
    sys.exit(1 if lines else 0)
