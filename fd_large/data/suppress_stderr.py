"""Suppresses the messages that C image decoders write to stderr.

libjpeg, libpng and libtiff write straight to file descriptor 2. Within `suppress_stderr()`, this
descriptor is a file in memory. When the block ends, the decoders' lines are dropped, and other
output (by another thread or the interpreter) is written to stderr.

If NCCL or CUDA end the process, their last messages would be lost with the file in memory. So
nothing is suppressed in a process in which NCCL or CUDA may write. Loading processes use neither.
"""

from __future__ import annotations

import fcntl
import os
import re
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.utils.data import get_worker_info

from fd_large.ranks import distributed

# The texts of libjpeg's and libpng's warnings, and the form of libtiff's.
_CODEC_LINE = re.compile(
    rb"Corrupt JPEG data|Premature end of JPEG|Inconsistent progression|Unknown Adobe color"
    rb"|Warning: unknown JFIF|Invalid SOS parameters|Application transferred too (many|few)"
    rb"|libpng (warning|error)|(TIFF|LZW|JPEG|ZIP|Fax|LogLuv|_TIFF)\w*: "
)

_MAX_BYTES = 1 << 20

_memory: int | None = None
_done = 0  # bytes of the memory that were passed on
_lock = threading.Lock()


def _forget() -> None:
    """Makes a forked child use its own in-memory file for stderr instead of its parent's file."""
    global _memory, _done, _lock
    _memory, _done, _lock = None, 0, threading.Lock()


os.register_at_fork(after_in_child=_forget)


@contextmanager
def suppress_stderr() -> Iterator[None]:
    """Drops lines that image decoders write to stderr; other lines appear when the block ends.

    Nothing is suppressed in a process in which NCCL or CUDA may write.
    """
    global _memory, _done
    if _others_speak():
        yield
        return
    lock = _lock
    if not lock.acquire(blocking=False):  # an outer block or another thread redirects already
        yield
        return
    try:
        stderr = os.dup(2)
    except OSError:  # the process has no stderr
        lock.release()
        yield
        return
    try:
        if _memory is None:
            _memory = _open_memory()
        os.dup2(_memory, 2)
        try:
            yield
        finally:
            os.dup2(stderr, 2)
            text = os.pread(_memory, os.fstat(_memory).st_size - _done, _done)
            _done += len(text)
            _pass_on(text, stderr)
            if _done > _MAX_BYTES:  # rarely, since a line that is just being written is lost
                os.ftruncate(_memory, 0)
                _done = 0
    finally:
        os.close(stderr)
        lock.release()


def _others_speak() -> bool:
    """Whether NCCL or CUDA may write messages to stderr in this process."""
    if get_worker_info() is not None:
        return False
    return distributed.world_size() > 1 or torch.cuda.is_initialized()


def _open_memory() -> int:
    if hasattr(os, "memfd_create"):
        descriptor = os.memfd_create("stderr")
    else:
        descriptor, path = tempfile.mkstemp()
        os.unlink(path)
    # in memory, only this flag keeps threads from writing at the same place at once
    fcntl.fcntl(descriptor, fcntl.F_SETFL, os.O_APPEND)
    return descriptor


def _pass_on(text: bytes, stderr: int) -> None:
    rest = b"".join(x for x in text.splitlines(keepends=True) if not _CODEC_LINE.match(x))
    while rest:
        rest = rest[os.write(stderr, rest) :]
