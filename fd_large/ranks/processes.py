"""Reads the state of processes from /proc, and ends a rank whose launcher is gone.

SIGTERM to the `deepspeed` command kills only the runner, and a killed launcher does not forward
signals, so ranks would continue and hold their GPUs. prctl(PR_SET_PDEATHSIG) reports only the end
of a process's parent, but the runner is the parent's parent; so a thread of each rank watches its
ancestors in /proc. Ranks under srun are ended by Slurm. This file does not import torch.
"""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from fd_large.errors import ConfigError
from fd_large.ranks.starting import await_the_end

log = logging.getLogger(__name__)

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP)
"""Signals that ask a process to stop, from a scheduler, Ctrl-C, or a terminal that is closed."""
WORKERS_PER_CORE, FEWEST_WORKERS = 16, 64
"""Most loading processes of a rank for each of its cores, and a number that is always allowed.

More processes do not load faster, and thousands take the machine down.
"""
HIDDEN = -1
"""Stands for the start time of a process that this user may not see."""

ORPHAN_GRACE_SECONDS = 20.0
"""Seconds from SIGTERM to the end of a rank whose launcher is gone, unless a `hold` is active."""

WATCH_INTERVAL_SECONDS = 1.0

_DEEPSPEED_RUNNERS = frozenset({"deepspeed", "ds", "deepspeed.pt", "deepspeed.launcher.runner"})
_DEEPSPEED_LAUNCH = "deepspeed.launcher.launch"
_LAUNCHERS = _DEEPSPEED_RUNNERS | {
    *(_DEEPSPEED_LAUNCH, "torchrun", "torch.distributed.run", "torch.distributed.launch"),
    *("mpirun", "mpiexec", "prterun", "orterun", "prte", "prted", "orted"),
    *("mpirun.hydra", "mpiexec.hydra", "hydra_pmi_proxy", "hydra_bstrap_proxy"),
}
# This package, if it starts ranks itself.
_OWN_PROGRAMS = ("fd_large", "fd-large")

_watcher: threading.Thread | None = None
_holds: list[None] = []


class Status(NamedTuple):
    """State of a process, from proc(5).

    Attributes:
        state: State as one letter.
        parent: Process id of the parent.
        group: Id of the process group.
        started: Time of the process's start, in ticks since the boot.
    """

    state: str
    parent: int
    group: int
    started: int

    @property
    def has_ended(self) -> bool:
        """Whether the process has ended, even if its parent has not noticed yet."""
        return self.state in "ZX"


def status(pid: int) -> Status | None:
    """Returns the state of the process `pid`, or None if the process is gone or hidden."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(errors="replace")
    except OSError:
        return None
    # The program's name before these fields may hold blanks and parentheses.
    state, *more = text[text.rindex(")") + 1 :].split()
    return Status(state, int(more[0]), int(more[1]), int(more[18]))


def started(pid: int) -> int | None:
    """Returns the time at which a process started.

    Args:
        pid: ID of the process.

    Returns: the time in ticks since the machine's boot; None if the process has ended; the constant
        HIDDEN if it belongs to another user and /proc does not show it.
    """
    process = status(pid)
    if process is None:
        # /proc may be mounted so that it shows nothing of other users' processes.
        return HIDDEN if _is_another_users(pid) else None
    return None if process.has_ended else process.started


def kernel() -> str:
    """Returns the id of this machine's boot, or "" if the system has no such id."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""


def namespace() -> str:
    """Returns the name of this process's namespace of process ids, or "" if it is unknown.

    A container may have a namespace of its own.
    """
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""


def briefly(call: Callable[..., object], *arguments: object, seconds: float) -> None:
    """Calls a function that may hang, such as on a disk, and waits for at most `seconds`.

    The call goes on in a thread after this time. Its result is dropped, and its errors are not
    raised.

    Args:
        call: The function.
        arguments: Arguments of the function.
        seconds: Time to wait, in seconds.
    """
    thread = threading.Thread(target=call, args=arguments, daemon=True)
    thread.start()
    thread.join(seconds)


def check_workers(workers: int) -> None:
    """Checks that a rank's number of loading processes is not too large for its machine.

    Args:
        workers: Number of loading processes.

    Raises: ConfigError: if the number is too large for the cores that this process may use.
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
    """Returns the present handlers of the `SIGNALS` that training may catch, by signal.

    Ignored signals are left out, so that what nohup or a shell's background job ignores stays
    ignored. A None in the result is a handler outside of Python, which cannot be restored. If the
    present handler is that of `starting.py`, the result has the signal's default action instead, so
    that training restores the default action at its end.
    """
    handlers = {number: signal.getsignal(number) for number in SIGNALS}
    waits = (number for number in SIGNALS if handlers[number] is await_the_end)
    handlers |= dict.fromkeys(waits, signal.SIG_DFL)
    return {number: handler for number, handler in handlers.items() if handler != signal.SIG_IGN}


def watch_launcher(tell: Callable[[int, str], None], longest_hold: float) -> None:
    """Starts the thread that ends this rank when its launcher is gone; a second call does nothing.

    A rank without launcher sends itself SIGTERM, so that a handler may save. The rank then ends
    with exit code 143 after ORPHAN_GRACE_SECONDS, or, if a `hold` is active at that time, when the
    `hold` ends. Without /proc or without a known launcher nothing is watched.

    Args:
        tell: Reports exit code and reason to the other ranks.
        longest_hold: Seconds after ORPHAN_GRACE_SECONDS for which a `hold` may keep the rank.
    """
    global _watcher
    line = list(_ancestors())
    launchers = {pid: name for pid in line if (name := _launcher_name(_arguments(pid)))}
    if _watcher is None and launchers:
        # The line goes up to the highest launcher.
        line = line[: line.index(max(launchers, key=line.index)) + 1]
        _watcher = threading.Thread(
            target=_watch,
            args=(line, launchers, tell, longest_hold),
            name="watch_launcher",
            daemon=True,
        )
        _watcher.start()


def nearest_launcher() -> int:
    """Returns the process id of the nearest ancestor that is a launcher, or 0 if there is none."""
    return next((pid for pid in _ancestors() if _launcher_name(_arguments(pid))), 0)


@contextmanager
def hold() -> Iterator[None]:
    """Keeps this rank alive within the `with` block, although its launcher is gone.

    A rank uses this while it finishes writing a checkpoint. The argument `longest_hold` of
    `watch_launcher` limits the time.
    """
    _holds.append(None)
    try:
        yield
    finally:
        _holds.pop()


def _is_another_users(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except PermissionError:
        return True
    except OSError:
        pass
    return False


def _watch(
    line: list[int],
    launchers: dict[int, str],
    tell: Callable[[int, str], None],
    longest_hold: float,
) -> None:
    gone = "deepspeed" if _lost_its_runner(launchers) else ""
    while not gone:
        time.sleep(WATCH_INTERVAL_SECONDS)
        # A process that ends loses its children at once: an unchanged line of ancestors is alive.
        for pid, was in zip([*islice(_ancestors(), len(line)), 0], line, strict=False):
            if pid != was:
                above = line[line.index(was) :]
                gone = next(launchers[pid] for pid in above if pid in launchers)
                break
    rank = os.environ.get("RANK", "0")
    log.error("rank %s: %s, which started this rank, is gone; stopping", rank, gone)
    os.kill(os.getpid(), signal.SIGTERM)
    deadline = time.monotonic() + ORPHAN_GRACE_SECONDS
    latest = deadline + longest_hold
    while time.monotonic() < deadline or (_holds and time.monotonic() < latest):
        time.sleep(0.1)
    tell(128 + signal.SIGTERM, f"{gone}, which started it, is gone")
    os._exit(128 + signal.SIGTERM)


def _ancestors() -> Iterator[int]:
    """Yields the process ids of this process's ancestors, nearest first."""
    pid = os.getpid()
    while (process := status(pid)) is not None and (pid := process.parent) > 0:
        yield pid


def _arguments(pid: int) -> list[str]:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text(errors="replace").rstrip("\0").split("\0")
    except OSError:
        return []


def _launcher_name(arguments: list[str]) -> str | None:
    """Returns the name of the launcher that a command line starts, or None if it starts none.

    Args:
        arguments: The command line as a list. Python and its options in front of a script or module
            are skipped.
    """
    words = iter(arguments)
    program = os.path.basename(next(words, ""))
    if program.startswith("python"):
        program = ""
        for word in words:
            if word in ("-m", "-c"):
                program = next(words, "") if word == "-m" else ""
                break
            if word in ("-X", "-W"):
                next(words, None)
            elif not word.startswith("-"):
                program = os.path.basename(word)
                break
    if program in _OWN_PROGRAMS and next(words, "").startswith("--ranks"):
        return program
    return program if program in _LAUNCHERS else None


def _lost_its_runner(launchers: dict[int, str]) -> bool:
    """Returns whether the `deepspeed` command had already ended when this rank began to watch.

    The launch.py of such a command has no runner as ancestor and is in a process group whose leader
    is gone. A launch.py that was started by hand or over ssh leads its own process group, or a
    shell leads the group.

    Args:
        launchers: The launchers among this process's ancestors: {process ID: name}.
    """
    launch = next((pid for pid, name in launchers.items() if name == _DEEPSPEED_LAUNCH), 0)
    if not launch or not _DEEPSPEED_RUNNERS.isdisjoint(launchers.values()):
        return False
    process = status(launch)
    leader = process and status(process.group)
    return leader is None or leader.has_ended
