"""Ends all ranks after a failure of one rank, through the store at which the ranks met.

A rank that fails leaves its peers in a collective. Over gloo the peers see a closed connection;
over NCCL the peers wait in a kernel, for as long as the launcher lets them. So a rank that ends
with an exit code other than 0 first writes the code and the reason under a key of the store. A
thread of every rank looks at that key once a second, and ends its process if the key is set. The
same thread notices that the store is gone (rank 0 died), and that another rank of its node was
killed. The thread makes no collective and adds nothing to a step.

An exit file reports the code and the reason to the batch script, from the first line of the program
on. This file does not import torch: the store is an argument.
"""

from __future__ import annotations

import atexit
import json
import logging
import multiprocessing
import os
import select
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from fd_large.errors import Exit, FDError, printable, without_secrets
from fd_large.files import kind_of, parse_json, write_json
from fd_large.ranks import processes
from fd_large.ranks.launch import find_rank, is_first_of_node
from fd_large.ranks.processes import briefly

log = logging.getLogger(__name__)

EXITS_FOLDER = "FD_LARGE_EXITS"
"""The variable with the folder for exit files; slurm/launch.sh sets it."""
LONGEST_WAIT_SECONDS = 1800.0
"""How long a collective waits for a rank before it fails."""
SECONDS_BETWEEN_LOOKS = 1.0
_GONE = "its process, or the node of that process, is gone"
GRACE_SECONDS = 5.0
"""Seconds in which the main thread may end by itself, with its own message and exit code."""
SECONDS_TO_CONNECT_AGAIN = 5.0
SECONDS_FOR_LAST_WORDS = 2.5
"""Longest wait for the store, which does not answer if rank 0 is stopped, or for the log's disk."""

_END, _LEFT, _PROCESS = "end", "left", "process"


class Ending(NamedTuple):
    """The reason why the ranks end.

    Attributes:
        rank: The rank that reported its end, or that was found dead.
        code: Exit code of the rank; 0 if the rank is rank 0, which has finished. The end of rank 0
            closes the store.
        reason: The reason in one sentence.
    """

    rank: int
    code: int
    reason: str

    def __str__(self) -> str:
        return f"rank {self.rank} has failed (exit code {self.code}): {self.reason}"


class Store(Protocol):
    """Interface of torch's stores, as far as this file needs it.

    Each method raises RuntimeError if the server is gone.
    """

    def set(self, key: str, value: str) -> None:
        """Sets the value of `key` to `value`."""

    def get(self, key: str) -> bytes:
        """Returns the value of `key`, which must exist."""

    def check(self, keys: list[str]) -> bool:
        """Returns whether all of `keys` exist."""

    def compare_set(self, key: str, expected: str, desired: str) -> bytes:
        """Sets the value of `key` to `desired` if its present value is `expected`.

        If `expected` is "", the value is set if the key does not exist.
        """


class Watch:
    """Thread that ends this rank after another rank's failure.

    Args:
        connect: Function that returns a client of the store for this watch alone, since a waiting
            call blocks other callers. The argument is the number of seconds after which connecting
            fails.
        rank: This rank.
        world_size: Number of ranks.
        meeting_seconds: Time in seconds that the ranks may take to connect to the store.
        neighbours: The other ranks of this node whose processes are watched.
        leave: Function that ends the process, given the exit code.
    """

    def __init__(
        self,
        connect: Callable[[float], Store],
        rank: int,
        world_size: int,
        *,
        meeting_seconds: float,
        neighbours: Iterable[int] = (),
        leave: Callable[[int], Any] = os._exit,
    ) -> None:
        self._connect, self._rank, self._world_size = connect, rank, world_size
        self._meeting_seconds, self._leave = meeting_seconds, leave
        # {rank: descriptor that becomes readable when its process ends; None until it is known}.
        self._neighbours: dict[int, int | None] = dict.fromkeys(neighbours)
        self._store: Store | None = None
        self._known: Ending | None = None
        self._connected, self._over = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._watch, name="failures", daemon=True)

    def start(self) -> None:
        """Starts the thread that watches the other ranks."""
        self._thread.start()

    def stop(self, code: int = 0, reason: str = "") -> None:
        """Ends the watch when this rank leaves, and tells the other ranks.

        Rank 0, whose end closes the store, waits briefly until the other ranks have left too.

        Args:
            code: This rank's exit code. With a code other than 0 the other ranks end. With 0,
                rank 0 stops their watches, and another rank only notes that it has left.
            reason: The reason in one sentence. If several ranks fail, the first reason is kept.
        """
        if self._over.is_set():
            return
        self._over.set()
        briefly(self._tell, Ending(self._rank, code, reason), seconds=SECONDS_FOR_LAST_WORDS)
        # A thread inside the store's code while the interpreter ends would abort the process.
        if threading.current_thread() is not self._thread:
            self._thread.join(SECONDS_FOR_LAST_WORDS)

    def _tell(self, ending: Ending) -> None:
        if not self._connected.wait(SECONDS_FOR_LAST_WORDS):
            return
        assert self._store is not None
        with suppress(RuntimeError):
            self._store.set(f"{_LEFT}/{self._rank}", "")
            if ending.code or self._rank == 0:
                self._store.compare_set(_END, "", json.dumps(ending))
            others = [f"{_LEFT}/{rank}" for rank in range(1, self._world_size)]
            until = time.monotonic() + SECONDS_FOR_LAST_WORDS
            while self._rank == 0 and time.monotonic() < until and not self._store.check(others):
                time.sleep(0.02)

    def _watch(self) -> None:
        try:
            self._store = self._connect(self._meeting_seconds)
        except RuntimeError as error:
            # The ranks do not meet, which the main thread reports.
            log.debug("no watch over the other ranks: %s", error)
            return
        self._connected.set()
        with suppress(RuntimeError):
            self._store.set(f"{_PROCESS}/{self._rank}", json.dumps(_this_process()))
        while not self._over.wait(SECONDS_BETWEEN_LOOKS):
            ending = self._look()
            if ending is not None:
                # Rank 0 may close the store from here on, and the main thread ask why this ends.
                self._known = ending if ending.code else None
                with suppress(RuntimeError):
                    self._store.set(f"{_LEFT}/{self._rank}", "")
                if ending.code:
                    self._end(ending)
                return

    def heard(self) -> Ending | None:
        """Returns why the ranks end, or None if no failure of a rank is known.

        If the store cannot be reached, rank 0 counts as lost.
        """
        if self._known is not None or self._store is None:
            return self._known
        try:
            if self._store.check([_END]):
                return _ending_of(self._store.get(_END))
        except RuntimeError:  # The store was rank 0's.
            return Ending(0, Exit.LOST, _GONE)
        return None

    def _look(self) -> Ending | None:
        """Returns why this rank has to end or stop watching, or None if all ranks go on.

        If the store does not answer, the method connects to the store again. If this fails too,
        rank 0 counts as lost.
        """
        with suppress(RuntimeError):
            return self._ending()
        # One connection may break while the store and all ranks are well.
        with suppress(RuntimeError):
            self._store = self._connect(SECONDS_TO_CONNECT_AGAIN)
            return self._ending()
        return Ending(0, Exit.LOST, _GONE)

    def _ending(self) -> Ending | None:
        store = self._store
        assert store is not None
        if not store.check([_END]):
            lost = self._lost_neighbour(store)
            if lost is None:
                return None
            ending = Ending(lost, Exit.LOST, "its process was killed, or ended without a message")
            store.compare_set(_END, "", json.dumps(ending))
        return _ending_of(store.get(_END))

    def _lost_neighbour(self, store: Store) -> int | None:
        for rank, descriptor in list(self._neighbours.items()):
            if self._find(rank, store) if descriptor is None else _readable(descriptor):
                if not store.check([f"{_LEFT}/{rank}"]):
                    return rank
                del self._neighbours[rank]
        return None

    def _find(self, rank: int, store: Store) -> bool:
        """Begins to watch the process of rank `rank` of this node, by a descriptor of the process.

        If the rank has not registered its process in `store` yet, nothing changes, and a later call
        tries again. If this process cannot watch the rank's process, the rank is removed from the
        watched ranks.

        Returns: True if the rank's process has already ended, else False.
        """
        if not store.check([f"{_PROCESS}/{rank}"]):
            return False
        try:
            *space, pid = parse_json(store.get(f"{_PROCESS}/{rank}"))
            # Ranks in containers of their own do not see each other's processes.
            if space == _this_process()[:-1]:
                self._neighbours[rank] = os.pidfd_open(pid)
                return False
        except ProcessLookupError:
            return True
        except (OSError, AttributeError):
            pass  # Kernels before 5.3 and other systems have no such call.
        except (ValueError, TypeError, OverflowError):
            pass  # No rank wrote that.
        del self._neighbours[rank]
        return False

    def _end(self, ending: Ending) -> None:
        # Many short waits: none of them counts while the whole process is stopped.
        for _ in range(int(GRACE_SECONDS / 0.1)):
            if self._over.wait(0.1):
                return
        try:
            briefly(self._last_words, ending, seconds=SECONDS_FOR_LAST_WORDS)
            kill_workers()
        finally:
            self._leave(code_after(ending))

    def _last_words(self, ending: Ending) -> None:
        reason = str(ending)
        write_exit_file(code_after(ending), reason)
        # The terminal shows what rank 0 says, and another rank only where it cannot.
        extra = {"file_only": self._rank != 0 and not speaks_for(ending)}
        log.error("rank %d ends because %s", self._rank, reason, extra=extra)
        # A hung rank's watchdog writes its own.
        for write in last_words if ending.code != Exit.AGAIN else ():
            write(reason)


def _ending_of(text: bytes) -> Ending:
    """Parses the entry `text` of the store, in which a rank has reported its end.

    Any text is accepted, since anyone may write there. A text that no rank wrote counts as the loss
    of rank 0.
    """
    with suppress(ValueError, TypeError):
        rank, code, reason = parse_json(text)
        if (type(rank), type(code), type(reason)) == (int, int, str):
            return Ending(rank, code, printable(" ".join(reason.split())))
    return Ending(
        0, Exit.LOST, "the store over which the ranks met holds an entry that no rank wrote"
    )


def code_after(ending: Ending | None) -> Exit:
    """Returns the exit code of a rank that ends because another rank has ended.

    Args:
        ending: Reason for the end of the ranks; None if unknown.

    Returns: AGAIN (75) if the other rank ended with AGAIN, else LOST (1).
    """
    return Exit.AGAIN if ending is not None and ending.code == Exit.AGAIN else Exit.LOST


def speaks_for(ending: Ending | None) -> bool:
    """Returns whether this rank has to report the end of rank 0 on the terminal.

    If rank 0 has ended, rank 1 and the first rank of each node report its end, since the whole
    node of rank 0 may be gone.

    Args:
        ending: Reason for the end of the ranks, if known.
    """
    rank = find_rank()
    if ending is None or ending.rank != 0 or rank == 0:
        return False
    return rank == 1 or is_first_of_node()


last_words: list[Callable[[str], None]] = []
"""Functions called with the reason before a rank ends because another rank has; they must return
soon."""

_watch: Watch | None = None
_leaver: threading.Thread | None = None


def leave_to(thread: threading.Thread) -> None:
    """Records the thread that will end this process, so that `tell` in other threads waits for it.

    Args:
        thread: The thread.
    """
    global _leaver
    _leaver = thread


def watch(connect: Callable[[float], Store], rank: int, world_size: int, **more: Any) -> None:
    """Starts the thread that ends this rank after another rank's failure.

    Args:
        connect: Function that returns a client of the store for this watch alone. The argument is
            the number of seconds after which connecting fails.
        rank: This rank.
        world_size: Number of ranks.
        more: Further arguments of `Watch`.
    """
    global _watch
    _watch = Watch(connect, rank, world_size, **more)
    _watch.start()
    atexit.register(stop_watching)


def stop_watching() -> None:
    """Stops this rank's watch over the other ranks, if there is a watch.

    A rank calls this when it has finished, or when it no longer needs the other ranks.
    """
    global _watch
    if _watch is not None:
        _watch.stop()
    _watch = None


def tell(code: int, reason: str) -> None:
    """Reports an exit code other than 0 of this rank to the other ranks and the batch script.

    If another thread is about to end this process (`leave_to`), the function waits for that end
    instead.

    Args:
        code: The exit code.
        reason: The reason in one sentence.
    """
    if _leaver is not None and threading.current_thread() is not _leaver:
        _leaver.join()
    reason = without_secrets(reason)
    # First tell the other ranks: the disk of the exit file may hang.
    if _watch is not None:
        _watch.stop(code, reason)
    briefly(write_exit_file, code, reason, seconds=SECONDS_FOR_LAST_WORDS)


def heard() -> Ending | None:
    """Returns the failure that another rank has reported.

    The result is None if no failure is known, or if this rank does not watch the others.
    """
    return _watch.heard() if _watch is not None else None


def write_exit_file(code: int, reason: str, environ: Mapping[str, str] = os.environ) -> None:
    """Writes this rank's exit code for slurm/launch.sh, if FD_LARGE_EXITS names a folder.

    Without the file, the batch script gets at best the largest code of all ranks, and 137 if ranks
    were killed. A file that exists is kept, because the first code is the original cause.

    Args:
        code: The exit code.
        reason: The reason in one sentence.
        environ: The environment, which names the folder and the rank.
    """
    if not (folder := environ.get(EXITS_FOLDER)):
        return
    path = Path(folder) / f"rank_{find_rank(environ)}.json"
    with suppress(OSError, FDError):
        if not kind_of(path):
            write_json(path, {"code": code, "reason": reason})


def kill_workers() -> None:
    """Kills the loading processes, because a hanging process may outlive its parent."""
    for child in multiprocessing.active_children():
        child.kill()


def _readable(descriptor: int) -> bool:
    poll = select.poll()
    poll.register(descriptor, select.POLLIN)
    return bool(poll.poll(0))


def _this_process() -> list[str | int]:
    """Returns the ID of the machine's boot, the namespace of process IDs, and this process's ID.

    If the boot or the namespace is unknown, a text that is unique to this rank replaces the boot's
    ID, and "" the namespace.
    """
    where = [processes.kernel(), processes.namespace()]
    return [*(where if all(where) else [f"unknown of rank {find_rank()}", ""]), os.getpid()]
