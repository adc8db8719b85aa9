"""A run that sets its own length: as many steps as fit into a given time."""

from __future__ import annotations

import json
import logging
import statistics
import time
from contextlib import suppress
from pathlib import Path

from fd_large import distributed
from fd_large.atomic_files import write_json
from fd_large.runtime.run_folder import written_or_logged

log = logging.getLogger(__name__)

MEASURED_STEPS = 20
RESERVE = 0.03
"""Fraction of the time that is kept for the last checkpoint."""
LAST_EVALUATION = 3.0
"""The last evaluation also finds the constant-prediction baseline: about three times another's."""


class TimeBox:
    """Decides the number of steps once, for all ranks and for every later part of the run.

    The time begins when it is constructed.

    Args:
        seconds: Time for training.
        folder: The run's folder; the decision is kept in its time_box.json.
        most: Largest number of steps that the recipe allows.
        first: Step at which the run starts or goes on, from 0.
    """

    def __init__(self, seconds: float, folder: Path, most: int, *, first: int = 0) -> None:
        self._seconds, self._most, self._first = seconds, most, first
        self._evaluation_seconds = 0.0
        self._path = folder / "time_box.json"
        self._start = self._last = time.monotonic()
        self._durations: list[float] = []

    def decided(self) -> int | None:
        """Returns the length that an earlier part of the run decided, the same on all ranks."""
        total = None
        if distributed.is_main():
            with suppress(OSError, ValueError, KeyError, TypeError):  # Absent or damaged: measure.
                total = json.loads(self._path.read_text())["updates"]
        return distributed.broadcast_object(total)

    def after_evaluation(self, seconds: float) -> None:
        """Records how long an evaluation took."""
        self._evaluation_seconds = seconds
        self._last = time.monotonic()

    def after_step(self, evaluate_every: int) -> int | None:
        """Measures a step; returns the length after the last measured step, else None.

        Args:
            evaluate_every: Steps between two evaluations, which take time as well; 0: none.
        """
        now = time.monotonic()
        self._durations.append(now - self._last)
        self._last = now
        if len(self._durations) != MEASURED_STEPS:
            return None
        # The first steps pay for caches, workers and kernels.
        each = statistics.median(self._durations[MEASURED_STEPS // 4 :])
        left = self._seconds * (1 - RESERVE) - (now - self._start)
        left -= LAST_EVALUATION * self._evaluation_seconds
        with_evaluations = each
        if evaluate_every:
            with_evaluations += self._evaluation_seconds / evaluate_every
        done = self._first + MEASURED_STEPS
        total = min(self._most, done + max(0, int(left / with_evaluations)))
        total = distributed.broadcast_object(total)
        if distributed.is_main():
            with written_or_logged(self._path):
                write_json(self._path, {"updates": total, "seconds_per_update": each})
        log.info("time box: %.0f s at %.2f s a step: %d steps in all", self._seconds, each, total)
        return total
