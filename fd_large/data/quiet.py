"""What the C decoders print on stderr, kept out of the log.

libjpeg, libpng and libtiff write straight to file descriptor 2. Within `quiet()` that descriptor
leads to memory; afterwards the decoders' lines are dropped and whatever else was written meanwhile
(another thread, the interpreter) goes where it was meant to go.
"""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager

# The texts of libjpeg's and libpng's warnings, and the shape of libtiff's.
_CODEC_LINE = re.compile(
    rb"Corrupt JPEG data|Premature end of JPEG|Inconsistent progression|Unknown Adobe color"
    rb"|Warning: unknown JFIF|Invalid SOS parameters|Application transferred too (many|few)"
    rb"|libpng (warning|error)|(TIFF|LZW|JPEG|ZIP|Fax|LogLuv|_TIFF)\w*: "
)

_memory: int | None = None
_inside = False


def _forget() -> None:
    """A forked child shares the parent's file, offset included: it needs one of its own."""
    global _memory, _inside
    _memory, _inside = None, False


os.register_at_fork(after_in_child=_forget)


@contextmanager
def quiet() -> Iterator[None]:
    """Drops the decoders' lines on stderr; other lines appear when the block ends."""
    global _memory, _inside
    if _inside:  # an outer block, or another thread's, is at it
        yield
        return
    try:
        stderr = os.dup(2)
    except OSError:  # no stderr at all: nothing to keep clean
        yield
        return
    _inside = True
    try:
        if _memory is None:
            _memory = _open_memory()
        os.dup2(_memory, 2)
        try:
            yield
        finally:
            os.dup2(stderr, 2)
            if size := os.fstat(_memory).st_size:
                text = os.pread(_memory, size, 0)
                os.ftruncate(_memory, 0)
                os.lseek(_memory, 0, os.SEEK_SET)
                _pass_on(text, stderr)
    finally:
        _inside = False
        os.close(stderr)


def _open_memory() -> int:
    if hasattr(os, "memfd_create"):
        return os.memfd_create("stderr")
    descriptor, path = tempfile.mkstemp()
    os.unlink(path)
    return descriptor


def _pass_on(text: bytes, stderr: int) -> None:
    rest = b"".join(x for x in text.splitlines(keepends=True) if not _CODEC_LINE.match(x))
    while rest:
        rest = rest[os.write(stderr, rest) :]
