"""A run that sets its own length: what fits a number of seconds, known after the first steps."""

from __future__ import annotations

import json
import logging
import statistics
import time
from contextlib import suppress
from pathlib import Path

from fd_large import distributed
from fd_large.runtime.run_folder import write_json, written_or_told

log = logging.getLogger(__name__)

MEASURED_UPDATES = 20
RESERVE = 0.03
"""Share of the seconds that is kept for the checkpoint at the end."""
LAST_EVALUATION = 3.0
"""The last evaluation also finds the best constant: about three times another one."""


class TimeBox:
    """Decides the number of steps once, for all ranks and for every later part of the run.

    Args:
        seconds: Of training.
        folder: The run's; the decision is kept in time_box.json.
        most: Steps that the recipe allows at most.
        first: Update that the run starts or goes on at.
        evaluate_every: Steps between evaluations, which take time of the box too; 0: none.
    """

    def __init__(
        self, seconds: float, folder: Path, most: int, *, first: int = 0, evaluate_every: int = 0
    ) -> None:
        self.seconds, self.most, self.evaluate_every = seconds, most, evaluate_every
        self.first = first
        self._evaluation_seconds = 0.0
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

    def after_evaluation(self, seconds: float) -> None:
        """Learns what an evaluation takes."""
        self._evaluation_seconds = seconds
        self._last = time.monotonic()

    def after_update(self) -> int | None:
        """Measures a step; after the last measured one returns the length, else None."""
        now = time.monotonic()
        self._durations.append(now - self._last)
        self._last = now
        if len(self._durations) != MEASURED_UPDATES:
            return None
        # The first steps pay for caches, workers and kernels.
        each = statistics.median(self._durations[MEASURED_UPDATES // 4 :])
        left = self.seconds * (1 - RESERVE) - (now - self._start)
        left -= LAST_EVALUATION * self._evaluation_seconds
        with_evaluations = each
        if self.evaluate_every:
            with_evaluations += self._evaluation_seconds / self.evaluate_every
        done = self.first + MEASURED_UPDATES
        total = min(self.most, done + max(0, int(left / with_evaluations)))
        total = distributed.broadcast_object(total)
        if distributed.is_main():
            with written_or_told(self._path):
                write_json(self._path, {"updates": total, "seconds_per_update": each})
        log.info("time box: %.0f s at %.2f s a step: %d steps in all", self.seconds, each, total)
        return total
