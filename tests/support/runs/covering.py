"""Settings of which every two meet somewhere: a covering array, made greedily.

A row gives each factor of a run one value, and each factor of a part, of which a run has several,
one value in each part. Two values meet where both are of the run, or of one part of it. Source:
Cohen et al., "The AETG system", IEEE Transactions on Software Engineering 23 (1997).
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

CANDIDATES = 30
Value = tuple[str, Any]  # A factor and one of its values.
Pair = frozenset[Value]


class Row(NamedTuple):
    """A setting of all factors.

    Attributes:
        run: Value by factor of the run.
        parts: The same of each of its parts.
    """

    run: dict[str, Any]
    parts: list[dict[str, Any]]


class Factors(NamedTuple):
    """What is varied.

    Attributes:
        run: Values by factor of a run; `parts` is the number of its parts.
        part: Values by factor of a part.
        excluded: Pairs that no run has: ((factor, values), (factor, values)).
    """

    run: Mapping[str, Sequence[Any]]
    part: Mapping[str, Sequence[Any]]
    excluded: Collection[tuple[tuple[str, Sequence[Any]], tuple[str, Sequence[Any]]]]

    def forbidden(self) -> set[Pair]:
        """The pairs that no run has."""
        return {
            frozenset({(f, v), (g, w)})
            for (f, values), (g, others) in self.excluded
            for v in values
            for w in others
        }

    def pairs(self) -> set[Pair]:
        """All pairs that a run may have."""
        values = {**self.run, **self.part}
        return {
            frozenset({(f, v), (g, w)})
            for f, g in itertools.combinations(values, 2)
            for v in values[f]
            for w in values[g]
        } - self.forbidden()


def pairs_of(row: Row) -> Iterator[Pair]:
    """Yields the pairs of values that meet in a row."""
    for part in row.parts:
        yield from map(frozenset, itertools.combinations((row.run | part).items(), 2))


def covering(factors: Factors, seed: int = 0) -> list[Row]:
    """Returns rows in which every pair of `Factors.pairs` meets."""
    draw, left, forbidden, rows = random.Random(seed), factors.pairs(), factors.forbidden(), []
    while left:
        wanted = sorted(left, key=sorted)
        found = [
            _row(factors, dict(draw.choice(wanted)), left, forbidden, draw)
            for _ in range(CANDIDATES)
        ]
        rows.append(max(found, key=lambda row: len(left.intersection(pairs_of(row)))))
        left = left.difference(pairs_of(rows[-1]))
    return rows


def _row(
    factors: Factors,
    given: dict[str, Any],
    left: set[Pair],
    forbidden: set[Pair],
    draw: random.Random,
) -> Row:
    """A row with the given values in its first part, which else takes what is wanted most."""
    new = set(left)

    def fill(values: Mapping[str, Sequence[Any]], row: dict[str, Any]) -> None:
        names = [name for name in values if name not in row]
        for name in draw.sample(names, len(names)):
            fits = [
                (sum(pair in new for pair in pairs), draw.random(), value)
                for value in values[name]
                if not forbidden.intersection(
                    pairs := [frozenset({(name, value), other}) for other in row.items()]
                )
            ]
            row[name] = max(fits)[2]

    run = {name: value for name, value in given.items() if name in factors.run}
    parts = [dict(given)]
    fill({**factors.run, **factors.part}, parts[0])
    run = {name: parts[0].pop(name) for name in factors.run}
    new.difference_update(pairs_of(Row(run, parts)))
    for _ in range(run["parts"] - 1):
        part = dict(run)
        fill(factors.part, part)
        parts.append({name: part[name] for name in factors.part})
        new.difference_update(pairs_of(Row(run, parts[-1:])))
    return Row(run, parts)
