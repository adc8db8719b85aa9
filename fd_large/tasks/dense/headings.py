"""Words above the images of a plot."""

from __future__ import annotations

LONGEST = 36
"""Letters that have room above an image in a row of four."""


def shortened(name: str) -> str:
    """Returns the end of a name that is too long to stand above an image."""
    return name if len(name) <= LONGEST else f"...{name[3 - LONGEST :]}"
