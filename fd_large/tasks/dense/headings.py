"""Headings above the images of a plot."""

from __future__ import annotations

LONGEST = 36
"""Largest number of letters that fit above an image in a row of four."""


def shortened(name: str) -> str:
    """Returns a name that fits above an image; a name that is too long loses its beginning."""
    return name if len(name) <= LONGEST else f"...{name[3 - LONGEST :]}"
