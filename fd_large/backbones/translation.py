"""Translates tensor names between published files and our models, by one table for each format.

The names alone show which tensors fit or are missing, before any tensor is read.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

Shape = tuple[int, ...]
Shapes = Mapping[str, Shape]

NOWHERE = "-"
_THIRDS = ("q", "k", "v")


class Row(NamedTuple):
    """A row of a translation table: names in the file, our names, and the tensor's form.

    In a pattern, `#` matches a number and `*` any text. `{a|b}` matches one of the alternatives; a
    name is written with the first. `+` matches the number that `#` matches in the other pattern,
    plus one: `layers.+.x` in the file is `blocks.#.x` here.

    Attributes:
        theirs: Pattern of names in the file; "-" for a tensor that an export leaves out.
        ours: Pattern of our names; "-" for a tensor that is left out when a file is read.
        form: Form of the tensor in the file, or "" if it is the same as in our model. "q", "k" and
            "v": a third of the rows of our tensor. "token": (C) for our (1, 1, C). "batched":
            (N, C) for our (1, N, C). "matrix": (out, in, 1), the weight of a convolution, for our
            (out, in). "unfolded": the last axis of merged patches in the order of nn.Unfold.
    """

    theirs: str
    ours: str
    form: str = ""


Rows = tuple[Row, ...]


def table(text: str, *, start: str = "") -> Rows:
    """Parses a table; a line has the file's pattern, our pattern and optionally the form.

    If the file's pattern ends with a dot, the two patterns of the line are prefixes of the patterns
    in the indented lines after it.

    Args:
        text: The lines.
        start: Prefix that is put before the file's pattern in every row.
    """
    rows, block = [], ("", "")
    for line in text.splitlines():
        if not line.strip():
            continue
        theirs, ours, *form = line.split()
        if theirs.endswith("."):
            block = theirs, ours
            continue
        in_file, in_model = block if line.startswith(" ") else ("", "")
        rows.append(Row(in_file + theirs, ours if ours == NOWHERE else in_model + ours, *form))
    return under(start, tuple(rows))


def under(start: str, rows: Rows) -> Rows:
    """Returns `rows` with the prefix `start` put before every pattern of names in the file.

    The pattern "-", for a tensor that is not in the file, stays unchanged.
    """
    return tuple(
        row if row.theirs == NOWHERE else row._replace(theirs=start + row.theirs) for row in rows
    )


# Tables that a model computes for itself.
COMPUTED = """
*{relative_position_index|relative_coords_table|attn_mask}  -
"""
RECOMPUTED = ("relative_position_index", "relative_coords_table", "attn_mask")
# The projection of a student is a convolution of side 1 there.
FEATURE_DISTILLATION = table("""
decoder.0.*     projection.*    matrix
encoder.*       *
""")

_WILD = re.compile(r"(\{.*?\}|[#+*])")
_PATTERNS = {"#": r"(\d+)", "+": r"([1-9]\d{0,3})", "*": "(.*)"}


@cache
def _regex(pattern: str) -> re.Pattern[str]:
    def part(text: str) -> str:
        if text.startswith("{"):
            longest_first = sorted(text[1:-1].split("|"), key=len, reverse=True)
            return f"(?:{'|'.join(map(re.escape, longest_first))})"
        return _PATTERNS.get(text) or re.escape(text)

    return re.compile("".join(map(part, _WILD.split(pattern))))


def renamed(name: str, before: str, after: str) -> str | None:
    """Translates a name from one pattern to another; returns None if it does not match.

    Args:
        name: The name, which has to match `before`.
        before: Pattern of such names, as in `Row`.
        after: Pattern of the translated names, as in `Row`.
    """
    match = _regex(before).fullmatch(name)
    if match is None:
        return None
    texts, step = iter(match.groups()), after.count("+") - before.count("+")

    def part(wild: re.Match[str]) -> str:
        if wild[0].startswith("{"):
            return wild[0][1:-1].split("|")[0]
        text = next(texts)
        return str(int(text) + step) if step and wild[0] != "*" else text

    return _WILD.sub(part, after)


def our_name(name: str, rows: Rows) -> tuple[str, str]:
    """Returns (our name, form) of a file's tensor, by the first of `rows` that matches `name`.

    Our name is "-" for a tensor that is left out. If no row matches, the result is (`name`, ""),
    whether or not the model has a tensor of this name.
    """
    for row in rows:
        if (ours := renamed(name, row.theirs, row.ours)) is not None:
            return ours, row.form
    return name, ""


class Output(NamedTuple):
    """A tensor of an exported file.

    Attributes:
        name: Name in the file.
        shape: Shape in the file.
        take: Function that makes the exported tensor from our tensor.
    """

    name: str
    shape: Shape
    take: Callable[[Tensor], Tensor]


def outputs(name: str, shape: Shape, rows: Rows) -> list[Output]:
    """Returns the exported tensors that are made from one of our tensors.

    The first row of the table that matches our name decides the exported name and form. If this row
    is for the query, key or value part of our tensor, one tensor is exported for each of these
    three parts that has a row.

    Args:
        name: Our name of the tensor.
        shape: Its shape.
        rows: The table.
    """
    forms: dict[str, str] = {}
    for row in rows:
        if (theirs := renamed(name, row.ours, row.theirs)) is not None:
            forms.setdefault(row.form, theirs)
    first = next(iter(forms), "")
    chosen = [form for form in _THIRDS if form in forms] if first in _THIRDS else [first]
    return [
        Output(theirs, tuple(take(torch.empty(shape, device="meta")).shape), take)
        for form in chosen
        if (theirs := forms.get(form, name)) != NOWHERE
        for take in [_WRITTEN[form]]
    ]


@dataclass(frozen=True)
class Piece:
    """The rule that makes one tensor of a model from tensors of a file, or as a constant vector.

    Attributes:
        sources: Names of the file's tensors, which are joined along their first axis; empty for a
            constant.
        form: Form of the tensor in the file, one of `form` of `Row`; "" if it is the same as in the
            model.
        value: Value of all elements of a constant.
        length: Number of elements of a constant.
    """

    sources: tuple[str, ...]
    form: str = ""
    value: float = 0.0
    length: int = 0

    def shape(self, shape_of: Callable[[str], Shape]) -> Shape:
        """Returns the shape of the model's tensor that this rule makes.

        Args:
            shape_of: Returns the shape of a tensor of the file, given its name there.
        """
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
        """Returns the model's tensor that this rule makes.

        Args:
            tensors: The tensors of the file, by their names in the file.
        """
        if not self.sources:
            return torch.full((self.length,), self.value)
        parts = [tensors[name] for name in self.sources]
        joined = parts[0] if len(parts) == 1 else torch.cat(parts)
        if self.form == "unfolded":
            return from_unfolded(joined)
        return joined.reshape(self.shape(lambda name: tuple(tensors[name].shape)))


Pieces = dict[str, Piece]


class Translation(NamedTuple):
    """The result of translating the names of a file's tensors to ours.

    Attributes:
        pieces: {our name: rule that makes the tensor}, in the file's order.
        dropped: Names in the file that are intentionally left out.
        unfit: Names in the file that cannot be used, because two names have the same translation,
            or query, key and value are not all there.
    """

    pieces: Pieces
    dropped: list[str]
    unfit: list[str]


def translated(names: Iterable[str], rows: Rows) -> Translation:
    """Translates the names of a file's tensors to ours.

    Args:
        names: Names of the file's tensors.
        rows: Translation table of the file's format.
    """
    pieces: Pieces = {}
    thirds: dict[str, dict[str, str]] = {}
    dropped, unfit = [], []
    for name in names:
        ours, form = our_name(name, rows)
        if ours == NOWHERE:
            dropped.append(name)
        elif form in _THIRDS:
            thirds.setdefault(ours, {})[form] = name
            pieces.setdefault(ours, Piece(()))  # Keeps the file's order.
        elif ours in pieces:
            unfit.append(name)
        else:
            pieces[ours] = Piece((name,), form)
    for ours, parts in thirds.items():
        if len(parts) == 3 and not pieces[ours].sources:
            pieces[ours] = Piece(tuple(parts[form] for form in _THIRDS))
        else:
            del pieces[ours]
            unfit += parts.values()
    return Translation(pieces, dropped, unfit)


def to_unfolded(tensor: Tensor) -> Tensor:
    """Reorders the last axis of `tensor`, 4C for merged patches, from our order to nn.Unfold's.

    In our order, the C channels of a token are adjacent, and the 2x2 tokens follow each other
    column by column; in nn.Unfold's order, the four values of a channel are adjacent, row by row.
    """
    return tensor.unflatten(-1, (2, 2, -1)).movedim(-1, -3).transpose(-1, -2).flatten(-3)


def from_unfolded(tensor: Tensor) -> Tensor:
    """Reorders the last axis of `tensor`, 4C for merged patches, from nn.Unfold's order to ours.

    This is the inverse of `to_unfolded`, which describes the two orders.
    """
    return tensor.unflatten(-1, (-1, 2, 2)).transpose(-1, -2).movedim(-3, -1).flatten(-3)


# The inverse of the change by which each form is read.
_WRITTEN: dict[str, Callable[[Tensor], Tensor]] = {
    "": lambda tensor: tensor,
    "q": lambda tensor: tensor.chunk(3)[0],
    "k": lambda tensor: tensor.chunk(3)[1],
    "v": lambda tensor: tensor.chunk(3)[2],
    "token": lambda tensor: tensor[0, 0],
    "batched": lambda tensor: tensor[0],
    "matrix": lambda tensor: tensor.unsqueeze(-1) if tensor.dim() == 2 else tensor,
    "unfolded": to_unfolded,
}


def expanded(
    pieces: Pieces, shapes: Shapes, shared_name: Callable[[str], str]
) -> tuple[Pieces, list[str]]:
    """Copies a file's shared position bias to every block of a model with a bias in each block.

    Feature-Distillation's fine-tuning does so. Nothing changes if the file has no shared bias, or
    the model has no bias in each block.

    Args:
        pieces: {our name: rule} of the file.
        shapes: {our name: shape} of the model into which the file is loaded.
        shared_name: Returns the name of the shared tensor, given the name of a block's tensor.

    Returns: the rules for the model, and a description of the change in a list, which is empty if
        nothing changes.
    """
    copies = {
        name: pieces[shared_name(name)]
        for name in shapes
        if name not in pieces and shared_name(name) != name and shared_name(name) in pieces
    }
    if not copies:
        return pieces, []
    shared = {shared_name(name) for name in copies}
    unshared = {name: piece for name, piece in pieces.items() if name not in shared}
    return unshared | copies, ["the shared position bias is copied to every block"]


def fresh_norm(width: int) -> Pieces:
    """Returns {our name: rule} of a final norm of `width` channels with weight 1 and bias 0."""
    return {
        "norm.weight": Piece((), value=1.0, length=width),
        "norm.bias": Piece((), value=0.0, length=width),
    }
