"""Downloads weights by libraries: one rank downloads for all, and the others read the cache.

A hub refuses hundreds of simultaneous requests, and ranks would write one cache at the same time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from fd_large.errors import WeightsError
from fd_large.ranks import meeting

T = TypeVar("T")

_cached: set[str] = set()
"""Sources that this process has found in its cache, for which it asks no server again."""


def downloaded(source: str, get: Callable[[], T]) -> T:
    """Returns a library's object from its cache, or else from the network.

    Within `meeting`, rank 0 loads it first; then the first rank of each node, from the network
    only if the node has its own cache; then all others, from the cache.

    Args:
        source: The source, as the user gave it.
        get: Returns the object, from the cache or the network.

    Raises: WeightsError: on all ranks, if `get` raises it on the rank that loads first.
    """
    got = _first(source, get)
    if got:
        return got[0]
    with _offline():
        return get()


def download(source: str, get: Callable[[], object]) -> None:
    """Fills the cache for a later `downloaded` with the same arguments."""
    _first(source, get)


def _first(source: str, get: Callable[[], T]) -> list[T]:
    """Returns this rank's download, if it downloads for others."""
    got: list[T] = []
    if source in _cached:
        return got

    def for_all() -> None:
        got.append(get())

    def for_node() -> None:
        if got:
            return
        try:
            with _offline():
                got.append(get())
        except WeightsError:
            got.append(get())

    meeting.once(f"download {source}", for_all)
    meeting.once(f"download {source}", for_node, of_node=True)
    _cached.add(source)
    return got


@contextmanager
def _offline() -> Iterator[None]:
    """Keeps huggingface_hub, also used by timm and open_clip, from asking its server."""
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before
