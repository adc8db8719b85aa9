"""Gives one start of a run at a time the right to write the run's folder.

A start is one launch of a run. A start claims the folder before torch is imported, and shows by a
heartbeat that the start is alive. RUN/owner.json names the owner, and the modification time of this
file is the heartbeat, which is compared with the time of a file written next to it. A heartbeat
ahead of that time, or long before it, may come from another clock; then only a change of the file
while it is watched counts as a sign of life.

Nothing here needs torch, or file locks, which a network file system may lack. A claim is a hard
link, which exactly one process can make. A process that replaces or removes the owner.json of a
start S must first make owner.S.next, so that two processes that both find S dead cannot undo each
other's claim.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import queue
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import BinaryIO

from fd_large.checkpoint.owner import ASLEEP, Owner, Slurm
from fd_large.errors import ConfigError, Exit
from fd_large.files import unusable
from fd_large.recipes.file_names import LOGS, RECIPE, is_run, refuse_links
from fd_large.recipes.sections import STUDENTS

log = logging.getLogger(__name__)

OWNER = "owner.json"
BEAT_SECONDS = 10.0
"""Seconds between two heartbeats of an owner."""
STALE_SECONDS = 120.0
"""Seconds without a heartbeat after which an owner counts as dead, unless its process can be seen
or Slurm says that its job is suspended."""
WATCH_SECONDS = 2 * BEAT_SECONDS
"""Seconds for which an owner without a recent heartbeat is watched before it counts as dead, since
all heartbeats are old after a stall of the file system."""
# Files that a folder may hold before its run has written recipe.json: a start that was killed
# earlier leaves them, and so do scripts that log there.
_LEFT_BEFORE = ("owner.*", f"*{RECIPE}*", "stop", "*.log", "*.out", "*.err")
LEAVING_SECONDS = 900.0
"""Seconds for which a new start waits for an owner that is saving and ending."""
_MOST_BYTES = 1 << 16
"""Number of bytes that are read of an owner.json, which is smaller."""


class OwnedError(ConfigError):
    """Error for a run folder that another launch of the run owns."""


class Lease:
    """The right of one launch of a run to write the run's folder.

    Rank 0 gets its lease from `claim`, which also starts the thread of the heartbeat. Each other
    rank makes a lease without a heartbeat, with the ID of the same launch.

    Args:
        folder: The run's folder.
        start: ID of the launch, which all ranks share.

    Attributes:
        root: The owned folder, which is the run's folder, or the folder of several students'
            runs in which it lies.
        taken_over: Message that says why the previous owner counted as dead; empty if there was no
            previous owner.
        entered: Whether this launch may write the run's files in the folder; the engine sets it.
    """

    def __init__(self, folder: Path, start: str) -> None:
        self.folder, self.start, self.taken_over, self.entered = folder, start, "", False
        self.root = folder
        self._made: list[Path] = []
        self._on_lost: Callable[[str], None] = _leave
        self._messages: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    def owned(self) -> bool:
        """Whether owner.json still names the launch that has this lease as the owner.

        The result is False if owner.json is missing, and True if it exists and cannot be read.
        """
        try:
            return _read(self.root / OWNER)[0].start == self.start
        except FileNotFoundError:
            return False
        except OSError:
            return True

    def inside(self, folder: Path) -> Lease:
        """Returns a lease for `folder`, the folder of a run that lies in the owned folder.

        An example is the folder of one of several students. The new lease has no owner.json of its
        own: it is valid as long as this lease is.
        """
        inner = Lease(folder, self.start)
        inner.root = self.root
        return inner

    def must_own(self) -> None:
        """Raises OSError if owner.json is gone or names another launch as the owner.

        The error is an OSError so that callers handle it like a failed write.
        """
        if not self.owned():
            raise OSError(f"{self.folder} is gone or has a new owner")

    def will_leave(self) -> None:
        """Makes the next launch that claims the folder wait while this launch saves and ends.

        Only rank 0's lease does this; the leases of other ranks do nothing. The method may be
        called in a signal handler.
        """
        if self._thread is not None:
            self._messages.put("leaving")

    def start_anew(self) -> Path | None:
        """Renames the owned folder if it has files, and makes an empty folder in its place.

        The new folder has the same owner. Only rank 0 calls this method.

        Returns: the new path of the old folder, or None if the folder had no files to keep.
        Raises:
            OwnedError: if another launch made the folder at the same moment.
            ConfigError: if the folder is not a run's, or contains this process's current folder.
        """
        if not any(not path.name.startswith("owner.") for path in self.root.iterdir()):
            return None
        root = self.root.resolve()
        if not is_run(root) and (foreign := _foreign(root)):
            raise ConfigError(
                f"--fresh: {self.root}: not a run's folder, so it is not moved aside; got "
                f"{foreign} and no {RECIPE}, expected a run or an empty folder. Set "
                "--runtime.run_dir to another folder."
            )
        if not self.root.is_absolute() and Path.cwd().is_relative_to(root):
            raise ConfigError(
                f"--fresh: {self.root}: the current folder is inside this run folder and would be "
                f"moved too; got {Path.cwd()}, expected a folder outside {root}. Start from "
                "another folder."
            )
        number = 1
        while (old := root.with_name(f"{root.name}.old-{number}")).exists():
            number += 1
        empty = root.with_name(f".{root.name}.{self.start}")
        empty.mkdir()
        record = (root / OWNER).read_text()
        _write(empty / OWNER, record)
        root.rename(old)
        try:
            empty.rename(root)
        except OSError:
            (empty / OWNER).unlink()
            empty.rmdir()
            raise OwnedError(
                f"--fresh: {self.root}: another start made this folder at the same moment; got "
                f"its files, expected no files. The old run is in {old}. Start again."
            ) from None
        (old / OWNER).unlink(missing_ok=True)
        return old

    def release(self) -> None:
        """Ends the heartbeat and removes owner.json.

        Then the folder and its parents are removed, if `claim` made them and they are empty. If the
        file system hangs, nothing is removed. Leases without a heartbeat do nothing.
        """
        if self._thread is None:
            return
        self._messages.put("released")
        # Not for ever: its file system may hang.
        self._thread.join(BEAT_SECONDS)
        hangs, self._thread = self._thread.is_alive(), None
        if hangs:
            return
        with suppress(OSError):
            _remove(self.folder, self.start)
        for path in self._made:
            with suppress(OSError):  # Not empty: the run is in it.
                path.rmdir()

    def _keep(self, on_lost: Callable[[str], None]) -> None:
        self._on_lost = on_lost
        self._thread = threading.Thread(target=self._beat, name="lease", daemon=True)
        self._thread.start()

    def _beat(self) -> None:
        missing, leaves = 0, False
        while True:
            try:
                message = self._messages.get(timeout=BEAT_SECONDS)
            except queue.Empty:
                message = ""
            if message == "released":
                return
            leaves |= message == "leaving"
            path = self.folder / OWNER
            try:
                if leaves:
                    _leaving(self.folder, self.start).touch()
                    leaves = False
                with _opened(path) as file:
                    owner = Owner.parse(file.read(_MOST_BYTES))
                    if owner.start == self.start:
                        os.utime(file.fileno())
                        missing = 0
                        continue
                why = f"{owner} has taken the folder over"
            except FileNotFoundError:
                missing += 1
                # If the folder is missing too, the file system is absent, perhaps for a while.
                if missing < (2 if self.folder.exists() else STALE_SECONDS / BEAT_SECONDS):
                    continue
                why = f"{path} is gone"
            except OSError:
                # The file system will answer again, or the heartbeat ends and the lease with it.
                continue
            self._on_lost(
                f"{self.folder}: this run no longer owns it; {why}. This process ends without "
                "writing anything more."
            )
            return


def claim(
    folder: Path,
    *,
    say: Callable[[str], None] = log.warning,
    on_lost: Callable[[str], None] | None = None,
) -> Lease:
    """Makes this process the owner of a run's folder; only rank 0 calls this function.

    A dead owner is replaced. If the owner is saving and ending, this function waits for its end.

    Args:
        folder: The run's folder, which is made if missing.
        say: Function that is called with a line for the user before a longer wait.
        on_lost: Function that is called in another thread, with the reason, if another launch takes
            the folder over or owner.json is gone. By default the process ends with exit code 3.

    Raises:
        OwnedError: if another launch owns the folder, and is alive or may be alive.
        ConfigError: if the folder cannot be made or written.
    """
    this_process = replace(Owner.here(), folder=str(folder.resolve()))
    lease = Lease(folder, this_process.start)
    try:
        for path in (folder, *folder.glob(f"{STUDENTS}/*")):
            refuse_links(path)
        lease._made = _make(folder)
        aside = folder / f"owner.{this_process.start}.json"
        _write(aside, json.dumps(asdict(this_process), indent=1) + "\n")
        try:
            lease.taken_over = _claim(folder, this_process, aside, say)
        finally:
            aside.unlink(missing_ok=True)
        _sweep(folder)
        _refuse_overlap(folder, this_process.start)
    except OSError as error:
        raise unusable("--runtime.run_dir", error, folder) from error
    lease._keep(on_lost or lease._on_lost)
    return lease


@contextmanager
def claimed(folder: Path) -> Iterator[Lease]:
    """Claims the run's folder `folder` (`claim`), and releases it when the `with` block ends.

    Yields: the lease, which is the right of this launch to write the folder.
    """
    lease = claim(folder)
    try:
        yield lease
    finally:
        lease.release()


def living_owner(folder: Path, *, watch_seconds: float = 0.0) -> Owner | None:
    """Returns the owner of a folder if it is alive or may be alive, else None; writes nothing.

    Args:
        folder: The run's folder.
        watch_seconds: Seconds for which an owner is watched before it counts as dead. An owner is
            watched if this process cannot see the owner's process, and its last heartbeat is more
            than STALE_SECONDS from the present by this machine's clock.
    """
    try:
        owner, beat = _read(folder / OWNER)
        this_process, slurm = Owner.here(), Slurm()
        if owner.why_dead(this_process) or slurm.why_dead(owner, this_process):
            return None
        if owner.is_seen or slurm.state(owner, this_process) in ASLEEP:
            return owner
        if abs(time.time() - beat) <= STALE_SECONDS:
            return owner
        until = time.monotonic() + watch_seconds
        while time.monotonic() < until:
            time.sleep(min(1.0, watch_seconds))
            if (now := _read(folder / OWNER)) != (owner, beat):
                return now[0]
    except OSError:
        pass
    return None


def _claim(folder: Path, this_process: Owner, aside: Path, say: Callable[[str], None]) -> str:
    """Makes the file `aside` the owner.json of a folder, when there is no living owner.

    Args:
        folder: The run's folder.
        this_process: This process as an owner.
        aside: File in the folder with this process's owner record.
        say: Function that is called with a line for the user before a longer wait.

    Returns: why the previous owner counted as dead, or "" if there was no owner.
    Raises: OwnedError: if the owner is alive or may be alive.
    """
    begin = time.monotonic()
    waits, warned, slurm = False, False, Slurm()
    sign: tuple[str, float] | None = None
    since, has_beaten = begin, False
    while True:
        chain = _chain(folder)
        if not chain:
            if _link(aside, folder / OWNER):
                return ""
            continue
        owner, beat = chain[-1]
        if sign != (owner.start, beat):
            has_beaten = sign is not None and sign[0] == owner.start
            sign, since = (owner.start, beat), time.monotonic()
        why = owner.why_dead(this_process) or slurm.why_dead(owner, this_process)
        if not why:
            age = _age(aside, beat)
            is_ahead = age < -BEAT_SECONDS
            # The heartbeat may be of another clock: then the time counts for which it stood still.
            silent = time.monotonic() - since if is_ahead or has_beaten else age
            # A start that replaces or removes an owner.json needs only a moment for it.
            patience = 5.0 if len(chain) > 1 else 0.0
            if _leaving(folder, owner.start).exists():
                patience = LEAVING_SECONDS
                if not waits:
                    say(f"{folder}: waiting until its owner has saved and ended ({owner})")
                waits = True
            if silent < STALE_SECONDS and time.monotonic() - begin < patience:
                time.sleep(1.0 if waits else 0.1)
                continue
            asleep = slurm.state(owner, this_process) in ASLEEP
            is_alive = silent < STALE_SECONDS and (has_beaten or not is_ahead)
            if is_alive or owner.is_seen or asleep:
                raise _refusal(folder, owner, max(0.0, silent))
            watched = STALE_SECONDS if is_ahead else WATCH_SECONDS
            if not warned:
                silence = (
                    "writes times in the future"
                    if is_ahead
                    else f"has written no heartbeat for {silent:.0f} s"
                )
                say(f"{folder}: its owner ({owner}) {silence}; watching it for {watched:.0f} s")
                warned = True
            if is_ahead and silent < STALE_SECONDS:
                time.sleep(min(1.0, STALE_SECONDS / 10))
                continue
            if not is_ahead:
                time.sleep(WATCH_SECONDS)
                if _chain(folder) != chain:
                    continue
                silent += WATCH_SECONDS
            why = f"no heartbeat for {silent:.0f} s"
        if _succeed(folder, [each.start for each, _ in chain], this_process.start, aside):
            return f"{folder}: taken over from a dead run: {owner}; {why}"


def _refuse_overlap(folder: Path, start: str) -> None:
    """Checks that no overlapping run has a living owner.

    The run of several students and a run of one of its students overlap. Each launch claims its own
    folder first, so that of two launches at least one sees the other's claim.

    Args:
        folder: The run's folder, which this launch has claimed.
        start: ID of this launch.

    Raises:
        OwnedError: if an overlapping run has a living owner; this launch's owner.json is removed
            first.
    """
    others = [folder.parents[1]] if folder.parent.name == STUDENTS else []
    for other in (*others, *folder.glob(f"{STUDENTS}/*")):
        if owner := living_owner(other, watch_seconds=WATCH_SECONDS):
            _remove(folder, start)
            raise OwnedError(
                f"{folder}: another start owns {other}, with which this run would share files; got "
                f"{owner}, expected no owner. Let that run end, or stop it (touch "
                f"{other / 'stop'})."
            )


def _age(aside: Path, beat: float) -> float:
    """Returns the seconds from a heartbeat to now, where now is the time of a file just touched.

    Args:
        aside: A file in the run's folder, which is touched so that the clock of the file system
            gives the present time.
        beat: Time of the heartbeat, in seconds since the epoch.

    Returns: the seconds, which are negative if the heartbeat is ahead of the present.
    """
    os.utime(aside)
    return aside.stat().st_mtime - beat


def _refusal(folder: Path, owner: Owner, silent: float) -> OwnedError:
    if _is_copy(folder, owner):
        return OwnedError(
            f"{folder}: a copy of {owner.folder}, whose run is alive; got an {OWNER} of that run "
            f"({owner}), expected none. To use the copy, remove {folder / OWNER} and "
            f"{folder / 'owner.*.json'}; the run itself continues."
        )
    remedy = (
        f"If that process hangs, end it: kill {owner.pid}."
        if owner.is_seen
        else f"If that process is dead, remove {folder / OWNER}, or wait: the folder is free "
        f"{STALE_SECONDS:.0f} s after the last sign of life."
    )
    return OwnedError(
        f"{folder}: another start owns this folder; got {owner}, last sign of life {silent:.0f} s "
        f"ago, expected no owner. Let that run end, stop it (touch {folder / 'stop'}), or set "
        f"another --runtime.run_dir. {remedy}"
    )


def _is_copy(folder: Path, owner: Owner) -> bool:
    """Whether `folder` is a copy of another folder, in which owner.json also names `owner`.

    The other folder is the one that `owner` recorded as its own. The result is False if `owner` has
    recorded no folder, if the recorded folder is `folder` itself, or if its owner.json cannot be
    read.
    """
    if not owner.folder or Path(owner.folder) == folder.resolve():
        return False
    theirs = Path(owner.folder) / OWNER
    with suppress(OSError):
        # One file under two paths is one folder, mounted twice.
        same_file = theirs.stat().st_ino == (folder / OWNER).stat().st_ino
        return not same_file and _read(theirs)[0].start == owner.start
    return False


def _foreign(folder: Path) -> str:
    """Returns the name of a file in `folder` that no run would leave there, or "" if there is none.

    `folder` has no recipe.json. A launch that was killed before it wrote recipe.json leaves only a
    few kinds of files. Any other file shows that the folder is not a run's folder.
    """
    for path in sorted(folder.iterdir()):
        if path.name == LOGS and path.is_dir():
            if inside := _foreign(path):
                return f"{LOGS}/{inside}"
        elif not any(path.match(pattern) for pattern in _LEFT_BEFORE):
            return path.name
    return ""


# --- files -------------------------------------------------------------------------------------


def _leaving(folder: Path, start: str) -> Path:
    return folder / f"owner.{start}.leaving"


def _next(folder: Path, start: str) -> Path:
    return folder / f"owner.{start}.next"


def _read(path: Path) -> tuple[Owner, float]:
    """Reads the owner.json at `path`, or another file with the record of an owner.

    The file is opened anew at each call, so that NFS asks its server for the contents.

    Returns: the owner, and the time of its last heartbeat in seconds since the epoch.
    """
    with _opened(path) as file:
        return Owner.parse(file.read(_MOST_BYTES)), os.fstat(file.fileno()).st_mtime


def _opened(path: Path) -> BinaryIO:
    """Opens the file `path` for reading, without blocking if a named pipe has this name."""
    return os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb")


def _chain(folder: Path) -> list[tuple[Owner, float]]:
    """Returns the owner of a folder, followed by the launches that are about to replace it.

    owner.json names the owner. The launch that is about to replace the launch with ID S is named in
    owner.S.next. So the second element is from the file owner.S.next for the owner S, and so on.
    There is seldom more than one element.

    Args:
        folder: The run's folder.

    Returns: for each of these launches its owner record, and the modification time of the file with
        the record, in seconds since the epoch; empty if the folder has no owner.

    Raises:
        ConfigError: if a launch occurs twice, which is impossible unless others wrote the files.
    """
    chain: list[tuple[Owner, float]] = []
    path = folder / OWNER
    with suppress(FileNotFoundError):
        while True:
            owner, beat = _read(path)
            if any(owner.start == before.start for before, _ in chain):
                raise ConfigError(
                    f"--runtime.run_dir: {path}: names the same owner as an earlier owner file; "
                    f"got {owner.start} again, expected another owner. Remove {path}."
                )
            chain.append((owner, beat))
            path = _next(folder, owner.start)
    return chain


def _succeed(folder: Path, before: list[str], start: str, aside: Path) -> bool:
    """Replaces the owner.json of a dead owner by the owner.json of this launch.

    Args:
        folder: The run's folder.
        before: IDs of the launches that `_chain` returned when the last of them was judged dead.
        start: ID of this launch.
        aside: File in the folder with this launch's owner record.

    Returns: True, or False if another launch was quicker.
    """
    key = _next(folder, before[-1])
    if not _link(aside, key):
        return False
    # Is the chain as it was when its last owner was judged dead, with this start at its end?
    if [each.start for each, _ in _chain(folder)] != [*before, start]:
        key.unlink(missing_ok=True)
        return False
    # A file of its own: a rename onto another link of the same file does nothing.
    aside.replace(folder / OWNER)
    for name in before:
        _next(folder, name).unlink(missing_ok=True)
        _leaving(folder, name).unlink(missing_ok=True)
    return True


def _remove(folder: Path, start: str) -> None:
    """Removes owner.json from `folder` if it names the launch with ID `start`, which is ending.

    If another launch has begun to replace owner.json, the file stays.
    """
    key = _next(folder, start)
    aside = folder / f"owner.{start}.json"
    _write(aside, json.dumps(asdict(replace(Owner.here(), start=f"{start}-end"))))
    try:
        if _link(aside, key):
            try:
                if _read(folder / OWNER)[0].start == start:
                    (folder / OWNER).unlink()
            finally:
                key.unlink(missing_ok=True)
    finally:
        aside.unlink(missing_ok=True)
        _leaving(folder, start).unlink(missing_ok=True)


def _link(source: Path, target: Path) -> bool:
    """Makes `target` a hard link to `source`, or a new copy if there are no hard links.

    Returns: True, or False if `target` already exists.
    """
    try:
        os.link(source, target)
        return True
    except FileExistsError:
        # The answer of a network file system may have been lost, and the link been made.
        with suppress(FileNotFoundError):
            return os.path.samefile(source, target)
        return False
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS):
            raise
    # The file system has no hard links. Until the file is written, it names no known owner.
    try:
        descriptor = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    except FileExistsError:
        return False
    with os.fdopen(descriptor, "w") as file:
        file.write(source.read_text())
    return True


def _write(path: Path, text: str) -> None:
    with path.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _make(folder: Path) -> list[Path]:
    """Makes the folder `folder` and its missing parents.

    Returns: the new folders, innermost first; empty if `folder` already existed.
    """
    new_folders = []
    for path in (folder, *folder.parents):
        if path.exists():
            break
        new_folders.append(path)
    folder.mkdir(parents=True, exist_ok=True)
    return new_folders


def _sweep(folder: Path) -> None:
    """Removes files that killed launches left in `folder` while they claimed the folder.

    Files of a launch that is claiming the folder at present must stay; therefore only files older
    than twice `LEAVING_SECONDS` are removed.
    """
    now = time.time()
    for path in folder.glob("owner.*.*"):
        with suppress(OSError):
            if path.stat().st_mtime < now - 2 * LEAVING_SECONDS:
                path.unlink()


def _leave(why: str) -> None:
    log.error("%s", why)
    os._exit(Exit.LOOK)
