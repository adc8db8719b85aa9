"""The description of a family's published weights files for `weights/`."""

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
        marks: Patterns that must all occur in a file's names; the first format of a family with
            all its marks is taken. The keys above the tensors count as a further name, "in
            KEY.KEY".
        rows: The table of its names.
        facts: Fields that all its files have in common and no name shows.
        ask: Fields in which its files differ and that no name shows: a configuration beside the
            file or the user has to state them.
        statistics: Image statistics that all its files were trained with; None if they differ.
        trained_with: Publishers of such files with their image statistics, if these differ and
            the user has to choose; empty if a guess is safe.
        library: "hf" or "open_clip", whose configuration files may be next to it.
        models: Prefix of the names of models published in this format, or "".
        resize_margin: Number added to the side of the grid in the scale by which its positions are
            resized.
        resize_antialias: Whether its positions are resized with a wider filter onto a smaller grid.
        without: Pattern that must not occur in its names, or "".
        refusal: Reason that its models cannot be read, or "".
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
        """Whether names are of this format, given the keys above the tensors."""
        lines = "\n".join((f"in {'.'.join(wrapping)}", *names))
        if self.without and re.search(self.without, lines, re.MULTILINE):
            return False
        return all(re.search(mark, lines, re.MULTILINE) for mark in self.marks)


class WeightFacts(NamedTuple):
    """Facts of a published checkpoint besides its tensors.

    Attributes:
        statistics: Normalisation that it was trained with.
        image_size: Side in pixels of the images that it was trained with.
        licence: Licence of the weights; empty if unknown.
        origin: Place of publication.
    """

    statistics: Statistics
    image_size: int
    licence: str
    origin: str


class TensorFile(Protocol):
    """An opened file: a mapping of names to tensors, with shapes known before a tensor is read."""

    def shape(self, name: str) -> Shape:
        """Returns the shape of a tensor."""

    def __getitem__(self, name: str) -> Tensor: ...

    def __iter__(self) -> Iterator[str]: ...


# A configuration of one library -> the fields that it states; None if it describes something else.
ConfigReader = Callable[[Any, str], Architecture | None]


class Matched(NamedTuple):
    """A file whose tensors were matched with the tensors of a model.

    Attributes:
        pieces: {name in the model: rule that makes the tensor}.
        shapes: Shape of every tensor of the model.
        notes: Description of changes, for the log.
        what: Name of the model for messages.
        remedy: Remedy for tensors that do not fit, for messages.
    """

    pieces: Pieces
    shapes: Shapes
    notes: list[str]
    what: str
    remedy: str


class TargetModel(NamedTuple):
    """The model that a file is to fill, with the file's known facts.

    Attributes:
        architecture: The model.
        shapes: Shapes of its tensors.
        found: Fields shown by the file's own tensors.
        dropped: Names in the file that are intentionally left out.
    """

    architecture: Any
    shapes: Shapes
    found: Architecture
    dropped: list[str]


class Settling(NamedTuple):
    """The known facts from which a model's undecided fields are settled.

    Attributes:
        known: Fields shown by file, format and configuration.
        given: Fields that the user set.
        is_named: Whether the user named a model.
    """

    known: Architecture
    given: Architecture
    is_named: bool


@dataclass(frozen=True, kw_only=True)
class Published:
    """The published files of a family.

    Attributes:
        formats: {name: format}, the particular before the general.
        beyond: Returns a description of parts in a file that no model of the family has, given
            shapes in our names, or "".
        recognise: Returns the fields of the architecture shown by tensors, from shapes in our
            names and the file; None in other fields. Raises ValueError or IndexError for
            impossible shapes.
        configs: {library: reader of its configuration}, of "hf", "timm" (a module of timm) and
            "open_clip".
        adapt: Returns the rules for a model that differs from the file's within limits, and a
            description of the changes.
        guess: Returns common values of published models of this architecture, for fields that
            nothing else shows.
        free: Fields in which a model may differ from its file: tables are resized, coordinates
            scaled.
        ours: {field: value} of fields that no weights file determines.
        agree: {field: whether weights with the first value make a model with the second, given the
            depths of the file}; other fields have to be equal.
        complete: Fills dependent fields in place; returns notes for the log.
        without_shape: Returns values for fields on which no shape depends, so that a file can be
            compared without them.
        facts: {named model: known facts of its weights}.
    """

    formats: Mapping[str, Format]
    recognise: Callable[[Shapes, TensorFile], Architecture]
    configs: Mapping[str, ConfigReader]
    adapt: Callable[[Pieces, TargetModel], tuple[Pieces, list[str]]]
    beyond: Callable[[Shapes], str] = lambda shapes: ""
    guess: Callable[[Architecture], Architecture] = lambda architecture: Architecture()
    free: frozenset[str] = frozenset({"image_size"})
    ours: Mapping[str, Any] = field(default_factory=dict)
    agree: Mapping[str, Callable[[Any, Any, tuple[int, ...]], bool]] = field(default_factory=dict)
    complete: Callable[[dict[str, Any], Settling], list[str]] = lambda values, settling: []
    without_shape: Callable[[Architecture], dict[str, Any]] = lambda known: {"norm_eps": 1e-6}
    facts: Mapping[str, WeightFacts] = field(default_factory=dict)
