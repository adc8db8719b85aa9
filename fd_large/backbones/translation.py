"""Names of published files: a format is a table of rows, which serves reading and exporting.

What fits and what is missing is known from names alone, before a tensor is read.
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
    """One line of a table: names of a published file, ours, and what differs in the tensors.

    In a pattern `#` is a number, `*` any text, and `{a|b}` one of these, of which the first is
    written. `+` is a number that is larger by one than `#` on the other side.

    Attributes:
        theirs: Pattern of names in the file; "-" for a tensor that an export leaves out.
        ours: Pattern of our names; "-" for a tensor that is left out on purpose.
        form: The tensor in the file. "q", "k" and "v" are thirds of our rows; "token" is (C) for
            our (1, 1, C), "batched" (N, C) for (1, N, C), "matrix" a convolution of side 1 for
            (out, in); "unfolded" are merged patches in the order of nn.Unfold. "" is as it is.
    """

    theirs: str
    ours: str
    form: str = ""


Rows = tuple[Row, ...]


def table(text: str, *, start: str = "") -> Rows:
    """Returns the rows of a text: on each line their pattern, ours, and the form if there is one.

    A line whose patterns end with a dot holds for the indented lines after it, whose patterns go
    on there.

    Args:
        text: The lines.
        start: Start of all their patterns.
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
    """Returns rows of a file in which all names begin so."""
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
    """Returns a name of one pattern as the other pattern has it; None if it is not of the first."""
    found = _regex(before).fullmatch(name)
    if found is None:
        return None
    texts, step = iter(found.groups()), after.count("+") - before.count("+")

    def part(wild: re.Match[str]) -> str:
        if wild[0].startswith("{"):
            return wild[0][1:-1].split("|")[0]
        text = next(texts)
        return str(int(text) + step) if step and wild[0] != "*" else text

    return _WILD.sub(part, after)


def our_name(name: str, rows: Rows) -> tuple[str, str]:
    """Returns our name and the form of a tensor of a file, by the first row that has it.

    A name that no row has stays as it is: the model then lacks it or has it.
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
        take: Makes it from our tensor.
    """

    name: str
    shape: Shape
    take: Callable[[Tensor], Tensor]


def outputs(name: str, shape: Shape, rows: Rows) -> list[Output]:
    """Returns the tensors of a file that one of ours becomes, by the first row that has it.

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
    """The recipe for one tensor of a model.

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
    """Gives the last axis of merged patches, 4C in our order, in that of nn.Unfold.

    Ours has all channels of one token after another, down each column of the 2x2; nn.Unfold has
    the four tokens of a channel side by side, row by row.
    """
    return tensor.unflatten(-1, (2, 2, -1)).movedim(-1, -3).transpose(-1, -2).flatten(-3)


def from_unfolded(tensor: Tensor) -> Tensor:
    """Undoes `to_unfolded`."""
    return tensor.unflatten(-1, (-1, 2, 2)).transpose(-1, -2).movedim(-3, -1).flatten(-3)


# What undoes the reading of each form.
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


def expanded(pieces: Pieces, shapes: Shapes, own: Callable[[str], str]) -> tuple[Pieces, list[str]]:
    """Gives every block its own copy of a position bias that a file shares (FD's fine-tuning).

    Args:
        pieces: What the file makes, by our names.
        shapes: Shapes of the model that is to be filled.
        own: Gives the shared tensor's name for that of a block's own.

    Returns: the pieces, and in words what was done.
    """
    copies = {
        name: pieces[own(name)]
        for name in shapes
        if name not in pieces and own(name) != name and own(name) in pieces
    }
    if not copies:
        return pieces, []
    shared = {own(name) for name in copies}
    kept = {name: piece for name, piece in pieces.items() if name not in shared}
    return kept | copies, ["the shared position bias is copied to every block"]


def fresh_norm(width: int) -> Pieces:
    """Returns a final norm that only normalises: weight 1, bias 0."""
    return {
        "norm.weight": Piece((), value=1.0, length=width),
        "norm.bias": Piece((), value=0.0, length=width),
    }
