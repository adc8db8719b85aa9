"""Ends a hung rank with exit code 75 after writing its stacks to the log.

No help from other ranks is needed.

A collective waits half an hour for a hung rank, while all GPUs are idle. A thread of the watchdog
counts the seconds since the training thread last showed progress (a beat). The watchdog's thread
runs while the training thread waits in a collective or another call that releases Python's global
interpreter lock. If a call holds this lock, the watchdog's thread stops too, and the watchdogs of
the other ranks end the run.
"""

from __future__ import annotations

import faulthandler
import logging
import multiprocessing
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import Any

from fd_large.data import slow_images
from fd_large.errors import Exit
from fd_large.ranks import distributed, failures
from fd_large.ranks.failures import kill_workers
from fd_large.ranks.processes import briefly
from fd_large.runtime import terminal
from fd_large.runtime.hooks import Hook, Setting, Update
from fd_large.runtime.logs import FILE_ONLY
from fd_large.runtime.run_folder import write_status

log = logging.getLogger(__name__)

HUNG = "hung"
STACKS_SIGNAL = signal.SIGUSR2
"""Signal after which a rank, or one of its loading processes, writes its stacks and goes on."""
MOST_SECONDS_BETWEEN_LOOKS = 1.0
START_FACTOR, LEAST_START_SECONDS, MOST_START_SECONDS = 3.0, 60.0, 1750.0
"""Until the end of its first step, a rank may go without a beat for the first value times the
limit, but at least the second value and at most the third value, in seconds. In this time the rank
builds models, reads a checkpoint and compiles kernels. Collectives time out after 1,800 s."""
MOST_SECONDS_OF_LINGERING = 30.0
"""Largest number of seconds from the writing of a rank's stacks to the end of its process. The
other ranks, which are at most a micro-batch behind, write their stacks in this time, before their
connections close."""
MOST_COLLECTIVES = 5
"""Largest number of unfinished collectives that the log names."""
SECONDS_FOR_LAST_WORDS = 20.0
"""Seconds that the last messages may take, since the disk of the log may be the cause of the
hang."""


class Silence:
    """Measures how long a counter has not changed, without time in which the process was stopped.

    Args:
        interval: Intended seconds between two calls of `lasts`.
        now: The time, in seconds.

    Attributes:
        seconds: Seconds for which the counter had not changed at the last call of `lasts`.
    """

    def __init__(self, interval: float, now: float) -> None:
        self._interval, self._looked = interval, now
        self._seen = -1
        self.seconds = 0.0

    def lasts(self, now: float, beats: int, limit: float) -> bool:
        """Updates `seconds`, and returns whether the counter has not changed for `limit` seconds.

        Args:
            now: The time, in seconds.
            beats: The current value of the counter.
            limit: Number of seconds without a change for which the result is True.
        """
        # In a pause that is longer than intended this thread did not run, so the process stood.
        passed, self._looked = min(now - self._looked, 2 * self._interval), now
        self.seconds = self.seconds + passed if beats == self._seen else 0.0
        self._seen = beats
        return self.seconds >= limit


class Watchdog(Hook):
    """Ends this rank after a number of seconds without a beat.

    A beat is a call of `beat` or another hook, or a change of `distributed.moves()`. Seconds in
    which this process is stopped (Ctrl-Z, a machine that sleeps) do not count. The clock runs from
    the call of `start` on, which may be long before the first step.

    Args:
        seconds: Number of seconds for which the rank may go without a beat.
        folder: The run's folder.
        owned: Function that returns whether this launch of the run still owns the folder.
        start: ID of this launch.
        start_seconds: Number of seconds for which the rank may go without a beat until the end of
            its first step. None for `START_FACTOR` times `seconds`, but at least
            `LEAST_START_SECONDS` and at most the larger of `MOST_START_SECONDS` and `seconds`.
        leave: Function that ends the process with an exit code.
    """

    def __init__(
        self,
        seconds: float,
        folder: Path,
        owned: Callable[[], bool],
        *,
        start: str = "",
        start_seconds: float | None = None,
        leave: Callable[[int], Any] = os._exit,
    ) -> None:
        self._limit, self._leave = seconds, leave
        self._folder, self._owned, self._start = folder, owned, start
        longer = min(max(START_FACTOR * seconds, LEAST_START_SECONDS), MOST_START_SECONDS)
        self._start_limit = max(seconds, longer) if start_seconds is None else start_seconds
        self._stepped, self._total = False, 0
        self._where = "before its first step"
        self._beats = 0
        self._over, self._fired = threading.Event(), threading.Event()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Starts the watchdog's thread; must be called in the thread that will train."""
        self._interval = min(MOST_SECONDS_BETWEEN_LOOKS, self._limit / 20)
        self._training = threading.get_ident()
        slow_images.watch()
        # Loading processes inherit it, so that they can be asked as well; descriptor 2 is the log.
        faulthandler.register(STACKS_SIGNAL, file=2, all_threads=True)
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()

    def on_start(self, setting: Setting) -> None:
        """Records a beat (a sign of progress), and the number of finished steps for messages.

        Args:
            setting: The facts of the run.
        """
        self.beat()
        self._total = setting.total_updates
        self._where = f"after step {setting.first_update} of {self._total}"

    def beat(self, *_: object, **__: object) -> None:
        """Records a beat (a sign of progress), so that the seconds are counted from zero again.

        The arguments are not used, so that this method can serve as several methods of `Hook`.
        """
        self._beats += 1

    on_skip = on_roll_back = on_evaluation = on_save = beat

    def after_update(self, update: Update) -> None:
        """Records a beat (a sign of progress), and the number of finished steps for messages.

        Args:
            update: The numbers of the finished step.
        """
        self.beat()
        self._stepped = True
        self._where = f"after step {update.index + 1} of {self._total}"

    def on_saved(self, seconds: float) -> None:
        """Records a beat (a sign of progress), and warns if a save took long.

        Args:
            seconds: Duration of the save; the warning is logged above half of the watchdog's limit.
        """
        self.beat()
        if seconds > self._limit / 2:
            log.warning(
                "a save took %.0f s. At the end the run waits for its last save, and counts as "
                "hung after %.0f s of waiting. Raise --runtime.watchdog_seconds.",
                seconds,
                self._limit,
            )

    def on_failure(self, status: str, reason: str) -> None:
        """Stops the watchdog."""
        self.stop()

    def on_end(self, status: str) -> None:
        """Stops the watchdog."""
        self.stop()

    def stop(self) -> None:
        """Stops the watchdog's thread, and waits for its end; may be called twice.

        If the watchdog is already ending the process, this method does not wait.
        """
        self._over.set()
        if self._thread is not None and not self._fired.is_set():
            self._thread.join()

    def _watch(self) -> None:
        silence = Silence(self._interval, time.monotonic())
        reported: set[str] = set()
        while not self._over.wait(self._interval):
            for seconds, name in slow_images.longer_than(self._limit / 4):
                if name not in reported:
                    words = "a loading process has been reading one image for %.0f s: %s"
                    # The disk of the log may be what hangs.
                    briefly(log.warning, words, seconds, name, seconds=self._interval)
                reported.add(name)
            limit = self._limit if self._stepped else self._start_limit
            if silence.lasts(time.monotonic(), self._beats + distributed.moves(), limit):
                self._fired.set()
                # The training thread fails in its collective if the other ranks end first; it must
                # then wait for this thread.
                failures.leave_to(threading.current_thread())
                try:
                    self._last_words(silence.seconds)
                    kill_workers()
                    failures.tell(
                        Exit.AGAIN, f"its training has not moved for {silence.seconds:.0f} s"
                    )
                finally:
                    self._leave(Exit.AGAIN)
                return

    def _last_words(self, seconds: float) -> None:
        self._quiet = seconds
        begin = time.monotonic()
        # Each has a thread of its own, since any may wait for the disk, lock or pipe that hangs.
        words = [
            threading.Thread(target=call, name=f"watchdog {call.__name__}", daemon=True)
            for call in (
                *(self._dump, self._say, self._say_collectives),
                *(self._write_status, self._ask_workers),
            )
        ]
        for thread in words:
            thread.start()
        for thread in words:
            thread.join(max(0.0, begin + SECONDS_FOR_LAST_WORDS - time.monotonic()))
        lingering = min(MOST_SECONDS_OF_LINGERING, self._limit / 10)
        time.sleep(max(0.0, begin + lingering - time.monotonic()))

    def _dump(self) -> None:
        # This takes no lock and reads no source file, so it reaches stderr whatever hangs.
        with suppress(OSError, ValueError):
            faulthandler.dump_traceback(terminal.err())

    def _say(self) -> None:
        frames = sys._current_frames()
        images = slow_images.longer_than(self._limit / 4)
        log.error(
            "watchdog: rank %d (%s) has not moved for %.0f s, %s: %s. This rank ends with exit "
            "code %d; the same command resumes from the last checkpoint. If this rank waits in a "
            "collective, another rank may be the cause: the log of that rank has no such line, or "
            "other stacks. If the step is only slow, raise --runtime.watchdog_seconds.%s",
            distributed.rank(),
            distributed.node_name(),
            self._quiet,
            self._where,
            standpoint(frames[self._training]) if self._training in frames else "it has ended",
            Exit.AGAIN,
            "".join(
                f" One image has been read for {seconds:.0f} s: {name}." for seconds, name in images
            ),
        )
        log.error("stacks of all threads:\n%s", stacks(frames), extra=FILE_ONLY)

    def _say_collectives(self) -> None:
        under_way = distributed.collectives_under_way()
        log.error(
            "watchdog: rank %d waits for %s",
            distributed.rank(),
            "; ".join(under_way[:MOST_COLLECTIVES]) or "no collective",
        )

    def _ask_workers(self) -> None:
        for child in multiprocessing.active_children():
            if child.pid is not None:
                with suppress(ProcessLookupError):
                    os.kill(child.pid, STACKS_SIGNAL)

    def _write_status(self) -> None:
        # Every rank writes the status, since rank 0 may be the one that hangs.
        if self._owned():
            write_status(self._folder, HUNG, start=self._start)


def standpoint(frame: FrameType) -> str:
    """Describes where the training thread is, for messages.

    The text names the thread's innermost call, and the innermost call in this package.

    Args:
        frame: The innermost frame of the training thread.
    """
    package = Path(__file__).parents[1].name
    calls = [
        ("/".join(Path(code.co_filename).parts[-3:]), line, code.co_name)
        for each, line in traceback.walk_stack(frame)
        for code in (each.f_code,)
    ]
    package_call = next((call for call in calls if f"{package}/" in call[0]), calls[0])
    place = " called from ".join(
        "{}:{} {}".format(*c) for c in dict.fromkeys([calls[0], package_call])
    )
    return f"its training thread is in {place}"


def stacks(frames: dict[int, FrameType]) -> str:
    """Formats the stacks of all threads except the watchdog's own, with the main thread first.

    Args:
        frames: The innermost frame of each thread, by thread ID (`sys._current_frames`).
    """
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    main = threading.main_thread().ident
    return "\n".join(
        f"thread {names.get(number, 'unknown to Python')} ({number}):\n"
        + "".join(traceback.format_stack(frame))
        for number, frame in sorted(frames.items(), key=lambda item: (item[0] != main, item[0]))
        if not names.get(number, "").startswith("watchdog")
    )
