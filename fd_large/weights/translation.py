"""From a file's names to the net's: which tensors, joined and reshaped how, make each of ours.

Made from names alone: what fits and what is missing is known before anything is read.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

Shape = tuple[int, ...]


class Target(NamedTuple):
    """Where a tensor of a file goes.

    Attributes:
        name: Ours.
        third: 0, 1 or 2: rows of query, key or value in a fused tensor; None: the whole tensor.
        form: "token": (C) to (1, 1, C); "batched": (N, C) to (1, N, C); "matrix": a convolution
            of side 1 to (out, in); "": as it is.
    """

    name: str
    third: int | None = None
    form: str = ""


@dataclass(frozen=True)
class Piece:
    """One of our tensors.

    Attributes:
        sources: The file's tensors, joined along their first axis; none for a constant.
        form: As in `Target`.
        value: Of a constant.
        length: Of a constant, in elements.
    """

    sources: tuple[str, ...]
    form: str = ""
    value: float = 0.0
    length: int = 0

    def shape(self, shape_of: Callable[[str], Shape]) -> Shape:
        """Returns the shape from those of the sources."""
        if not self.sources:
            return (self.length,)
        shapes = [shape_of(name) for name in self.sources]
        joined = shapes[0]
        if len(shapes) > 1 and joined:
            joined = (sum(shape[0] for shape in shapes if shape), *joined[1:])
        if self.form == "token":
            return (1, 1, math.prod(joined))
        if self.form == "batched" and len(joined) == 2:
            return (1, *joined)
        if self.form == "matrix" and len(joined) > 2:
            return (joined[0], math.prod(joined[1:]))
        return joined

    def read(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """Returns the tensor."""
        if not self.sources:
            return torch.full((self.length,), self.value)
        parts = [tensors[name] for name in self.sources]
        joined = parts[0] if len(parts) == 1 else torch.cat(parts)
        return joined.reshape(self.shape(lambda name: tuple(tensors[name].shape)))


class Translation(NamedTuple):
    """A file in our names.

    Attributes:
        pieces: Our name to what makes it, in the file's order.
        dropped: The file's names that are left out on purpose.
        unfit: The file's names that make no tensor: given twice, or a query without its key.
    """

    pieces: dict[str, Piece]
    dropped: list[str]
    unfit: list[str]


def translated(names: Iterable[str], rule: Callable[[str], Target | None]) -> Translation:
    """Applies a format's rule to a file's names.

    Args:
        names: The file's.
        rule: A name to its target; None drops it on purpose.
    """
    pieces: dict[str, Piece] = {}
    thirds: dict[str, dict[int, str]] = {}
    dropped, unfit = [], []
    for name in names:
        target = rule(name)
        if target is None:
            dropped.append(name)
        elif target.third is not None:
            thirds.setdefault(target.name, {})[target.third] = name
            pieces.setdefault(target.name, Piece(()))  # Keeps the file's order.
        elif target.name in pieces:
            unfit.append(name)
        else:
            pieces[target.name] = Piece((name,), target.form)
    for ours, parts in thirds.items():
        if len(parts) == 3 and not pieces[ours].sources:
            pieces[ours] = Piece(tuple(parts[i] for i in range(3)))
        else:
            del pieces[ours]
            unfit += parts.values()
    return Translation(pieces, dropped, unfit)


def replaced(name: str, pairs: Iterable[tuple[str, str]]) -> str:
    """Returns a name with pieces of it replaced, one pair after the other."""
    for theirs, ours in pairs:
        name = name.replace(theirs, ours)
    return name
