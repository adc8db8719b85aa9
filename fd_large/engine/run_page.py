"""Keeps RUN/report.html up to date during a run, in about 1% (`SHARE`) of the run's time."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace

from fd_large.report.closing import RUNNING
from fd_large.report.run_files import read_run
from fd_large.report.run_page import write_run_page
from fd_large.runtime.hooks import DONE, FAILED, INTERRUPTED, Setting, Tracker

SHARE = 0.01
"""Largest fraction of the run's time that its page may take."""
FIRST_SECONDS = 5.0
"""Assumed seconds that writing a page takes, until the first page has been written."""


class RunPage(Tracker):
    """Tracker that writes RUN/report.html after evaluations, and at the end of a preempted run.

    The full report of a finished run is written elsewhere. A run that fails writes no page, so that
    nothing delays its end.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock

    def on_start(self, setting: Setting) -> None:
        """Stores the facts of the run; writes nothing yet."""
        self._setting = setting
        self._last, self._cost = self._clock(), FIRST_SECONDS

    def on_evaluation(self, index: int, metrics: dict[str, float]) -> None:
        """Writes the page if the time since it was last written is long enough.

        This is more than 1 / `SHARE` (100) times the seconds that the last writing took.
        """
        if self._cost < SHARE * (self._clock() - self._last):
            begin = self._clock()
            self._write(running=True)
            self._last = self._clock()
            self._cost = self._last - begin

    def on_end(self, status: str) -> None:
        """Writes the page unless the run is done, failed or was interrupted."""
        if status not in (DONE, FAILED, INTERRUPTED):
            self._write(running=False)

    def _write(self, *, running: bool) -> None:
        self._setting.must_own()
        files = read_run(self._setting.folder)
        write_run_page(replace(files, summary={"status": RUNNING}) if running else files)
