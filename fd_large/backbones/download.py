"""Downloads of weights by libraries: one rank downloads, and the other ranks read the cache.

If all ranks downloaded, the hub would refuse hundreds of simultaneous requests, and ranks would
write the same cache at the same time.
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
    """Returns an object that a library loads from its cache or from the network.

    In a meeting of all ranks (`ranks.meeting`), rank 0 loads the object first. Then the first rank
    of each node loads the object, from the network only if the node's cache lacks it. All other
    ranks load the object from the cache. Outside a meeting each rank loads the object by itself.

    Args:
        source: The source, as the user gave it.
        get: Loads the object, from the cache or the network.

    Raises: WeightsError: on all ranks, if `get` raises it on the rank that loads first.
    """
    got = _first(source, get)
    if got:
        return got[0]
    with _offline():
        return get()


def download(source: str, get: Callable[[], object]) -> None:
    """Fills the library's cache, so that `downloaded` needs no network for the same source.

    In a meeting of all ranks (`ranks.meeting`), rank 0 and the first rank of each node call `get`.
    Outside a meeting each rank calls it. If this process has done so before for this source,
    nothing is done.

    Args:
        source: The source, as the user gave it.
        get: Loads an object from the library's cache, or from the network into the cache.
    """
    _first(source, get)


def _first(source: str, get: Callable[[], T]) -> list[T]:
    """Loads an object on rank 0 and on the first rank of each node; outside a meeting on each rank.

    Args:
        source: The source, as the user gave it.
        get: Loads the object, from the cache or the network.

    Returns: a list of the object on a rank that loaded it, and an empty list on all other ranks.
        The list is also empty if this process has called this function for `source` before.
    """
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
    """Sets huggingface_hub, which timm and open_clip use too, offline in the `with` block."""
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before
