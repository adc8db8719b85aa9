"""Pre-emption: after a signal, for a file or near the job's end, all ranks save and stop.

Schedulers send SIGTERM or SIGUSR1 before they take a machine away; a file named `stop` in the run's
folder is for people. Any rank that notices wishes to stop; the trainer agrees on it in the
collective of the next step (or evaluation batch) and saves, and the run exits with 75.
"""

from __future__ import annotations

import logging
import math
import os
import signal
import time
from contextlib import suppress
from pathlib import Path
from types import FrameType

from fd_large import distributed
from fd_large.runtime.hooks import NOTHING, Hook, Setting, Update, Wish

log = logging.getLogger(__name__)

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
STOP_FILE = "stop"
SECONDS_BETWEEN_LOOKS = 2.0
"""Seconds between two looks for the file: a shared file system is not asked at every step."""
PROBE_BYTES = 1 << 25
MARGIN_SECONDS = 15.0
"""Left after the save for leaving, before the job ends."""


class Preemption(Hook):
    """Wishes to stop after a signal, for a file, or when the job's time is nearly up.

    Signals are caught from the construction on, so that one that comes while models are built is
    not lost.

    Args:
        notice_seconds: Seconds between such a signal and the end of the process.
    """

    def __init__(self, notice_seconds: float) -> None:
        self._notice = notice_seconds
        self._reason = ""
        self._warned = False
        self._slowest = self._slowest_update = 0.0
        self._mark: float | None = None
        self._file: Path | None = None
        self._looked = 0.0
        # Seconds since the epoch, set by Slurm in every step of a job.
        end = os.environ.get("SLURM_JOB_END_TIME", "")
        self._job_end = float(end) if end.isdigit() else None
        for number in SIGNALS:
            signal.signal(number, self._caught)

    def on_start(self, setting: Setting) -> None:
        """Estimates how long a save takes, and logs whether it fits into the notice."""
        self._setting = setting
        # One look a node is enough.
        self._file = setting.folder / STOP_FILE if distributed.local_rank() == 0 else None
        seconds = self._estimated(setting)
        if seconds is None:
            return
        self._slowest = seconds
        if seconds + MARGIN_SECONDS > self._notice:
            log.warning(
                "runtime.notice_seconds: A SAVE DOES NOT FIT between a pre-emption and its end: "
                "about %.0f s to write, %.0f s of notice; such a stop would lose the steps since "
                "the last checkpoint. Ask for more notice (sbatch --signal=B:USR1@%d and "
                "--runtime.notice_seconds %d) or save more often (--runtime.save_every).",
                seconds,
                self._notice,
                *[round(seconds + 2 * MARGIN_SECONDS)] * 2,
            )
        else:
            log.info("a save takes about %.0f s here, the notice is %.0f s", seconds, self._notice)

    def wish(self) -> Wish:
        """Wishes to stop, once this rank has a reason."""
        if not self._reason:
            self._reason = self._file_or_end()
        if not self._reason:
            return NOTHING
        if not self._warned:
            self._warned = True
            log.warning("rank %d: %s; the run saves and stops", distributed.rank(), self._reason)
        return Wish(stop=True)

    def after_update(self, update: Update) -> None:
        """Measures how long a step takes: one more is finished before the run saves."""
        now = time.monotonic()
        if self._mark is not None:
            self._slowest_update = max(self._slowest_update, now - self._mark)
        self._mark = now

    def on_evaluation(self, index: int, metrics: dict[str, float]) -> None:
        """Leaves the evaluation out of the next step's time: it can be interrupted."""
        self._mark = None

    def on_saved(self, seconds: float) -> None:
        """Notes how long a save took."""
        if seconds > max(self._slowest, self._notice):
            log.warning(
                "a save took %.0f s, more than the %.0f s of runtime.notice_seconds",
                seconds,
                self._notice,
            )
        self._slowest = max(self._slowest, seconds)

    def on_end(self, status: str) -> None:
        """Removes the file, so that the next start trains."""
        if distributed.is_main():
            with suppress(OSError):
                (self._setting.folder / STOP_FILE).unlink(missing_ok=True)

    def _caught(self, number: int, frame: FrameType | None) -> None:
        # Nothing but an assignment: logging from a handler may meet a held lock.
        self._reason = self._reason or signal.Signals(number).name

    def _file_or_end(self) -> str:
        now = time.time()
        needed = self._slowest + self._slowest_update + MARGIN_SECONDS
        if self._job_end is not None and now > self._job_end - needed:
            return f"the job ends in {max(0.0, self._job_end - now):.0f} s"
        if self._file is not None and time.monotonic() - self._looked > SECONDS_BETWEEN_LOOKS:
            self._looked = time.monotonic()
            if self._file.exists():
                return f"found {self._file}"
        return ""

    def _estimated(self, setting: Setting) -> float | None:
        """Returns the seconds that a checkpoint will take, from a file that all ranks write."""
        share = setting.checkpoint_bytes / setting.world_size
        size = int(min(PROBE_BYTES, share))
        probe = setting.folder / f".write_probe_{distributed.rank()}"
        distributed.barrier()
        begin = time.perf_counter()
        try:
            with probe.open("wb") as file:
                file.write(bytes(size))
                file.flush()
                os.fsync(file.fileno())
            seconds = (time.perf_counter() - begin) * share / max(size, 1)
        except OSError:
            # A full disk: the first save will say so.
            seconds = math.inf
        with suppress(OSError):
            probe.unlink(missing_ok=True)
        slowest = distributed.max_rank(seconds)
        return slowest if math.isfinite(slowest) else None
