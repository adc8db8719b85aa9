"""Builds DeepSpeed's compiled operations once on each node, and says whether a node can build them.

torch compiles an operation at its first use. Meanwhile a file `lock` is in the operation's folder,
for which other processes wait without a limit. A job that is killed while it compiles leaves this
file behind, and every later launch would wait for ever. Here one rank of a node compiles, in a
process that a time limit ends. Each process that compiles or loads holds a lock of the operating
system, which is released when the process ends; a file `lock` that its holder finds is stale.
"""

from __future__ import annotations

import fcntl
import hashlib
import logging
import os
import platform
import signal
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import torch

from fd_large.engine.zero.private_names import get
from fd_large.errors import named
from fd_large.files import kind_of
from fd_large.ranks import distributed

log = logging.getLogger(__name__)

# FusedAdam steps the masters on GPUs. CPUAdam and AsyncIO are built in the image, for programs that
# use them; a run of this package does not.
NAMES = ("FusedAdam", "CPUAdam", "AsyncIO")
# FusedAdam takes a minute or two on an idle node.
BUILD_SECONDS = 600.0
BUILD = (
    "import sys; from deepspeed.ops import op_builder; "
    "getattr(op_builder, sys.argv[1] + 'Builder')().load(verbose=False)"
)


class Op(NamedTuple):
    """A compiled operation of DeepSpeed.

    Attributes:
        name: DeepSpeed's name of the operation.
        buildable: Whether its compiler and libraries are there, by DeepSpeed's own check.
        built: Whether the compiled library exists, installed or built by an earlier run.
    """

    name: str
    buildable: bool
    built: bool


def ops() -> list[Op]:
    """Returns the state of each of DeepSpeed's operations in `NAMES`; compiles none."""
    operations = []
    for name in NAMES:
        builder = _builder(name)
        try:
            buildable = bool(builder.is_compatible(verbose=False))
        except Exception:  # DeepSpeed raises many kinds, all of which mean that it cannot.
            buildable = False
        operations.append(Op(name, buildable, _is_built(builder.name)))
    return operations


def load(name: str) -> str | None:
    """Builds an operation on each node that lacks it, then loads it on every rank.

    All ranks must call this function, since all of them or none use the operation. Returns why the
    operation cannot be used, the same on all ranks, or None if it can. `name` is DeepSpeed's name.
    """
    os.environ["TORCH_EXTENSIONS_DIR"] = str(folder())
    # All waits here have limits of their own, which may add up to more than the watchdog's.
    with distributed.moving():
        built = agreed(lambda: _build(name) if distributed.local_rank() == 0 else None)
        return built or agreed(lambda: _load(name))


def agreed(why_not: Callable[[], str | None]) -> str | None:
    """Calls a check, which returns a complaint or None, on every rank.

    Returns the complaint of the lowest rank that has one, with the name of its node, or None if no
    rank complains; the same on all ranks.
    """
    ranks = distributed.gather_objects((why_not(), distributed.node_name()))
    return next((f"{reason} (on {node})" for reason, node in ranks if reason), None)


def folder() -> Path:
    """Returns the folder of built operations: TORCH_EXTENSIONS_DIR, or one on the node's disk."""
    return Path(os.environ.get("TORCH_EXTENSIONS_DIR") or _own_folder())


def _own_folder() -> Path:
    # torch's own default is in the home directory, which nodes share. With TORCH_EXTENSIONS_DIR it
    # does not tell versions apart.
    versions = platform.python_version(), torch.__version__, version("deepspeed")
    return _private() / "_".join(("python{}", "torch{}", "deepspeed{}")).format(*versions)


def _private() -> Path:
    return Path(tempfile.gettempdir()) / f"fd_large_{os.getuid()}"


def _builder(name: str) -> Any:
    return get(f"deepspeed.ops.op_builder:{name}Builder")()


def _is_built(name: str) -> bool:
    installed = get("deepspeed.git_version_info:installed_ops")
    return bool(installed.get(name)) or bool(kind_of(folder() / name / f"{name}.so"))


def _build(name: str) -> str | None:
    """Compiles an operation in a separate process, unless it is compiled already.

    Returns why the operation cannot be compiled, or None if it is compiled now.
    """
    try:
        builder = _builder(name)
        if _is_built(builder.name):
            return None
        if not builder.is_compatible(verbose=False):
            return "the operation does not build: its compiler or libraries are missing"
        with _turn(builder.name) as turn:
            if _is_built(builder.name):
                return None
            log.info("compiling DeepSpeed's %s in %s", name, folder())
            return _compile(name, folder() / f"{builder.name}.log", turn)
    except Exception as error:  # DeepSpeed raises many kinds, whatever a compiler says.
        return f"the operation does not build: {named(error)}"


def _compile(name: str, log_file: Path, turn: int) -> str | None:
    with open(log_file, "wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-P", "-c", BUILD, name],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            # The turn lasts as long as the compiler does, also where this rank is killed.
            pass_fds=(turn,),
        )
        try:
            code = process.wait(BUILD_SECONDS)
        except subprocess.TimeoutExpired:
            return f"the operation does not build within {BUILD_SECONDS:.0f} s"
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    if not code:
        return None
    lines = [line for line in log_file.read_text(errors="replace").splitlines() if line.strip()]
    wrong = [line for line in lines if "error" in line.lower()] or lines[-1:] or ["no output"]
    return f"the operation does not build: {wrong[0].strip()[:200]} ({log_file})"


def _load(name: str) -> str | None:
    try:
        builder = _builder(name)
        with _turn(builder.name):
            builder.load(verbose=False)
    except Exception as error:  # Builders raise many kinds.
        return f"the operation does not load: {named(error)}"
    return None


@contextmanager
def _turn(name: str) -> Iterator[int]:
    """Holds this node's lock while the operation `name` is compiled or loaded.

    A stale lock file that torch has left is removed. Yields the file descriptor of the node's lock.

    Raises:
        TimeoutError: If another process holds a lock for more than BUILD_SECONDS.
        PermissionError: If other users can write to the folder of the lock.
    """
    private = _private()
    private.mkdir(mode=0o700, exist_ok=True)
    status = private.lstat()
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid() or status.st_mode & 0o022:
        # Whoever else writes there could have another library loaded.
        raise PermissionError(f"{private} is not a folder of this user alone")
    root = folder()
    root.mkdir(parents=True, exist_ok=True)
    until = time.monotonic() + BUILD_SECONDS
    key = hashlib.sha256(str(root.resolve()).encode()).hexdigest()[:16]
    with open(private / f"{key}.turn", "w") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                _wait(until, f"another process compiles in {root}")
        lock = root / name / "lock"
        while kind_of(lock):
            # Other nodes, and programs that take no turns, write to a folder of the user's.
            if root == _own_folder() or _unchanged_seconds(lock.parent) > BUILD_SECONDS:
                log.warning(
                    "%s: this lock of a process that ended while it compiled was removed", lock
                )
                lock.unlink(missing_ok=True)
            else:
                _wait(until, f"{lock} is held by another program")
        yield file.fileno()
        # A compiler that was killed left it; one that ends by itself removes its own.
        if root == _own_folder():
            lock.unlink(missing_ok=True)


def _wait(until: float, why: str) -> None:
    if time.monotonic() > until:
        raise TimeoutError(why)
    time.sleep(0.2)


def _unchanged_seconds(path: Path) -> float:
    """Returns the seconds since the newest file directly in a folder was written.

    The times are those of the file server's clock. For a folder without files, the result is the
    server's time in seconds since 1970.
    """
    with tempfile.NamedTemporaryFile(dir=path) as now:
        times = []
        for file in path.iterdir():
            with suppress(FileNotFoundError):  # A compiler's own, on its way out.
                if file != Path(now.name):
                    times.append(file.lstat().st_mtime)
        return os.stat(now.name).st_mtime - max(times, default=0.0)
