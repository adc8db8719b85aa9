"""Requests checkpoints at intervals of time, besides those at the recipe's intervals of steps."""

from __future__ import annotations

import time

from fd_large.ranks import distributed
from fd_large.runtime.hooks import NOTHING, Hook, Setting, Wish


class SaveInterval(Hook):
    """Requests a checkpoint when a number of minutes have passed since the last save began.

    Only rank 0's clock counts. Other ranks get the request in the loop's all-reduce of a step.

    Args:
        minutes: Number of minutes, above 0 and not necessarily whole.
    """

    def __init__(self, minutes: float) -> None:
        self._seconds = 60 * minutes

    def on_start(self, setting: Setting) -> None:
        """Starts the clock of the interval."""
        self._last = time.monotonic()

    def wish(self) -> Wish:
        """Requests a checkpoint on rank 0 if the interval has passed."""
        late = time.monotonic() - self._last >= self._seconds
        return Wish(save=True) if late and distributed.is_main() else NOTHING

    def on_save(self, index: int) -> None:
        """Restarts the clock when a checkpoint begins."""
        self._last = time.monotonic()
