"""Computes which rank's file holds which elements of a tensor, from numbers in the manifest.

A run's state is stored as its ranks held it, one file a rank; a reader on any other number of ranks
computes from the layout which files hold the elements that it needs, so that no index grows with
the number of ranks.
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
    """ZeRO-3 (and stage 0): each tensor is cut into equal shards, short or empty at its end.

    Attributes:
        sizes: Elements of each tensor by name.
        ranks: Number of shards.
    """

    sizes: dict[str, int]
    ranks: int

    def span(self, rank: int, name: str) -> Span:
        """Returns the elements of a tensor that a rank holds; empty if start == stop."""
        size = self.sizes[name]
        each = -(-size // self.ranks)
        return Span(min(rank * each, size), min((rank + 1) * each, size))

    def holders(self, name: str, span: Span) -> Iterator[int]:
        """Yields the ranks that hold any elements of a span, in order."""
        each = -(-self.sizes[name] // self.ranks)
        if span.start < span.stop:
            yield from range(span.start // each, (span.stop - 1) // each + 1)

    def to_dict(self) -> dict[str, Any]:
        """Returns the layout as JSON-safe values."""
        return {"kind": "each", "ranks": self.ranks, "sizes": self.sizes}


@dataclass(frozen=True)
class FlatGroups:
    """ZeRO-1 and 2: the tensors of a parameter group lie end to end, and the concatenation is cut.

    Attributes:
        groups: (name, elements) of the tensors of each group, in order.
        shares: Number of elements of a rank's shard of each group's concatenation, which is padded
            at its end.
        ranks: Number of shards.
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
        """Returns the elements of a tensor that a rank holds; empty if start == stop."""
        group, begin, size = self._places[name]  # type: ignore[attr-defined]
        share = self.shares[group]
        start = max(rank * share, begin) - begin
        stop = min((rank + 1) * share, begin + size) - begin
        return Span(start, stop) if start < stop else Span(0, 0)

    def holders(self, name: str, span: Span) -> Iterator[int]:
        """Yields the ranks that hold any elements of a span, in order."""
        group, begin, _ = self._places[name]  # type: ignore[attr-defined]
        share = self.shares[group]
        if span.start < span.stop:
            first, last = begin + span.start, begin + span.stop - 1
            yield from range(first // share, last // share + 1)

    def to_dict(self) -> dict[str, Any]:
        """Returns the layout as JSON-safe values."""
        groups = [[list(item) for item in group] for group in self.groups]
        return {
            "kind": "flat",
            "ranks": self.ranks,
            "groups": groups,
            "shares": list(self.shares),
        }


Layout = EachTensor | FlatGroups


def from_dict(values: dict[str, Any]) -> Layout:
    """Returns the layout from the result of `to_dict`."""
    if values["kind"] == "each":
        return EachTensor(values["sizes"], values["ranks"])
    groups = tuple(tuple((name, size) for name, size in group) for group in values["groups"])
    return FlatGroups(groups, tuple(values["shares"]), values["ranks"])
