"""Functions that escape names, sources and labels, so that Markdown shows them literally."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

# Marks of links, pictures, emphasis, code, raw HTML and cells of a table. A `_` within a word is no
# mark.
_MARKS = re.compile(r"([\\`*\[\]|])")
_ENTITIES = {"&": "&amp;", "<": "&lt;", ">": "&gt;"}


def escaped(text: object) -> str:
    """Returns one line of Markdown that shows `text` literally, also in a cell of a table."""
    line = " ".join(str(text).split())
    return _MARKS.sub(r"\\\1", line.translate(str.maketrans(_ENTITIES)))


def code(text: object) -> str:
    """Returns `text` as inline code of Markdown, with each backtick replaced by an apostrophe."""
    line = " ".join(str(text).split()).replace("`", "'")
    return f"`{line}`".replace("|", r"\|")


def head(values: Mapping[str, Any]) -> str:
    """Returns a page's YAML front matter, between lines of dashes.

    Args:
        values: Texts and lists of texts by key, in the order of the front matter.
    """
    import yaml  # Commands that write no page do without.

    text = yaml.safe_dump(dict(values), sort_keys=False, allow_unicode=True, width=10_000)
    return f"---\n{text}---"
