"""A page of one file, parsed: nothing outside of it, nothing that runs."""

from __future__ import annotations

from html.parser import HTMLParser


class Page(HTMLParser):
    """The parts of a page; fails where elements are not closed in order."""

    EMPTY = frozenset({"meta", "img", "br", "use", "path"})

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open, self.tags, self.words, self.sources = [], [], [], []
        self.feed(page)
        assert self.open == [], "all elements are closed"

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.sources += [v for k, v in attributes if k in ("src", "href", "srcset", "xlink:href")]
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        self.handle_endtag(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open[-1:] != ["style"]:
            self.words.append(data.strip())


def check_page(path) -> Page:
    """Parses a page and holds what all pages must be."""
    page = path.read_text()
    found = Page(page)
    assert page.startswith("<!doctype html>")
    assert "script" not in found.tags
    assert "@import" not in page
    assert "http" not in "".join(found.sources)
    assert all(source.startswith(("data:image/png;base64,", "#")) for source in found.sources)
    assert "url(http" not in page
    assert 'name="viewport"' in page
    assert "prefers-color-scheme: dark" in page
    assert "@media print" in page
    assert found.tags.count("h1") == 1
    return found
