"""Translates tensor names of published files by tables of rows, one table for each format.

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
    """A line of a table: the names of a published file, our names, and differences of the tensors.

    In a pattern `#` is a number, `*` any text, and `{a|b}` alternatives, of which the first is
    written. `+` is the number `#` of the other side plus one.

    Attributes:
        theirs: Pattern of names in the file; "-" for a tensor that an export leaves out.
        ours: Pattern of our names; "-" for a tensor that is intentionally left out.
        form: Form of the tensor in the file. "q", "k" and "v" are thirds of our rows; "token" is
            (C) for our (1, 1, C), "batched" (N, C) for (1, N, C), "matrix" a convolution of side
            1 for (out, in); "unfolded" are merged patches in the order of nn.Unfold. "" is
            unchanged.
    """

    theirs: str
    ours: str
    form: str = ""


Rows = tuple[Row, ...]


def table(text: str, *, start: str = "") -> Rows:
    """Returns the rows of a text: on each line the file's pattern, ours, and optionally the form.

    A line whose patterns end with a dot is a prefix of the indented lines after it.

    Args:
        text: The lines.
        start: Prefix of the file's pattern in every row.
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
    """Returns rows for a file whose names all have a prefix."""
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
    """Returns a name of one pattern in the other pattern's form, or None if it does not match."""
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
    """Returns our name and the form of a file's tensor, by the first matching row.

    A name without a matching row stays unchanged, whether or not the model has such a tensor.
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
        take: Returns the exported tensor, given our tensor.
    """

    name: str
    shape: Shape
    take: Callable[[Tensor], Tensor]


def outputs(name: str, shape: Shape, rows: Rows) -> list[Output]:
    """Returns the file's tensors made from one of ours, by the first matching row.

    Query, key and value have a row each.
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
    """The rule that makes one tensor of a model.

    Attributes:
        sources: Names of the file's tensors, which are joined along their first axis; none for a
            constant.
        form: See `Row`.
        value: Value of a constant.
        length: Number of elements of a constant.
    """

    sources: tuple[str, ...]
    form: str = ""
    value: float = 0.0
    length: int = 0

    def shape(self, shape_of: Callable[[str], Shape]) -> Shape:
        """Returns the shape, from the sources' shapes."""
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
    """A file translated to our names.

    Attributes:
        pieces: {our name: rule that makes the tensor}, in the file's order.
        dropped: Names in the file that are intentionally left out.
        unfit: Names in the file that make no tensor: duplicates, or a query without its key.
    """

    pieces: Pieces
    dropped: list[str]
    unfit: list[str]


def translated(names: Iterable[str], rows: Rows) -> Translation:
    """Applies a format's table to the names of a file."""
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
    """Reorders the last axis of merged patches, 4C, from our order to that of nn.Unfold.

    In our order, the C channels of a token are adjacent, and the 2x2 tokens follow each other
    column by column; in nn.Unfold's order, the four values of a channel are adjacent, row by row.
    """
    return tensor.unflatten(-1, (2, 2, -1)).movedim(-1, -3).transpose(-1, -2).flatten(-3)


def from_unfolded(tensor: Tensor) -> Tensor:
    """Undoes `to_unfolded`."""
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
    """Gives every block its own copy of a shared position bias (FD's fine-tuning).

    Args:
        pieces: The file's rules, by our names.
        shapes: Shapes of the model that is to be filled.
        shared_name: Returns the shared tensor's name, from the name of a block's own.

    Returns: the rules, and a description of the change.
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
    """Returns a neutral final norm: weight 1, bias 0."""
    return {
        "norm.weight": Piece((), value=1.0, length=width),
        "norm.bias": Piece((), value=0.0, length=width),
    }
