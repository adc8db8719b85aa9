"""A run that sets its own length: as many steps as fit into a given time."""

from __future__ import annotations

import logging
import statistics
import time
from collections import deque
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from fd_large.files import json_object, write_json
from fd_large.ranks import distributed
from fd_large.runtime.run_folder import written_or_logged

log = logging.getLogger(__name__)

DECIDED_EVERY = 20
"""Steps whose multiples decide the length, the first time and again."""
TOLERANCE = 0.03
"""Fraction of the length by which a new one has to differ to be taken."""
WARM_UP = 5
"""Steps of a start that are not measured: they pay for caches, workers and kernels."""
MEASURED = 3 * DECIDED_EVERY
"""Most steps that a decision looks back at."""
RESERVE = 0.03
"""Fraction of the time that is kept for the last checkpoint."""
LAST_EVALUATION = 3.0
"""The last evaluation also finds the constant-prediction baseline: about three times another's."""


class TimeBox:
    """Decides the number of steps for all ranks, and corrects it as the speed changes.

    Decisions fall on multiples of DECIDED_EVERY steps. They are kept in the run's time_box.json and
    in its checkpoints: a run that goes on makes those again that fell after its checkpoint, at the
    same steps, and then measures on, with what is left of the time.

    The time begins when it is constructed.

    Args:
        seconds: Time for training.
        folder: The run's folder.
        most: Largest number of steps that the recipe allows.
        first: Step at which the run starts or goes on, from 0.
        stored: The `state` in the checkpoint from which the run goes on; None: it has none.

    Attributes:
        total: Number of steps of the whole run, as decided so far.
    """

    def __init__(
        self,
        seconds: float,
        folder: Path,
        most: int,
        *,
        first: int = 0,
        stored: Mapping[str, Any] | None = None,
    ) -> None:
        self._seconds, self._most = seconds, most
        self._path = folder / "time_box.json"
        self._start = self._last = time.monotonic()
        self._made = 0
        self._durations: deque[float] = deque(maxlen=MEASURED)
        self._evaluation_seconds = 0.0
        self._used, self._decisions, self._measures = distributed.broadcast_object(
            self._known(first, stored)
        )
        self.total = most
        for step, total in sorted(self._decisions.items()):
            if step <= first:
                self.total = min(most, total)

    def _known(
        self, first: int, stored: Mapping[str, Any] | None
    ) -> tuple[float, dict[int, int], bool]:
        """Seconds used so far, decisions by step, and whether there is more to measure."""
        if not first:
            return 0.0, {}, True
        # Absent or damaged: what the checkpoint has.
        written = json_object(self._path)
        noted: dict[int, int] | None = None
        with suppress(KeyError, TypeError, ValueError):
            noted = _decisions_of(written)
        if stored is None:
            # A checkpoint of the first release holds the one decision that it made.
            with suppress(KeyError, TypeError, ValueError):
                return 0.0, {first: int(written["updates"])}, False
            return 0.0, {}, True
        decisions = _decisions_of(stored)
        # The file knows of decisions after the checkpoint, if it is of the same training.
        if noted is not None and {s: t for s, t in noted.items() if s <= first} == decisions:
            decisions = noted
        return float(stored["seconds"]), decisions, True

    def state(self) -> dict[str, Any]:
        """Returns what a checkpoint keeps, as plain values."""
        used = self._used + time.monotonic() - self._start
        return {"seconds": round(used, 3), "decisions": self._rows()}

    def _rows(self) -> list[dict[str, int]]:
        return [{"step": step, "updates": total} for step, total in self._decisions.items()]

    def after_evaluation(self, seconds: float) -> None:
        """Records how long an evaluation took."""
        self._evaluation_seconds = seconds
        self._last = time.monotonic()

    def after_step(self, done: int, evaluate_every: int) -> int:
        """Measures a step; returns the number of steps in all, the same on all ranks.

        Args:
            done: Number of finished steps.
            evaluate_every: Steps between two evaluations, which take time as well; 0: none.
        """
        now = time.monotonic()
        self._made += 1
        if self._made > WARM_UP:
            self._durations.append(now - self._last)
        self._last = now
        if done in self._decisions:
            self.total = min(self._most, self._decisions[done])
        elif self._is_due(done):
            self._decide(done, now, evaluate_every)
        return self.total

    def _is_due(self, done: int) -> bool:
        replays = any(step > done for step in self._decisions)
        enough = len(self._durations) >= DECIDED_EVERY // 2
        return self._measures and not replays and enough and done % DECIDED_EVERY == 0

    def _decide(self, done: int, now: float, evaluate_every: int) -> None:
        # All ranks go by the clock of rank 0.
        each, total = distributed.broadcast_object(
            self._fitting(done, now, evaluate_every) if distributed.is_main() else (0.0, 0)
        )
        if self._decisions and abs(total - self.total) <= TOLERANCE * self.total:
            return
        self._decisions[done] = self.total = total
        if distributed.is_main():
            values = {"updates": total, "seconds_per_update": each, "decisions": self._rows()}
            with written_or_logged(self._path):
                write_json(self._path, values)
        log.info("time box: %.0f s at %.2f s a step: %d steps in all", self._seconds, each, total)

    def _fitting(self, done: int, now: float, evaluate_every: int) -> tuple[float, int]:
        """The seconds that a step takes, and the number of steps that fit the time."""
        each = statistics.median(self._durations)
        left = self._seconds * (1 - RESERVE) - self._used - (now - self._start)
        left -= LAST_EVALUATION * self._evaluation_seconds
        with_evaluations = each
        if evaluate_every:
            with_evaluations += self._evaluation_seconds / evaluate_every
        return each, min(self._most, done + max(0, int(left / with_evaluations)))


def _decisions_of(values: Mapping[str, Any]) -> dict[int, int]:
    return {int(row["step"]): int(row["updates"]) for row in values["decisions"]}
