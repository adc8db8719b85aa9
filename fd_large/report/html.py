"""Pages of one file: style and pictures are inside, nothing is loaded and nothing runs.

Readable in light and dark, on a phone and on paper. What comes from files is escaped.
"""

from __future__ import annotations

import base64
import html
import io
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from fd_large.errors import without_secrets
from fd_large.files import kind_of, replacing
from fd_large.report import style

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MOST_BYTES = 4_000_000
"""A larger picture stays outside of the page."""

_COLOURS = {
    style.BLUE: "blue",
    style.VERMILLION: "vermillion",
    style.GREEN: "green",
    style.GREY: "muted",
    style.LIGHT_GREY: "line",
    "#000000": "ink",
}

_CSS = """
:root { color-scheme: light dark; --ground: #f6f6f3; --card: #ffffff; --ink: #1d2024;
  --muted: #5f5f5f; --line: #dedfdb; --blue: #0072b2; --vermillion: #c65300; --green: #00805e;
  --mat: #ffffff; }
@media (prefers-color-scheme: dark) { :root { --ground: #131518; --card: #1c1f24; --ink: #e8e9ea;
  --muted: #a2a6ac; --line: #353a42; --blue: #58b4ee; --vermillion: #f08a4b; --green: #3fc79b;
  --mat: #ffffff; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--ground); color: var(--ink);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
main { max-width: 68rem; margin: 0 auto; padding: 2rem 1.25rem 4rem; }
header { margin-bottom: 1.5rem; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0 0 .35rem; overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; margin: 2.5rem 0 .8rem; }
h3 { font-size: .95rem; margin: 0 0 .35rem; font-weight: 600; }
p { margin: .4rem 0; max-width: 46rem; overflow-wrap: anywhere; }
.quiet { color: var(--muted); }
.status { display: inline-block; padding: .05rem .65rem; border-radius: 1rem; font-size: .85rem;
  font-weight: 600; color: var(--card); background: var(--muted); vertical-align: .2em;
  margin-left: .35rem; }
.status.good { background: var(--green); } .status.bad { background: var(--vermillion); }
.tiles { display: grid; gap: .8rem; grid-template-columns: repeat(auto-fill, minmax(9.6rem, 1fr)); }
.tile, .card { background: var(--card); border: 1px solid var(--line); border-radius: .6rem;
  padding: .85rem 1rem; min-width: 0; }
.tile b { display: block; font-size: 1.35rem; line-height: 1.25; font-weight: 600;
  font-variant-numeric: tabular-nums; overflow-wrap: anywhere; }
.tile span { color: var(--muted); font-size: .85rem; display: block; }
.charts { display: grid; gap: .8rem;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, 25rem), 1fr)); }
.card svg { display: block; width: 100%; height: auto; }
figure { margin: 0 0 1.2rem; max-width: 52rem; }
figure .mat { background: var(--mat); border: 1px solid var(--line); border-radius: .6rem;
  padding: .6rem; overflow-x: auto; }
figure img { display: block; max-width: 100%; height: auto; margin: 0 auto; }
figcaption { color: var(--muted); font-size: .9rem; margin-top: .4rem; max-width: 46rem; }
.scroll { overflow-x: auto; background: var(--card); border: 1px solid var(--line);
  border-radius: .6rem; }
table { border-collapse: collapse; width: 100%; font-size: .92rem; }
th, td { text-align: left; vertical-align: top; padding: .45rem .9rem;
  border-bottom: 1px solid var(--line); overflow-wrap: anywhere; }
tr:last-child > * { border-bottom: 0; }
th { color: var(--muted); font-weight: 500; overflow-wrap: normal; }
td.number { font-variant-numeric: tabular-nums;
  text-align: right; white-space: nowrap; } th.number { text-align: right; }
code, pre { font: .88em/1.5 ui-monospace, "SF Mono", Menlo, Consolas, monospace; }
pre { background: var(--card); border: 1px solid var(--line); border-radius: .6rem; margin: .3rem 0
  1rem; padding: .7rem .9rem; white-space: pre-wrap; overflow-wrap: anywhere; }
@media (max-width: 40rem) { main { padding: 1.2rem .8rem 3rem; } h1 { font-size: 1.35rem; }
  th, td { padding: .4rem .6rem; } figure img.wide { max-width: none; width: 40rem; } }
@media print { :root { --ground: #fff; --card: #fff; --ink: #000; --muted: #444; --line: #bbb;
  --blue: #0072b2; --vermillion: #c65300; --green: #00805e; --mat: #fff; }
  html { font-size: 13px; } body { font-size: 1rem; } main { max-width: none; padding: 0; }
  h2, h3 { break-after: avoid; } .charts { grid-template-columns: 1fr 1fr; }
  .card, .tile, figure, tr, pre { break-inside: avoid; } .scroll, figure .mat { overflow: visible; }
  figure img, figure img.wide { max-width: 100%; max-height: 20cm; width: auto; }
  td:first-child { overflow-wrap: break-word; } }
"""


def write(
    path: Path, title: str, parts: Iterable[str], *, beside: str = "", below: str = ""
) -> Path:
    """Writes a page, whole or not at all; returns its path.

    Args:
        path: The file.
        title: Plain text.
        parts: HTML, one below the other.
        beside: HTML beside the title.
        below: Plain text below it.
    """
    body = "\n".join(part for part in parts if part)
    quiet = f'<p class="quiet">{text(below)}</p>' if below else ""
    page = (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{text(title)}</title>\n<style>{_CSS}</style>\n</head>\n<body>\n<main>\n"
        f"<header><h1>{text(title)}{beside}</h1>{quiet}</header>\n{body}\n</main>\n</body>\n</html>\n"
    )
    with replacing(path) as aside:
        aside.write_text(page, encoding="utf-8", errors="backslashreplace")
    return path


def text(value: object) -> str:
    """Returns plain text as HTML, without the secrets of URLs in it."""
    return html.escape(without_secrets(str(value)))


def status(words: str, *, good: bool | None) -> str:
    """Returns a coloured word; None: neither good nor bad."""
    kind = {True: " good", False: " bad", None: ""}[good]
    return f' <span class="status{kind}">{text(words)}</span>'


def section(heading: str, *parts: str) -> str:
    """Returns parts under a heading; nothing where all of them are empty."""
    inside = "\n".join(part for part in parts if part)
    return f"<section>\n<h2>{text(heading)}</h2>\n{inside}\n</section>" if inside else ""


def paragraph(words: str) -> str:
    """Returns plain text as a paragraph."""
    return f"<p>{text(words)}</p>"


def tiles(figures: Iterable[tuple[str, str, str]]) -> str:
    """Returns the most important figures: (what, value, more)."""
    inside = "".join(
        f'<div class="tile"><span>{text(what)}</span><b>{text(value)}</b>'
        f"<span>{text(more)}</span></div>"
        for what, value, more in figures
    )
    return f'<div class="tiles">{inside}</div>'


def table(
    rows: Sequence[Sequence[object]], *, head: Sequence[str] = (), right: Sequence[bool] = ()
) -> str:
    """Returns a table; without a head the first column names the rows.

    Args:
        rows: Its cells.
        head: What stands above the columns.
        right: Whether each column stands right; empty: where it holds numbers alone.
    """
    if not rows:
        return ""
    numeric = right or [all(_is_number(row[n]) for row in rows) for n in range(len(rows[0]))]
    kind = ['class="number"' if is_number else "" for is_number in numeric]
    lines = []
    if head:
        cells = (f'<th scope="col" {k}>{text(h)}</th>' for h, k in zip(head, kind, strict=True))
        lines.append(f"<tr>{''.join(cells)}</tr>")
    for row in rows:
        cells = [f"<td {k}>{text(cell)}</td>" for cell, k in zip(row, kind, strict=True)]
        if not head:
            cells[0] = f'<th scope="row">{text(row[0])}</th>'
        lines.append(f"<tr>{''.join(cells)}</tr>")
    return f'<div class="scroll"><table>{"".join(lines)}</table></div>'.replace(" >", ">")


def commands(steps: Iterable[tuple[str, str]]) -> str:
    """Returns commands to paste: (why, command)."""
    return "\n".join(f"<h3>{text(why)}</h3><pre>{text(line)}</pre>" for why, line in steps)


def picture(path: Path, alt: str, caption: str = "") -> str:
    """Returns a PNG with its caption; of one that is too large, where it is."""
    if kind_of(path) != "file":
        return ""
    if path.stat().st_size > MOST_BYTES:
        return paragraph(f"{alt}: {path.name}, in the same folder, is too large for this page.")
    data = path.read_bytes()
    width = int.from_bytes(data[16:20], "big")
    kind = ' class="wide"' if width > 1300 else ""
    below = f"<figcaption>{text(caption)}</figcaption>" if caption else ""
    source = base64.b64encode(data).decode()
    return (
        f'<figure><div class="mat"><img{kind} alt="{text(alt)}" '
        f'src="data:image/png;base64,{source}"></div>{below}</figure>'
    )


def chart(figure: Figure, name: str, alt: str) -> str:
    """Returns a plot as a vector graphic in the colours of the page.

    Args:
        figure: The plot.
        name: Differs between the plots of a page.
        alt: What it shows.
    """
    import matplotlib

    found = io.StringIO()
    figure.patch.set_alpha(0)
    for axes in figure.axes:
        axes.patch.set_alpha(0)
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        figure.savefig(found, format="svg", metadata=nothing)
    drawn = found.getvalue()
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
    return f'<div class="card">{drawn}</div>'


def charts(drawn: Iterable[str]) -> str:
    """Returns plots side by side where there is room."""
    inside = "".join(drawn)
    return f'<div class="charts">{inside}</div>' if inside else ""


def _is_number(cell: object) -> bool:
    if isinstance(cell, (int, float)):
        return True
    return bool(re.fullmatch(r"[-+]?[\d.,]+(e[-+]?\d+)?( ?(%|px|M|GB))?|none|", str(cell)))
