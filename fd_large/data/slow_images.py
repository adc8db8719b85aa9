"""The present image of each loading process and its start time, visible to the training process.

A process in a hanging read (from a lost file server) cannot report it. So each process writes its
present image into memory that is shared before the fork.
"""

from __future__ import annotations

import mmap
import struct
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from fd_large.errors import FDError

_HEAD = struct.Struct("<dH")  # Monotonic time of the start, 0 without an image; bytes of the name.
_SLOT_BYTES, _SLOTS = 1024, 256
_shared: mmap.mmap | None = None


def watch() -> None:
    """Makes this process and its future forks record their present image."""
    global _shared
    _shared = mmap.mmap(-1, _SLOT_BYTES * _SLOTS)


@contextmanager
def at_image(slot: int, index: int, name: Callable[[int], str] | None = None) -> Iterator[None]:
    """Records an image for the duration of the block.

    Args:
        slot: Index of this loading process, from 0.
        index: The image's place in the listing.
        name: Function from this index to the image's path; None if that is not known.
    """
    if _shared is None:
        yield
        return
    place = slot % _SLOTS * _SLOT_BYTES
    # The name is recorded later, since it may have to be read from a file, too.
    _note(place, time.monotonic(), f"image {index} of the listing")
    try:
        if name is not None:
            with suppress(FDError, OSError, LookupError):
                _note(place, time.monotonic(), name(index))
        yield
    finally:
        _note(place, 0.0, "")


def longer_than(seconds: float) -> list[tuple[float, str]]:
    """Returns (seconds, name) of images on which a loading process has spent more than a time."""
    slow = []
    for place in range(0, 0 if _shared is None else len(_shared), _SLOT_BYTES):
        assert _shared is not None
        since, size = _HEAD.unpack_from(_shared, place)
        if since and (lasted := time.monotonic() - since) > seconds:
            start = place + _HEAD.size
            slow.append((lasted, _shared[start : start + size].decode(errors="replace")))
    return slow


def _note(place: int, since: float, name: str) -> None:
    assert _shared is not None
    text = name.encode(errors="replace")[: _SLOT_BYTES - _HEAD.size]
    _shared[place + _HEAD.size : place + _HEAD.size + len(text)] = text
    _HEAD.pack_into(_shared, place, since, len(text))
