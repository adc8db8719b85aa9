"""Shortens the names of images for the headings in a plot."""

from __future__ import annotations

LONGEST = 36
"""Largest number of characters that fit above an image if a row has four images."""


def shortened(name: str) -> str:
    """Shortens the name of an image for a heading.

    If `name` has more than `LONGEST` characters, its start is replaced by "...", so that the result
    has `LONGEST` characters. Otherwise `name` is returned unchanged.
    """
    return name if len(name) <= LONGEST else f"...{name[3 - LONGEST :]}"
