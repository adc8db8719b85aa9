"""Checkpoints by the clock, besides those that the recipe asks for by steps."""

from __future__ import annotations

import time

from fd_large.ranks import distributed
from fd_large.runtime.hooks import NOTHING, Hook, Setting, Wish


class SaveInterval(Hook):
    """Wishes a checkpoint once so many minutes have passed since the last one was begun.

    Only rank 0's clock counts; the loop's one all-reduce of a step carries the wish to the others.

    Args:
        minutes: Above 0, a fraction allowed.
    """

    def __init__(self, minutes: float) -> None:
        self._seconds = 60 * minutes

    def on_start(self, setting: Setting) -> None:
        """Starts the clock."""
        self._last = time.monotonic()

    def wish(self) -> Wish:
        """Wishes a checkpoint, if it is time."""
        late = time.monotonic() - self._last >= self._seconds
        return Wish(save=True) if late and distributed.is_main() else NOTHING

    def on_save(self, index: int) -> None:
        """Starts the clock anew, whoever asked for the checkpoint."""
        self._last = time.monotonic()
