"""Several datasets in one: how `data.root` names them, each with its share of the images.

    0.5 /data/imagenet + 0.3 web=/data/web/shards + 0.2 s3://bucket/places/

A weight stands before each, and a name may, which otherwise is the last part of the path.
"""

from __future__ import annotations

import math
import re
from fractions import Fraction
from typing import NamedTuple

from fd_large.errors import DataError

_TERM = re.compile(r"(\d+\.?\d*|\.\d+)\s+(?:([A-Za-z]\w*)=)?(\S.*)")
# More than any weights that somebody means; the pattern of an order has as many entries.
MAX_PERIOD = 100_000


class WeightedRoot(NamedTuple):
    """A dataset of a sum.

    Attributes:
        name: What it is called, for messages and for what is chosen by dataset.
        root: As `open_images` takes it.
        share: Images of it among each `period` images of the sum, the sum of all shares.
    """

    name: str
    root: str
    share: int


def weighted_roots(root: str, *, where: str = "data.root") -> tuple[WeightedRoot, ...]:
    """Returns the datasets of a sum; none if the text is no sum of several.

    Args:
        root: As `data.root` takes it.
        where: The field that says it, for messages.

    Raises: DataError: if a term is malformed, or two have one name.
    """
    texts = root.split(" + ")
    found = [_TERM.fullmatch(text.strip()) for text in texts]
    if len(texts) < 2 or found[0] is None:
        return ()
    terms: dict[str, tuple[str, Fraction]] = {}
    for text, term in zip(texts, found, strict=True):
        if term is None or not Fraction(term[1]):
            raise DataError(
                f"{where}: not a sum of datasets by weight; got {text!r}, expected a weight above "
                "0 and a dataset, as in '0.7 /data/imagenet + 0.3 /data/web'. Correct the term."
            )
        name = term[2] or term[3].rstrip("/").rpartition("/")[2]
        if name in terms:
            raise DataError(
                f"{where}: two datasets of one name; got {name!r} twice, expected different names. "
                f"Give one a name: '{term[1]} NAME={term[3]}'."
            )
        terms[name] = term[3].strip(), Fraction(term[1])
    scale = math.lcm(*(weight.denominator for _, weight in terms.values()))
    shares = [int(weight * scale) for _, weight in terms.values()]
    divisor = math.gcd(*shares)
    if sum(shares) // divisor > MAX_PERIOD:
        raise DataError(
            f"{where}: weights of too many digits; got {root!r}, expected such that the shares "
            f"are whole numbers of {MAX_PERIOD:,} at most. Round them."
        )
    return tuple(
        WeightedRoot(name, path, share // divisor)
        for (name, (path, _)), share in zip(terms.items(), shares, strict=True)
    )
