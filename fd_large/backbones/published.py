"""The description of a family's published weights files, by which `weights/` reads them."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

from torch import Tensor

from fd_large.backbones.statistics import Statistics
from fd_large.backbones.translation import Pieces, Rows, Shape, Shapes
from fd_large.recipes.architectures import Architecture


@dataclass(frozen=True)
class Format:
    """A published layout of names.

    Attributes:
        what: The format in words, for messages.
        marks: Patterns of which each is found in a name of a file; the first format of a family
            whose marks are all there is taken. The keys that the tensors stood under are one more
            name, "in KEY.KEY".
        rows: The table of its names.
        facts: Fields that all its files have in common and no name shows.
        ask: Fields in which its files differ and that no name shows: a configuration beside the
            file or the user has to.
        statistics: Image statistics that all its files were trained with; None if they differ.
        trained_with: Who publishes such files with which statistics, where they differ and the user
            has to say; empty where a guess does.
        library: "hf" or "open_clip", whose configuration files may stand beside it.
        models: Start of the names of the models that are published in it; empty if there is none.
        resize_margin: Number added to the side of the grid in the scale by which its positions are
            resized.
        resize_antialias: Whether its positions are resized with a wider filter onto a smaller grid.
        without: Pattern that is found in none of its names; empty: none.
        refusal: Why its models cannot be read; empty if they can.
    """

    what: str
    marks: tuple[str, ...]
    rows: Rows
    facts: Architecture = field(default_factory=Architecture)
    ask: tuple[str, ...] = ()
    statistics: Statistics | None = None
    trained_with: str = ""
    library: str = ""
    models: str = ""
    resize_margin: float = 0.0
    resize_antialias: bool = False
    without: str = ""
    refusal: str = ""

    def is_it(self, names: Collection[str], wrapping: tuple[str, ...]) -> bool:
        """Whether names are of this format, given the keys that they stood under."""
        lines = "\n".join((f"in {'.'.join(wrapping)}", *names))
        if self.without and re.search(self.without, lines, re.MULTILINE):
            return False
        return all(re.search(mark, lines, re.MULTILINE) for mark in self.marks)


class WeightFacts(NamedTuple):
    """Facts of one published checkpoint beside its numbers.

    Attributes:
        statistics: Normalisation that it was trained with.
        image_size: Side in pixels of the images that it was trained with.
        licence: Licence of the weights; empty if unknown.
        origin: Where they are published.
    """

    statistics: Statistics
    image_size: int
    licence: str
    origin: str


class TensorFile(Protocol):
    """An opened file: a mapping of names to tensors whose shapes are known unread."""

    def shape(self, name: str) -> Shape:
        """Returns the shape of a tensor."""

    def __getitem__(self, name: str) -> Tensor: ...

    def __iter__(self) -> Iterator[str]: ...


# A configuration of one library -> the fields that it states; None if it describes something else.
ConfigReader = Callable[[Any, str], Architecture | None]


class Matched(NamedTuple):
    """A file whose tensors were found among those of a model.

    Attributes:
        pieces: {name in the model: what makes it}.
        shapes: Shape of every tensor of the model.
        notes: What was done, for the log.
        what: The model in words, for messages.
        remedy: What the user can do about tensors that do not fit.
    """

    pieces: Pieces
    shapes: Shapes
    notes: list[str]
    what: str
    remedy: str


class Wanted(NamedTuple):
    """The model that a file is to fill, and what is known of the file.

    Attributes:
        architecture: The model.
        shapes: Shapes of its tensors.
        found: What the file's own tensors show.
        dropped: Names in the file that are left out on purpose.
    """

    architecture: Any
    shapes: Shapes
    found: Architecture
    dropped: list[str]


class Settling(NamedTuple):
    """The known facts from which a model's undecided fields are settled.

    Attributes:
        known: What file, format and configuration show.
        given: What the user set.
        is_named: Whether the user named a model.
    """

    known: Architecture
    given: Architecture
    is_named: bool


@dataclass(frozen=True, kw_only=True)
class Published:
    """A family's published files.

    Attributes:
        formats: {name: format}, the particular before the general.
        beyond: Returns in words what the tensors of a file hold that no model of the family has,
            given their shapes in our names; empty if there is nothing.
        recognise: Returns what tensors show of the architecture, from shapes in our names and the
            file as it is; None in other fields. Raises ValueError or IndexError for shapes that no
            model of the family has.
        configs: {library: reader of its configuration}, of "hf", "timm" (a module of timm) and
            "open_clip".
        adapt: Returns the pieces for a model that differs from the file's where it may, and says
            in words what was done.
        guess: Returns what published models of such an architecture have in common, for where
            nothing else shows.
        free: Fields in which a model may differ from its file: tables are resized, coordinates
            scaled.
        ours: {field: value} of fields on which no file has an opinion.
        agree: {field: whether weights with the first value make a model with the second, given the
            depths of the file}; other fields have to be equal.
        complete: Fills fields that follow from others, in place; returns notes for the log.
        without_shape: Returns values for fields on which no shape depends, so that a file can be
            compared without them.
        facts: {named model: what is known of its weights}.
    """

    formats: Mapping[str, Format]
    recognise: Callable[[Shapes, TensorFile], Architecture]
    configs: Mapping[str, ConfigReader]
    adapt: Callable[[Pieces, Wanted], tuple[Pieces, list[str]]]
    beyond: Callable[[Shapes], str] = lambda shapes: ""
    guess: Callable[[Architecture], Architecture] = lambda found: Architecture()
    free: frozenset[str] = frozenset({"image_size"})
    ours: Mapping[str, Any] = field(default_factory=dict)
    agree: Mapping[str, Callable[[Any, Any, tuple[int, ...]], bool]] = field(default_factory=dict)
    complete: Callable[[dict[str, Any], Settling], list[str]] = lambda values, settling: []
    without_shape: Callable[[Architecture], dict[str, Any]] = lambda known: {"norm_eps": 1e-6}
    facts: Mapping[str, WeightFacts] = field(default_factory=dict)
