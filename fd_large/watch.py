"""A rank that watches the command that started it, and ends when that is gone.

SIGTERM to the `deepspeed` command kills only the runner, and a launcher that is killed hands
nothing on: ranks would go on and hold their GPUs. prctl(PR_SET_PDEATHSIG) reports a process's
parent alone, and the runner is the parent's parent; so a thread looks at the ancestors in /proc.
Ranks under srun are ended by Slurm.
"""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path

from fd_large import failures
from fd_large.processes import status

log = logging.getLogger(__name__)

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

_watcher: threading.Thread | None = None
_holds: list[None] = []


def watch_launcher() -> None:
    """Starts the thread that ends this rank once a command that started it is gone; once.

    An orphaned rank sends itself SIGTERM, so that a handler may save, and leaves with code 143
    after ORPHAN_GRACE_SECONDS, later only while a `hold` is active. Only where there is /proc.
    """
    global _watcher
    line = list(_ancestors())
    launchers = {pid: name for pid in line if (name := _launcher_name(_arguments(pid)))}
    if _watcher is None and launchers:
        # The line goes up to the highest launcher.
        line = line[: line.index(max(launchers, key=line.index)) + 1]
        _watcher = threading.Thread(
            target=_watch, args=(line, launchers), name="watch_launcher", daemon=True
        )
        _watcher.start()


def nearest_launcher() -> int:
    """Returns the process number of the launcher that this rank descends from; 0: none is seen."""
    return next((pid for pid in _ancestors() if _launcher_name(_arguments(pid))), 0)


@contextmanager
def hold() -> Iterator[None]:
    """Keeps an orphaned rank alive past its grace, for as long as a step and a save take."""
    _holds.append(None)
    try:
        yield
    finally:
        _holds.pop()


def _watch(line: list[int], launchers: dict[int, str]) -> None:
    gone = "deepspeed" if _lost_its_runner(launchers) else ""
    while not gone:
        time.sleep(WATCH_INTERVAL_SECONDS)
        # A process that ends hands its children over at once: the same line is alive.
        for pid, was in zip([*islice(_ancestors(), len(line)), 0], line, strict=False):
            if pid != was:
                above = line[line.index(was) :]
                gone = next(launchers[pid] for pid in above if pid in launchers)
                break
    rank = os.environ.get("RANK", "0")
    log.error("rank %s: %s, which started this rank, is gone; stopping", rank, gone)
    os.kill(os.getpid(), signal.SIGTERM)
    deadline = time.monotonic() + ORPHAN_GRACE_SECONDS
    latest = deadline + failures.LONGEST_WAIT_SECONDS
    while time.monotonic() < deadline or (_holds and time.monotonic() < latest):
        time.sleep(0.1)
    failures.tell(128 + signal.SIGTERM, f"{gone}, which started it, is gone")
    os._exit(128 + signal.SIGTERM)


def _ancestors() -> Iterator[int]:
    """Yields the processes above this one, nearest first."""
    pid = os.getpid()
    while (found := status(pid)) is not None and (pid := found.parent) > 0:
        yield pid


def _arguments(pid: int) -> list[str]:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text(errors="replace").rstrip("\0").split("\0")
    except OSError:
        return []


def _launcher_name(arguments: list[str]) -> str | None:
    """Returns the known launcher that a command line runs, seen through python's own options."""
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
    return program if program in _LAUNCHERS else None


def _lost_its_runner(launchers: dict[int, str]) -> bool:
    """Says whether the deepspeed command ended before this rank could see it.

    Its launch.py then has no runner above it and lives on in a process group without a leader;
    one that was started by hand or over ssh leads its own group or has a shell that does.
    """
    launch = next((pid for pid, name in launchers.items() if name == _DEEPSPEED_LAUNCH), 0)
    if not launch or not _DEEPSPEED_RUNNERS.isdisjoint(launchers.values()):
        return False
    found = status(launch)
    leader = found and status(found.group)
    return leader is None or leader.has_ended
