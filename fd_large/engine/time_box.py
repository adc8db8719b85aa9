"""A run that sets its own length: what fits a number of seconds, known after the first updates."""

from __future__ import annotations

import json
import logging
import statistics
import time
from contextlib import suppress
from pathlib import Path

from fd_large import distributed
from fd_large.runtime.run_folder import write_json

log = logging.getLogger(__name__)

MEASURED_UPDATES = 20
RESERVE = 0.06
"""Share of the seconds that is kept for the evaluation and the checkpoint at the end."""


class TimeBox:
    """Decides the number of updates once, for all ranks and for every later part of the run.

    Args:
        seconds: Of training.
        folder: The run's; the decision is kept in time_box.json.
        most: Updates that the recipe allows at most.
    """

    def __init__(self, seconds: float, folder: Path, most: int) -> None:
        self.seconds, self.most = seconds, most
        self._path = folder / "time_box.json"
        self._start = self._last = time.monotonic()
        self._durations: list[float] = []

    def decided(self) -> int | None:
        """The length that an earlier part of the run decided, the same on all ranks."""
        total = None
        if distributed.is_main():
            with suppress(OSError, ValueError, KeyError, TypeError):  # Absent or damaged: measure.
                total = json.loads(self._path.read_text())["updates"]
        return distributed.broadcast_object(total)

    def after_update(self) -> int | None:
        """Measures an update; after the last measured one returns the length, else None."""
        now = time.monotonic()
        self._durations.append(now - self._last)
        self._last = now
        if len(self._durations) != MEASURED_UPDATES:
            return None
        # The first updates pay for caches, workers and kernels.
        each = statistics.median(self._durations[MEASURED_UPDATES // 4 :])
        left = self.seconds * (1 - RESERVE) - (now - self._start)
        total = min(self.most, MEASURED_UPDATES + max(0, int(left / each)))
        total = distributed.broadcast_object(total)
        if distributed.is_main():
            write_json(self._path, {"updates": total, "seconds_per_update": each})
        log.info(
            "time box: %.0f s at %.2f s an update: %d updates in all", self.seconds, each, total
        )
        return total
