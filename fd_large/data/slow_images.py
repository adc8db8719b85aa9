"""Shows the training process which image each loading process is loading, and since when.

A process whose read hangs (because a file server is lost) cannot report this itself. So each
loading process writes the name of its current image into memory that is shared before the fork.
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
    """Makes `at_image` record images in this process and in processes forked from now on."""
    global _shared
    _shared = mmap.mmap(-1, _SLOT_BYTES * _SLOTS)


@contextmanager
def at_image(slot: int, index: int, name: Callable[[int], str] | None = None) -> Iterator[None]:
    """Records that this process is loading an image, for the duration of the block.

    Without a call of `watch`, nothing is recorded.

    Args:
        slot: 0 in the training process, or the loading process's index plus 1.
        index: Index of the image in the dataset.
        name: Function that takes this index and returns the image's path or URL; None if the path
            is not known.
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
    """Returns the images that processes have been loading for more than `seconds` until now.

    Each is (seconds since the loading began, name of the image).
    """
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
