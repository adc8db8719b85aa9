"""Translates a file's names to a model's: which tensors make each of ours, joined and reshaped how.

Made from names alone: what fits and what is missing is known before a tensor is read.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

Shape = tuple[int, ...]
Shapes = Mapping[str, Shape]

# Tables that a model computes for itself.
RECOMPUTED = ("relative_position_index", "relative_coords_table", "attn_mask")


class Target(NamedTuple):
    """Where a tensor of a file goes.

    Attributes:
        name: Name in our model.
        third: 0, 1 or 2 for the rows of query, key or value in a fused tensor; None is the whole
            tensor.
        form: "token" reshapes (C) to (1, 1, C); "batched" (N, C) to (1, N, C); "matrix" a
            convolution of side 1 to (out, in); "unfolded" brings merged patches from the order of
            nn.Unfold to ours; "" leaves it as it is.
    """

    name: str
    third: int | None = None
    form: str = ""


Rule = Callable[[str], Target | None]


@dataclass(frozen=True)
class Piece:
    """What makes one tensor of a model.

    Attributes:
        sources: Names of the file's tensors, which are joined along their first axis; none for a
            constant.
        form: See `Target`.
        value: Value of a constant.
        length: Number of elements of a constant.
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
        if self.form == "unfolded":
            return from_unfolded(joined)
        return joined.reshape(self.shape(lambda name: tuple(tensors[name].shape)))


Pieces = dict[str, Piece]


class Translation(NamedTuple):
    """A file in the names of our model.

    Attributes:
        pieces: {our name: what makes it}, in the file's order.
        dropped: Names in the file that are left out on purpose.
        unfit: Names in the file that make no tensor: given twice, or a query without its key.
    """

    pieces: Pieces
    dropped: list[str]
    unfit: list[str]


def translated(names: Iterable[str], rule: Rule) -> Translation:
    """Applies a format's rule to the names of a file."""
    pieces: Pieces = {}
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


def to_unfolded(tensor: Tensor) -> Tensor:
    """Gives the last axis of merged patches, 4C in our order, in that of nn.Unfold.

    Ours has all channels of one token after another, down each column of the 2x2; nn.Unfold has
    the four tokens of a channel side by side, row by row.
    """
    return tensor.unflatten(-1, (2, 2, -1)).movedim(-1, -3).transpose(-1, -2).flatten(-3)


def from_unfolded(tensor: Tensor) -> Tensor:
    """Undoes `to_unfolded`."""
    return tensor.unflatten(-1, (-1, 2, 2)).transpose(-1, -2).movedim(-3, -1).flatten(-3)


def replaced(name: str, pairs: Iterable[tuple[str, str]]) -> str:
    """Returns a name with parts of it replaced, one pair after the other."""
    for theirs, ours in pairs:
        name = name.replace(theirs, ours)
    return name


def expanded(pieces: Pieces, shapes: Shapes, own: Callable[[str], str]) -> Pieces | None:
    """Gives every block its own copy of a position bias that a file shares (FD's fine-tuning).

    Args:
        pieces: What the file makes, by our names.
        shapes: Shapes of the model that is to be filled.
        own: Gives the shared tensor's name for that of a block's own.

    Returns: None if nothing is to be copied.
    """
    copies = {
        name: pieces[own(name)]
        for name in shapes
        if name not in pieces and own(name) != name and own(name) in pieces
    }
    if not copies:
        return None
    shared = {own(name) for name in copies}
    return {name: piece for name, piece in pieces.items() if name not in shared} | copies


def fresh_norm(width: int) -> Pieces:
    """Returns a final norm that only normalises: weight 1, bias 0."""
    return {
        "norm.weight": Piece((), value=1.0, length=width),
        "norm.bias": Piece((), value=0.0, length=width),
    }


def projection(name: str) -> Target:
    """Gives Feature-Distillation's 1x1 convolution (Ct, Cs, 1) as a linear layer's (Ct, Cs)."""
    return Target(f"projection.{name.removeprefix('decoder.0.')}", form="matrix")
