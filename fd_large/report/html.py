"""Writes self-contained HTML pages, with embedded style and plots and without scripts.

The pages are readable in light and dark mode, on a phone and on paper. `page.html` has the macros
for the parts of a page, and `page.css` their style. jinja2 escapes all texts.
"""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from markupsafe import Markup, escape

from fd_large.errors import without_secrets
from fd_large.files import kind_of, replacing
from fd_large.report import style

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MOST_BYTES = 4_000_000
"""Size in bytes above which a PNG is not embedded in a page."""

_COLOURS = {
    style.BLUE: "blue",
    style.VERMILLION: "vermillion",
    style.GREEN: "green",
    style.GREY: "muted",
    style.LIGHT_GREY: "line",
    "#000000": "ink",
}


def write(
    path: Path, title: str, parts: Iterable[str], *, beside: str = "", below: str = ""
) -> Path:
    """Writes a page atomically; returns the page's path.

    Args:
        path: The file.
        title: Title, plain text.
        parts: The parts of the page in order, HTML.
        beside: HTML beside the title.
        below: Plain text below the title.
    """
    css = Markup(Path(__file__).with_name("page.css").read_text(encoding="utf-8"))
    page = _parts().page(title, beside, below, list(filter(None, parts)), css)
    with replacing(path) as aside:
        aside.write_text(page + "\n", encoding="utf-8", errors="backslashreplace")
    return path


def text(value: object) -> str:
    """Returns the text of `value`, escaped for HTML, with secrets in URLs masked."""
    return escape(without_secrets(str(value)))


def status(words: str, *, good: bool | None) -> str:
    """Returns words as HTML, in the colour of good or bad news.

    Args:
        words: Plain text.
        good: Whether the news is good; None for a neutral colour.
    """
    return _parts().status(words, {True: "good", False: "bad", None: ""}[good])


def section(heading: str, *parts: str) -> str:
    """Returns the HTML of a section, or "" if all parts are "".

    Args:
        heading: Heading of the section, plain text.
        *parts: The parts of the section, HTML; "" for a part that is left out.
    """
    inside = list(filter(None, parts))
    return _parts().section(heading, inside) if inside else ""


def paragraph(words: str) -> str:
    """Returns the plain text `words` as an HTML paragraph."""
    return _parts().paragraph(words)


def tiles(figures: Iterable[tuple[str, str, str]]) -> str:
    """Returns the HTML of tiles with the most important numbers.

    Args:
        figures: The label, the value and a note of each tile.
    """
    return _parts().tiles(figures)


def table(
    rows: Sequence[Sequence[object]], *, head: Sequence[str] = (), right: Sequence[bool] = ()
) -> str:
    """Returns the HTML of a table, or "" without rows.

    Args:
        rows: The cells, row by row.
        head: Headings of the columns; if empty, the first column is the heading of the rows.
        right: Whether each column is right-aligned; if empty, columns of numbers are.
    """
    if not rows:
        return ""
    numeric = right or [all(_is_number(row[n]) for row in rows) for n in range(len(rows[0]))]
    return _parts().table(rows, head, numeric)


def commands(steps: Iterable[tuple[str, str]]) -> str:
    """Returns the HTML of commands for copying, each with its reason.

    Args:
        steps: Pairs (reason, command).
    """
    return _parts().commands(steps)


def picture(path: Path, alt: str, caption: str = "") -> str:
    """Returns the HTML of an embedded PNG, or "" if the file does not exist.

    Args:
        path: The PNG. If it has more than `MOST_BYTES` bytes, the result is a line with its name.
        alt: Description of the picture.
        caption: Text below the picture; "" for none.
    """
    if kind_of(path) != "file":
        return ""
    if path.stat().st_size > MOST_BYTES:
        return paragraph(f"{alt}: {path.name}, in the same folder, is too large for this page.")
    data = path.read_bytes()
    width = int.from_bytes(data[16:20], "big")
    return _parts().picture(base64.b64encode(data).decode(), alt, caption, width > 1300)


def chart(figure: Figure, name: str, alt: str) -> str:
    """Returns the HTML of a plot as an SVG in the colours of the page.

    Args:
        figure: The plot.
        name: Name that is unique on the page.
        alt: Description of the plot.
    """
    import matplotlib

    buffer = io.StringIO()
    figure.patch.set_alpha(0)
    for axes in figure.axes:
        axes.patch.set_alpha(0)
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        figure.savefig(buffer, format="svg", metadata=nothing)
    drawn = buffer.getvalue()
    drawn = drawn[drawn.index("<svg") :]
    drawn = re.sub(r"<metadata>.*?</metadata>", "", drawn, flags=re.DOTALL)
    drawn = re.sub(
        r' id="(?:figure|axes|patch|line2d|text|matplotlib|legend|xtick|ytick)[^"]*"', "", drawn
    )
    drawn = re.sub(r"'DejaVu Sans'[^;\"]*", "system-ui, sans-serif", drawn)
    for colour, variable in _COLOURS.items():
        drawn = re.sub(re.escape(colour), f"var(--{variable})", drawn, flags=re.IGNORECASE)
    # Text without a colour of its own is black.
    drawn = drawn.replace(
        "<svg ", f'<svg role="img" aria-label="{text(alt)}" fill="var(--ink)" ', 1
    )
    return _parts().chart(Markup(drawn))


def charts(drawn: Iterable[str]) -> str:
    """Returns the HTML of plots side by side, or "" without plots.

    Args:
        drawn: The plots, as `chart` returns them.
    """
    shown = list(drawn)
    return _parts().charts(shown) if shown else ""


@cache
def _parts() -> Any:
    """Returns the template page.html as an object whose functions are its macros."""
    from jinja2 import Environment, FileSystemLoader

    def plain(value: Any) -> Any:
        return value if isinstance(value, Markup) else without_secrets(str(value))

    folder = FileSystemLoader(Path(__file__).parent)
    return (
        Environment(loader=folder, autoescape=True, finalize=plain).get_template("page.html").module
    )


def _is_number(cell: object) -> bool:
    if isinstance(cell, (int, float)):
        return True
    return bool(re.fullmatch(r"[-+]?[\d.,]+(e[-+]?\d+)?( ?(%|px|M|GB))?|none|", str(cell)))
