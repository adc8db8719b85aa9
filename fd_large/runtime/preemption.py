"""Makes all ranks save and stop after a signal, when a stop file appears, or near the job's end.

Schedulers send SIGTERM or SIGUSR1 before they take a machine away. A terminal sends SIGINT on
Ctrl-C, and SIGHUP when it is closed. A user may also make a file named `stop` in the run's folder.
A rank that notices a signal, the file or the end of its job requests a stop. The ranks agree on the
stop in the collective of the next step (or evaluation batch). Then the run saves a checkpoint and
exits with code 75.
"""

from __future__ import annotations

import logging
import math
import os
import signal
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from datetime import datetime
from pathlib import Path
from types import FrameType
from typing import Any

from fd_large.errors import Exit
from fd_large.files import kind_of
from fd_large.ranks import distributed
from fd_large.ranks.launch import ask_slurm
from fd_large.ranks.processes import briefly, handlers_to_replace, hold
from fd_large.recipes.file_names import STOP_FILE
from fd_large.runtime import terminal
from fd_large.runtime.hooks import INTERRUPTED, NOTHING, Hook, Setting, Update, Wish
from fd_large.runtime.logs import FILE_ONLY

log = logging.getLogger(__name__)

SECONDS_BETWEEN_LOOKS = 2.0
"""Seconds between two look-ups of the stop file, so that not every step burdens a shared file
system."""
PROBE_BYTES = 1 << 25
MARGIN_SECONDS = 15.0
"""Seconds that are left for the exit of the process, from the end of the save to the end of the
job."""
SAME_PRESS_SECONDS = 1.0
"""Seconds within which two SIGINT count as one Ctrl-C, since a launcher passes on the SIGINT that a
rank also gets from the terminal."""
SECONDS_FOR_LAST_WORDS = 2.0
SECONDS_BETWEEN_QUESTIONS = 60.0
"""Seconds between two requests to Slurm for the end of the job, which are made when the end seems
near."""
SECONDS_AFTER_CTRL_C = {"deepspeed": 30.0, "torchrun": 30.0}
"""Seconds from a Ctrl-C until a launcher kills its ranks, by launcher (docs/recovery.md)."""


_late: list[str] = []


def asked_too_late() -> bool:
    """Whether a run of this process that ended since the last call had been asked to stop.

    A request that arrives when a run is already ending has no effect on this run. So a command with
    several runs calls this function after each run, and begins no further run if it returns True.
    """
    late = bool(_late)
    _late.clear()
    return late


class Preemption(Hook):
    """Requests a stop after a signal, when a stop file appears, or near the job's end.

    Signals are handled from the construction on, so that a signal during the building of models is
    not lost. A second Ctrl-C ends the process at once with exit code 130, even if the main thread
    waits in a collective or another call.

    Args:
        notice_seconds: Seconds from a scheduler's signal to the forced end of the process.
        launcher: Name of the launcher, which may kill the ranks earlier after a Ctrl-C.
        leaving: Function that is called once, as soon as there is a reason to stop. It may be
            called in a signal handler.
        write_status: Function that records in the run's folder with which status the run ended.
        leave: Function that ends the process with an exit code.
        ends_process: Whether a second Ctrl-C ends the process. If False, the second Ctrl-C raises
            KeyboardInterrupt, as without this hook.
    """

    def __init__(
        self,
        notice_seconds: float,
        *,
        launcher: str = "python",
        leaving: Callable[[], None] = lambda: None,
        write_status: Callable[[str], Any] = lambda status: None,
        leave: Callable[[int], Any] = os._exit,
        ends_process: bool = True,
    ) -> None:
        self._ends_process, self._pressed = ends_process, 0.0
        self._notice, self._launcher = notice_seconds, launcher
        self._leaving, self._leave = leaving, leave
        self._reason = ""
        self._warned = self._said = self._closed = False
        self._slowest = self._slowest_update = 0.0
        self._mark: float | None = None
        self._file: Path | None = None
        self._looked = self._asked_slurm = 0.0
        self._write_status = write_status
        self._held = ExitStack()
        # Seconds since the epoch, set by Slurm in every step of a job. One rank's clock is enough.
        end = os.environ.get("SLURM_JOB_END_TIME", "") if distributed.is_main() else ""
        self._job_end = float(end) if end.isdigit() else None
        self._before = handlers_to_replace()
        for number in self._before:
            signal.signal(number, self._caught)
        # Python's handlers wait while the main thread is in a call, such as a collective whose
        # peers are gone; a thread that reads this pipe does not.
        self._pipe = os.pipe()
        for end_of_it in self._pipe:
            os.set_inheritable(end_of_it, False)
        os.set_blocking(self._pipe[1], False)
        self._wakeup = signal.set_wakeup_fd(self._pipe[1], warn_on_full_buffer=False)
        threading.Thread(target=self._listen, name="signals", daemon=True).start()

    def on_start(self, setting: Setting) -> None:
        """Estimates the duration of a save, and warns if the time after a signal is too short.

        All ranks must call this method.

        Args:
            setting: The facts of the run.
        """
        self._setting = setting
        # One rank of each node looks for the file.
        self._file = setting.folder / STOP_FILE if distributed.local_rank() == 0 else None
        seconds = self._estimated(setting)
        if seconds is None:
            return
        self._slowest = seconds
        if seconds + MARGIN_SECONDS > self._notice:
            log.warning(
                "runtime.notice_seconds: A SAVE DOES NOT FIT between the signal and the end of "
                "the job: about %.0f s to write, %.0f s of notice; such a stop would lose the "
                "steps since the last checkpoint. Request more notice (sbatch --signal=B:USR1@%d "
                "and --runtime.notice_seconds %d) or save more often (--runtime.save_every).",
                seconds,
                self._notice,
                *[round(seconds + 2 * MARGIN_SECONDS)] * 2,
            )
        else:
            log.debug("a save takes about %.0f s here, the notice is %.0f s", seconds, self._notice)
        patience = SECONDS_AFTER_CTRL_C.get(self._launcher)
        if patience is not None and seconds + MARGIN_SECONDS > patience:
            log.warning(
                "Ctrl-C: %s kills its ranks after %.0f s, and a save takes about %.0f s: Ctrl-C "
                "may lose the steps since the last checkpoint. Stop the run with touch %s instead.",
                self._launcher,
                patience,
                seconds,
                setting.folder / STOP_FILE,
            )

    def wish(self) -> Wish:
        """Requests a stop after a signal, if the stop file exists, or near the job's end."""
        if not self._reason:
            self._reason = self._file_or_end()
        if not self._reason:
            return NOTHING
        if not self._warned:
            self._warned = True
            # A user who pressed Ctrl-C has already read a message.
            log.warning(
                "rank %d: %s; the run saves and stops",
                distributed.rank(),
                self._reason,
                extra=FILE_ONLY if self._reason == "SIGINT" else None,
            )
            self._leave_soon()
        return Wish(stop=True)

    def on_stop(self) -> None:
        """Calls `leaving` on every rank, also on those that had no reason to stop themselves.

        The next launch of the run then waits until this launch has ended.
        """
        self._leave_soon()

    def after_update(self, update: Update) -> None:
        """Records the longest duration of a step, since a save waits for the end of a step.

        Args:
            update: Not used.
        """
        now = time.monotonic()
        if self._mark is not None:
            self._slowest_update = max(self._slowest_update, now - self._mark)
        self._mark = now

    def on_evaluation(self, index: int, metrics: dict[str, float]) -> None:
        """Excludes the evaluation, which can be interrupted, from the duration of the next step.

        Args:
            index: Not used.
            metrics: Not used.
        """
        self._mark = None

    def on_saved(self, seconds: float) -> None:
        """Records the longest duration of a save; warns if it is new and exceeds `notice_seconds`.

        Args:
            seconds: Duration of the save.
        """
        if seconds > max(self._slowest, self._notice):
            log.warning(
                "a save took %.0f s, more than the %.0f s of runtime.notice_seconds",
                seconds,
                self._notice,
            )
        self._slowest = max(self._slowest, seconds)

    def on_end(self, status: str) -> None:
        """Restores signal handlers, and removes the stop file so that the next launch trains."""
        self.close()
        if distributed.is_main():
            with suppress(OSError):
                (self._setting.folder / STOP_FILE).unlink(missing_ok=True)

    def on_failure(self, status: str, reason: str) -> None:
        """Restores the signal handlers."""
        self.close()

    def close(self) -> None:
        """Restores the signal handlers that this hook replaced; a second call does nothing.

        If there was a reason to stop, only the handler of SIGINT is restored.
        """
        if self._closed:
            return
        self._closed = True
        if self._reason:
            _late.append(self._reason)
        self._held.close()
        signal.set_wakeup_fd(self._wakeup)
        os.close(self._pipe[1])
        for number, handler in self._before.items():
            # After a reason to stop, a late signal must not change the exit code.
            if handler is not None and (number == signal.SIGINT or not self._reason):
                signal.signal(number, handler)

    def _caught(self, number: int, frame: FrameType | None) -> None:
        # A handler takes no lock, since the code that it interrupts may hold it.
        self._reason = self._reason or signal.Signals(number).name
        self._leave_soon()
        if number == signal.SIGINT and not self._ends_process:
            now = time.monotonic()
            if self._pressed and now - self._pressed > SAME_PRESS_SECONDS:
                raise KeyboardInterrupt
            self._pressed = self._pressed or now

    def _leave_soon(self) -> None:
        if not self._said:
            self._said = True
            self._leaving()
            # A rank whose launcher has ended as well may live on until the save is complete.
            self._held.enter_context(hold())

    def _listen(self) -> None:
        pressed: float | None = None
        while numbers := os.read(self._pipe[0], 64):
            for number in numbers:
                now = time.monotonic()
                if number != signal.SIGINT:
                    continue
                if pressed is None:
                    pressed = now
                    if distributed.is_main():
                        log.warning(
                            "Ctrl-C: the run saves after this step and ends (or ends after its "
                            "start, before the first step); the same command resumes it. A second "
                            "Ctrl-C ends it at once."
                        )
                elif now - pressed > SAME_PRESS_SECONDS and self._ends_process:
                    self._end_at_once()
        os.close(self._pipe[0])

    def _end_at_once(self) -> None:
        # With a time limit, since the disk may be what hangs.
        briefly(self._write_status, INTERRUPTED, seconds=SECONDS_FOR_LAST_WORDS)
        if distributed.is_main():
            terminal.show_error("ended at once; the same command goes on from the last checkpoint")
        self._leave(Exit.INTERRUPTED)

    def _file_or_end(self) -> str:
        now = time.time()
        needed = self._slowest + self._slowest_update + MARGIN_SECONDS
        if self._job_end is not None and now > self._job_end - needed:
            self._ask_slurm(now)
            if now > self._job_end - needed:
                return f"the job ends in {max(0.0, self._job_end - now):.0f} s"
        if self._file is not None and time.monotonic() - self._looked > SECONDS_BETWEEN_LOOKS:
            self._looked = time.monotonic()
            if kind_of(self._file):
                return f"found {self._file}"
        return ""

    def _ask_slurm(self, now: float) -> None:
        """Asks Slurm for the end of the job, which `scontrol update` may have changed.

        Slurm is asked at most every `SECONDS_BETWEEN_QUESTIONS`.

        Args:
            now: The time, in seconds since the epoch.
        """
        if now - self._asked_slurm < SECONDS_BETWEEN_QUESTIONS:
            return
        self._asked_slurm = now
        job = os.environ.get("SLURM_JOB_ID", "")
        answer = ask_slurm("squeue", "--noheader", "--jobs", job, "--format=%e", seconds=10.0)
        with suppress(ValueError):
            self._job_end = datetime.fromisoformat(answer.strip()).timestamp()

    def _estimated(self, setting: Setting) -> float | None:
        """Estimates the duration of a save from the writing of a test file on each node.

        All ranks must call this method.

        Args:
            setting: The facts of the run, with its folder and the size of a checkpoint.

        Returns: the seconds on the slowest node, or None if a test file cannot be written.
        """
        share = setting.checkpoint_bytes / setting.world_size * distributed.local_world_size()
        size = int(min(PROBE_BYTES, share))
        distributed.barrier()
        seconds = 0.0
        if distributed.local_rank() == 0:
            probe = setting.folder / f".write_probe_{distributed.rank()}"
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
