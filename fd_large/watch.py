"""A rank that watches the command that started it, and ends when that is gone.

SIGTERM to the `deepspeed` command kills only the runner; its launcher and the ranks would go on.
The watch reads /proc; where there is none it does nothing.
"""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

log = logging.getLogger(__name__)

ORPHAN_GRACE_SECONDS = 20.0
"""From SIGTERM to the end of a rank whose launcher is gone, unless a `hold` is active."""

WATCH_INTERVAL_SECONDS = 1.0

_DEEPSPEED_RUNNERS = frozenset({"deepspeed", "ds", "deepspeed.pt", "deepspeed.launcher.runner"})
_DEEPSPEED_LAUNCH = "deepspeed.launcher.launch"
_TORCHRUN = frozenset({"torchrun", "torch.distributed.run", "torch.distributed.launch"})
_MPIRUN = frozenset(
    {"mpirun", "mpiexec", "prterun", "orterun", "prte", "prted", "orted"}
    | {"mpirun.hydra", "mpiexec.hydra", "hydra_pmi_proxy", "hydra_bstrap_proxy"}
)
_LAUNCHERS = _DEEPSPEED_RUNNERS | {_DEEPSPEED_LAUNCH} | _TORCHRUN | _MPIRUN

_watcher: threading.Thread | None = None
_holds = 0
_holds_lock = threading.Lock()


@dataclass(frozen=True)
class _Process:
    """A process as /proc shows it; the start time tells it from a later one with its id."""

    pid: int
    start_time: int
    parent: int
    group: int
    state: str

    @classmethod
    def read(cls, pid: int) -> _Process | None:
        try:
            stat = Path(f"/proc/{pid}/stat").read_text(errors="replace")
        except OSError:
            return None
        # proc(5): state, parent and group are fields 3 to 5, the start time is field 22; the
        # name before them may hold blanks and parentheses.
        fields = stat[stat.rindex(")") + 2 :].split()
        return cls(pid, int(fields[19]), int(fields[1]), int(fields[2]), fields[0])

    def is_running(self) -> bool:
        now = _Process.read(self.pid)
        return now is not None and now.start_time == self.start_time and now.state not in "ZX"

    def arguments(self) -> list[str]:
        try:
            text = Path(f"/proc/{self.pid}/cmdline").read_text(errors="replace")
        except OSError:
            return []
        return text.rstrip("\0").split("\0")


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


def _ancestors() -> dict[str, _Process]:
    """Returns the launchers among this process's ancestors, by name, nearest first."""
    found: dict[str, _Process] = {}
    process = _Process.read(os.getppid())
    while process is not None and process.pid > 0:
        if name := _launcher_name(process.arguments()):
            found.setdefault(name, process)
        process = _Process.read(process.parent)
    return found


def _lost_its_runner(launchers: Mapping[str, _Process]) -> bool:
    """Says whether the deepspeed command ended before this rank could see it.

    Its launch.py then has no runner above it and lives on in a process group without a leader;
    one that was started by hand or over ssh leads its own group or has a shell that does.
    """
    launch = launchers.get(_DEEPSPEED_LAUNCH)
    if launch is None or not _DEEPSPEED_RUNNERS.isdisjoint(launchers):
        return False
    leader = _Process.read(launch.group)
    return leader is None or leader.state in "ZX"


def watch_launcher() -> None:
    """Starts the thread that ends this rank once a command that started it is gone; once.

    The `deepspeed` command does not hand a SIGTERM on to its ranks, and a launcher that is killed
    hands on nothing: without the watch, ranks would go on and hold their GPUs. An orphaned rank
    sends itself SIGTERM, so that a handler may save, and leaves with code 143 after
    ORPHAN_GRACE_SECONDS, later only while a `hold` is active. Ranks under srun are ended by
    Slurm. Only on Linux, where /proc names the ancestors.
    """
    global _watcher
    if _watcher is not None:
        return
    if not Path("/proc/self/stat").exists():
        log.debug("no /proc here: ranks do not notice when their launcher is gone")
        return
    if launchers := _ancestors():
        _watcher = threading.Thread(
            target=_watch, args=(launchers,), name="watch_launcher", daemon=True
        )
        _watcher.start()


def _watch(launchers: Mapping[str, _Process]) -> None:
    gone = "deepspeed" if _lost_its_runner(launchers) else ""
    while not gone:
        time.sleep(WATCH_INTERVAL_SECONDS)
        gone = next((name for name, p in launchers.items() if not p.is_running()), "")
    rank = os.environ.get("RANK", "0")
    log.error("rank %s: %s, which started this rank, is gone; stopping", rank, gone)
    os.kill(os.getpid(), signal.SIGTERM)
    deadline = time.monotonic() + ORPHAN_GRACE_SECONDS
    while time.monotonic() < deadline or _holds:
        time.sleep(0.1)
    os._exit(128 + signal.SIGTERM)


@contextmanager
def hold() -> Iterator[None]:
    """Keeps an orphaned rank alive past its grace, for as long as a save takes."""
    global _holds
    with _holds_lock:
        _holds += 1
    try:
        yield
    finally:
        with _holds_lock:
            _holds -= 1
