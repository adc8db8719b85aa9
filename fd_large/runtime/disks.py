"""Checks the disk of a folder: the type of its file system, its free space and writing speed."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fd_large.errors import ConfigError
from fd_large.files import kind_of

# A write test ends at whichever comes first.
_WRITE_BYTES, _WRITE_SECONDS = 256 << 20, 2.0

IN_MEMORY = frozenset({"tmpfs", "ramfs"})
OVER_A_NETWORK = frozenset(
    (
        *("9p", "afs", "beegfs", "ceph", "cifs", "fuse.ceph", "fuse.gcsfuse", "fuse.glusterfs"),
        *("fuse.juicefs", "fuse.s3fs", "fuse.sshfs", "glusterfs", "gpfs", "lustre", "nfs", "nfs4"),
        *("orangefs", "panfs", "pvfs2", "smb3", "smbfs", "virtiofs", "wekafs"),
    )
)


def file_system(path: Path) -> str:
    """Returns the type of the file system that contains `path`, such as "ext4"; "?" if unknown."""
    import psutil

    real = path.resolve()
    mounts = [m for m in psutil.disk_partitions(all=True) if real.is_relative_to(m.mountpoint)]
    # Of several file systems on one mount point the last one counts.
    return sorted(mounts, key=lambda m: len(m.mountpoint))[-1].fstype if mounts else "?"


def write_speed(folder: Path) -> float:
    """Measures the speed of writing to the folder `folder`, by a temporary file.

    At most 256 MiB are written, in at most about 2 s, and flushed to the disk.

    Returns: bytes per second.
    Raises: OSError: if the folder cannot be written.
    """
    block = os.urandom(8 << 20)  # Zeros would be compressed.
    with tempfile.NamedTemporaryFile(prefix=".speed-", dir=folder) as file:
        start, done = time.perf_counter(), 0
        while done < _WRITE_BYTES and time.perf_counter() - start < _WRITE_SECONDS:
            done += file.write(block)
            file.flush()
            os.fsync(file.fileno())
        return done / (time.perf_counter() - start)


def unfit_for_state(folder: str, needed: int) -> tuple[str, str] | None:
    """Checks whether a folder can hold the optimiser state of this node's ranks.

    Args:
        folder: Value of `engine.nvme_path`.
        needed: Size of the state of all ranks on this node, in bytes.

    Returns: None if the folder can hold the state; otherwise two texts for an error message, which
        say what the folder is and what is expected instead.
    Raises: ConfigError: if no file can be made in the folder.
    """
    path = Path(folder)
    if kind_of(path) != "folder":
        got = "a file" if kind_of(path) else "no such folder here"
        return got, "a folder on a local disk of each node"
    kind = file_system(path)
    if kind in IN_MEMORY:
        return f"a folder in memory ({kind})", "a folder on a disk"
    if kind in OVER_A_NETWORK:
        return f"a folder over a network ({kind})", "a folder on a local disk"
    with refused(folder, 1), tempfile.TemporaryFile(dir=path) as file:
        os.posix_fallocate(file.fileno(), 0, 1)
    if (free := shutil.disk_usage(path).free) < needed:
        return f"{free / 1e9:,.2f} GB free", (
            f"{needed / 1e9:,.2f} GB for the state and weights kept there"
        )
    return None


def check_state_folder(folder: str, needed: int) -> None:
    """Raises ConfigError if a folder cannot hold the optimiser state of this node's ranks.

    Args:
        folder: Value of `engine.nvme_path`.
        needed: Size of the state of all ranks on this node, in bytes.
    """
    if unfit := unfit_for_state(folder, needed):
        raise _unfit(folder, *unfit)


@contextmanager
def refused(folder: str, size: int) -> Iterator[None]:
    """Turns an OSError raised in the block into a ConfigError about `engine.nvme_path`.

    Args:
        folder: The folder for the optimiser state, in which the block writes.
        size: Number of bytes that the block writes, for the message.
    """
    try:
        yield
    except OSError as error:
        expected = f"a file of {size / 1e9:,.2f} GB"
        raise _unfit(folder, error.strerror or str(error), expected) from error


def _unfit(folder: str, got: str, expected: str) -> ConfigError:
    return ConfigError(
        f"engine.nvme_path: {folder} cannot hold the optimiser's state; got {got}, expected "
        f"{expected}. Correct that, or set --engine.nvme_path to another folder."
    )
