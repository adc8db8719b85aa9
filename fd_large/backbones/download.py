"""Downloads that libraries make: one rank fetches for all, the others wait and read.

Hundreds of ranks that ask a hub at once are refused by it, and write one cache at the same time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from fd_large.errors import WeightsError
from fd_large.ranks import meeting

T = TypeVar("T")

_cached: set[str] = set()
"""What this process has found in its cache: from there on no server is asked."""


def downloaded(what: str, get: Callable[[], T]) -> T:
    """Returns the object that a library gets from its cache, or else from the network.

    In a meeting rank 0 gets it first; then the first rank of each node, from the network only if
    the node has a cache of its own; then all others, from the cache.

    Args:
        what: The source, as the user gave it.
        get: Gets it.

    Raises: WeightsError: on all ranks, if `get` raises it where it is asked first.
    """
    got = _first(what, get)
    if got:
        return got[0]
    with _offline():
        return get()


def download(what: str, get: Callable[[], object]) -> None:
    """Brings into the cache what `downloaded` gets later; the arguments are the same."""
    _first(what, get)


def _first(what: str, get: Callable[[], T]) -> list[T]:
    """Returns the download of this rank, if it is one of those that fetch for others."""
    got: list[T] = []
    if what in _cached:
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

    meeting.once(f"download {what}", for_all)
    meeting.once(f"download {what}", for_node, of_node=True)
    _cached.add(what)
    return got


@contextmanager
def _offline() -> Iterator[None]:
    """Keeps huggingface_hub, which timm and open_clip use too, from asking its server."""
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before
