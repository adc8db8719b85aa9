"""Computes which rank's file holds which elements of a tensor, from numbers in the manifest.

The state of a run is stored as its ranks held it, with one file for each rank. A reader on any
other number of ranks computes from the layout which files hold the elements that it needs, so that
no index grows with the number of ranks.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, NamedTuple


class Span(NamedTuple):
    """Elements [start, stop) of a flattened tensor."""

    start: int
    stop: int


@dataclass(frozen=True)
class EachTensor:
    """Layout of ZeRO-3 (and stage 0), in which each tensor is cut into a shard for each rank.

    The shards of a tensor are of equal size, except that the last shards may be shorter or empty.

    Attributes:
        sizes: Number of elements of each tensor, by name.
        ranks: Number of ranks.
    """

    sizes: dict[str, int]
    ranks: int

    def span(self, rank: int, name: str) -> Span:
        """Returns which elements of the flattened tensor `name` are in the file of rank `rank`.

        If the file has no element of the tensor, the result has start == stop.
        """
        size = self.sizes[name]
        each = -(-size // self.ranks)
        return Span(min(rank * each, size), min((rank + 1) * each, size))

    def holders(self, name: str, span: Span) -> Iterator[int]:
        """Yields the ranks whose files hold any element of a part of a tensor, in ascending order.

        Args:
            name: Name of the tensor.
            span: The part, as elements of the flattened tensor.
        """
        each = -(-self.sizes[name] // self.ranks)
        if span.start < span.stop:
            yield from range(span.start // each, (span.stop - 1) // each + 1)

    def to_dict(self) -> dict[str, Any]:
        """Returns the layout as a dict of JSON types, for `from_dict`."""
        return {"kind": "each", "ranks": self.ranks, "sizes": self.sizes}


@dataclass(frozen=True)
class FlatGroups:
    """Layout of ZeRO-1 and 2, in which each parameter group is cut into a shard for each rank.

    The flattened tensors of a group are concatenated, padded at the end, and cut into shards of
    equal size.

    Attributes:
        groups: For each parameter group a tuple with an entry (name, number of elements) for each
            tensor of the group, in the order of concatenation.
        shares: For each parameter group the number of elements in a rank's shard.
        ranks: Number of ranks.
    """

    groups: tuple[tuple[tuple[str, int], ...], ...]
    shares: tuple[int, ...]
    ranks: int

    def __post_init__(self) -> None:
        places = {}
        for number, group in enumerate(self.groups):
            ends = accumulate(size for _, size in group)
            for (name, size), end in zip(group, ends, strict=True):
                places[name] = (number, end - size, size)
        object.__setattr__(self, "_places", places)

    @property
    def sizes(self) -> dict[str, int]:
        """Number of elements of each tensor, by name."""
        return {name: size for name, (_, _, size) in self._places.items()}  # type: ignore[attr-defined]

    def span(self, rank: int, name: str) -> Span:
        """Returns which elements of the flattened tensor `name` are in the file of rank `rank`.

        If the file has no element of the tensor, the result has start == stop.
        """
        group, begin, size = self._places[name]  # type: ignore[attr-defined]
        share = self.shares[group]
        start = max(rank * share, begin) - begin
        stop = min((rank + 1) * share, begin + size) - begin
        return Span(start, stop) if start < stop else Span(0, 0)

    def holders(self, name: str, span: Span) -> Iterator[int]:
        """Yields the ranks whose files hold any element of a part of a tensor, in ascending order.

        Args:
            name: Name of the tensor.
            span: The part, as elements of the flattened tensor.
        """
        group, begin, _ = self._places[name]  # type: ignore[attr-defined]
        share = self.shares[group]
        if span.start < span.stop:
            first, last = begin + span.start, begin + span.stop - 1
            yield from range(first // share, last // share + 1)

    def to_dict(self) -> dict[str, Any]:
        """Returns the layout as a dict of JSON types, for `from_dict`."""
        groups = [[list(item) for item in group] for group in self.groups]
        return {
            "kind": "flat",
            "ranks": self.ranks,
            "groups": groups,
            "shares": list(self.shares),
        }


Layout = EachTensor | FlatGroups


def from_dict(values: dict[str, Any]) -> Layout:
    """Returns the layout for which `to_dict` returned `values`."""
    if values["kind"] == "each":
        return EachTensor(values["sizes"], values["ranks"])
    groups = tuple(tuple((name, size) for name, size in group) for group in values["groups"])
    return FlatGroups(groups, tuple(values["shares"]), values["ranks"])
