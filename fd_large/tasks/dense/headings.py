"""Headings above the images of a plot."""

from __future__ import annotations

LONGEST = 36
"""Letters that have room above an image in a row of four."""


def shortened(name: str) -> str:
    """Returns a name short enough to stand above an image: its end, if it is too long."""
    return name if len(name) <= LONGEST else f"...{name[3 - LONGEST :]}"
