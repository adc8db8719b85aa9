"""Processes as the kernel shows them, how many may load, calls that may hang, signals. No torch."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from fd_large.errors import ConfigError

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP)
"""What asks a process to stop: a scheduler's signals, Ctrl-C, a terminal that is closed."""
WORKERS_PER_CORE, FEWEST_WORKERS = 16, 64
"""A rank may start so many loading processes for each of its cores, or so many where that is less.

More of them do not load faster, and thousands take the machine down.
"""
HIDDEN = -1
"""When a process started that this user may not look at."""


class Status(NamedTuple):
    """A process, from proc(5).

    Attributes:
        state: One letter.
        parent: Its parent process.
        group: Its process group.
        started: When it started, in ticks since the boot.
    """

    state: str
    parent: int
    group: int
    started: int

    @property
    def has_ended(self) -> bool:
        """Whether it has ended, and only its parent does not know yet."""
        return self.state in "ZX"


def status(pid: int) -> Status | None:
    """Returns a process; None where it is gone, or hidden."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(errors="replace")
    except OSError:
        return None
    # The name before them may hold blanks and parentheses.
    state, *more = text[text.rindex(")") + 1 :].split()
    return Status(state, int(more[0]), int(more[1]), int(more[18]))


def started(pid: int) -> int | None:
    """Returns when a process started, in ticks since the boot; None for one that has ended."""
    found = status(pid)
    if found is None:
        # /proc may be mounted so that it shows nothing of other users' processes.
        return HIDDEN if _is_another_users(pid) else None
    return None if found.has_ended else found.started


def kernel() -> str:
    """Returns the id of this machine's boot; empty where the system has none."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""


def namespace() -> str:
    """Returns the namespace in which process numbers count; containers may have their own."""
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""


def briefly(call: Callable[..., object], *arguments: object, seconds: float) -> None:
    """Calls what may hang, such as a disk, and waits for it no longer than so many seconds."""
    thread = threading.Thread(target=call, args=arguments, daemon=True)
    thread.start()
    thread.join(seconds)


def check_workers(workers: int) -> None:
    """Refuses more loading processes than the machine of this rank can have use of.

    Raises: ConfigError: naming the number of cores that this process may use.
    """
    cores = len(os.sched_getaffinity(0))
    most = max(FEWEST_WORKERS, WORKERS_PER_CORE * cores)
    if workers > most:
        raise ConfigError(
            f"data.workers: too many loading processes; got {workers}, expected at most {most} for "
            f"each rank on the {cores} core{'s' if cores > 1 else ''} that it may use. Set "
            f"--data.workers {cores}."
        )


def handlers_to_replace() -> dict[signal.Signals, Any]:
    """Returns the handlers, by signal, of those `SIGNALS` that may be caught.

    nohup, and a shell for its background jobs, ignore some of them: that stays. None stands for a
    handler that is not Python's, which cannot be given back.
    """
    handlers = {number: signal.getsignal(number) for number in SIGNALS}
    return {number: it for number, it in handlers.items() if it != signal.SIG_IGN}


def _is_another_users(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except PermissionError:
        return True
    except OSError:
        pass
    return False
