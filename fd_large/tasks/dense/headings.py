"""Shortens the names of images for the headings in a plot."""

from __future__ import annotations

LONGEST = 36
"""Largest number of characters that fit above an image if a row has four images."""


def shortened(name: str) -> str:
    """Shortens an image's name for a heading; "..." replaces the start of a long name."""
    return name if len(name) <= LONGEST else f"...{name[3 - LONGEST :]}"
