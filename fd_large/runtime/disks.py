"""What kind of disk a folder lies on, how much of it is free, and how fast it is written."""

from __future__ import annotations

import os
import tempfile
import time
from pathlib import Path

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
    """Returns the type of the file system that holds a path; "?" if that is not known."""
    import psutil

    real = path.resolve()
    mounts = [m for m in psutil.disk_partitions(all=True) if real.is_relative_to(m.mountpoint)]
    # Where several stand on one mount point the last one counts.
    return sorted(mounts, key=lambda m: len(m.mountpoint))[-1].fstype if mounts else "?"


def write_speed(folder: Path) -> float:
    """Writes up to 256 MB and returns bytes a second, flushed to the disk.

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
