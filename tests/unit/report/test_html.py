"""Pages of one file: nothing outside of them, nothing that runs, and plain text stays plain."""

from __future__ import annotations

import pytest
from html_page import check_page
from PIL import Image

from fd_large.report import html, style


def test_a_page_of_everything(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    figure = style.new_figure(4, 2)
    figure.subplots().plot([0, 1], color=style.BLUE)
    path = html.write(
        tmp_path / "page.html",
        "<b>runs & co</b>",
        (
            html.tiles([("loss", "0.1", "<i>")]),
            html.section("Empty", "", ""),
            html.section("Numbers", html.table([("a", 1.5), ("b<c", 2)], head=("what", "value"))),
            html.section("Names", html.table([("a", "b")])),
            html.section("Curves", html.charts([html.chart(figure, "x", "y & z")])),
            html.section("Pictures", html.picture(tmp_path / "a.png", 'a "picture"', "below")),
            html.commands([("why", "cmd 'a b' && c")]),
        ),
        beside=html.status("done", good=True),
        below="a < b",
    )
    page = check_page(path)
    for words in ("<b>runs & co</b>", "<i>", "b<c", "a < b", "below"):
        assert words in page.words
    assert "cmd 'a b' && c" in " ".join(filter(None, page.words))
    assert "Empty" not in page.words, "no heading without what it heads"
    text = path.read_text()
    assert "var(--blue)" in text, "curves take the colours of the page"
    assert style.BLUE not in text.partition("</style>")[2]
    assert '<td class="number">1.5' in text
    assert '<th scope="row">a' in text


def test_a_picture_that_is_too_large_or_gone(tmp_path, monkeypatch):
    assert html.picture(tmp_path / "gone.png", "x") == ""
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    monkeypatch.setattr(html, "MOST_BYTES", 10)
    assert "too large" in html.picture(tmp_path / "a.png", "x")
    assert "base64" not in html.picture(tmp_path / "a.png", "x")


def test_a_page_is_whole_or_the_old_one(tmp_path):
    path = html.write(tmp_path / "page.html", "old", ())

    def parts():
        yield "new"
        raise OSError("no room")

    with pytest.raises(OSError, match="no room"):
        html.write(path, "new", parts())
    assert "old" in path.read_text()
    assert [p.name for p in tmp_path.iterdir()] == ["page.html"]
