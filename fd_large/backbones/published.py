"""Classes by which a family describes its published weights files to `weights/`."""

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
    """A published format: tensor names, and facts of the files that have these names.

    Attributes:
        what: The format in words, for messages.
        marks: Regular expressions, each of which must be found in some tensor name of a file. They
            also see one more line, "in A.B", where A and B are the keys of the nested dicts that
            hold the tensors, outermost first.
        rows: Table that translates the tensor names.
        facts: Architecture fields that no tensor shows and that are the same in all files.
        ask: Architecture fields that no tensor shows and in which files differ. A configuration
            file next to the weights, or the user, has to state them.
        statistics: Image statistics that all files were trained with; None if files differ.
        trained_with: Publishers of such files with their image statistics, in words, if files
            differ and the user has to choose; empty if a guess is safe.
        library: "hf" or "open_clip", whose configuration file may lie next to the weights; or "".
        models: Prefix of the names of models published in this format, or "".
        resize_margin: Number added to the sides of the new grid when the scale factors for resizing
            the positions are computed (DINO's 0.1).
        resize_antialias: Whether the filter is widened when the positions are resized to a smaller
            grid.
        without: Regular expression that must not be found in the tensor names, or "".
        refusal: Reason why files of this format are refused, or "".
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
        """Whether a file has this format, by the names of its tensors and the wrapping keys.

        Each pattern in `marks` must match, and the pattern `without`, if any, must match none.

        Args:
            names: Names of the file's tensors.
            wrapping: Keys of the nested dicts that hold the tensors, outermost first.
        """
        lines = "\n".join((f"in {'.'.join(wrapping)}", *names))
        if self.without and re.search(self.without, lines, re.MULTILINE):
            return False
        return all(re.search(mark, lines, re.MULTILINE) for mark in self.marks)


class WeightFacts(NamedTuple):
    """Facts of published weights besides the tensors.

    Attributes:
        statistics: Image statistics that the weights were trained with.
        image_size: Side in pixels of the images that the weights were trained with.
        licence: Licence of the weights; empty if unknown.
        origin: Repository or address where the weights are published.
    """

    statistics: Statistics
    image_size: int
    licence: str
    origin: str


class TensorFile(Protocol):
    """An opened file: a mapping of names to tensors, with shapes known before a tensor is read."""

    def shape(self, name: str) -> Shape:
        """Returns the shape of the tensor `name`."""

    def __getitem__(self, name: str) -> Tensor: ...

    def __iter__(self) -> Iterator[str]: ...


# A configuration of one library -> the fields that it states; None if it describes something else.
ConfigReader = Callable[[Any, str], Architecture | None]


class Matched(NamedTuple):
    """A file whose tensors were matched with the tensors of a model.

    Attributes:
        pieces: {name in the model: rule that makes the tensor}.
        shapes: {name in the model: shape} of every tensor of the model.
        notes: Descriptions of changes, for the log.
        what: Name of the model for messages.
        remedy: Remedy for tensors that do not fit, for messages.
    """

    pieces: Pieces
    shapes: Shapes
    notes: list[str]
    what: str
    remedy: str


class TargetModel(NamedTuple):
    """A model into which a file's weights are loaded, and facts of the file.

    Attributes:
        architecture: The architecture of the model.
        shapes: {name: shape} of the model's tensors.
        found: Architecture fields that the file's tensors show.
        dropped: Names of the file's tensors that are intentionally left out.
    """

    architecture: Any
    shapes: Shapes
    found: Architecture
    dropped: list[str]


class Settling(NamedTuple):
    """Facts of a model that are known before its remaining architecture fields are filled.

    Attributes:
        known: Fields that the file's tensors, format and configuration show.
        given: Fields that the user set.
        is_named: Whether the user named a model.
    """

    known: Architecture
    given: Architecture
    is_named: bool


@dataclass(frozen=True, kw_only=True)
class Published:
    """How the published weights files of a family are read.

    Attributes:
        formats: {name: format}. The first format that fits a file is taken, so special formats come
            before general ones.
        beyond: Function that takes {our name: shape} of a file's tensors, and returns in words a
            part of the file that no model of the family has, or "".
        recognise: Function that takes {our name: shape} of a file's tensors and the file, and
            returns the architecture fields that the tensors show, with None in other fields. It
            raises ValueError or IndexError for impossible shapes.
        configs: {library: function that reads its configuration}, for the libraries "hf", "timm"
            and "open_clip"; timm's configuration is a timm module.
        adapt: Function that takes the file's {our name: rule} and a `TargetModel`, which may differ
            from the file's model within limits. It returns the {our name: rule} of that model, and
            descriptions of the changes for the log.
        guess: Function that takes the architecture fields that the tensors show. It returns values
            that are common among published models, for fields that neither the file nor a
            configuration nor the user gives.
        free: Fields in which a model may differ from its file, because position tables are resized
            or coordinates are scaled.
        ours: {field: default value} of the fields that the user may choose freely, since they
            decide only how this package uses the weights.
        agree: {field: function that returns whether the weights fit the model in this field}. The
            function takes the file's value, the model's value and the depths of the file. In
            fields without a function, the two values have to be equal.
        complete: Function that takes the {field: value} of a model and a `Settling`. It fills the
            fields that depend on other fields, in place, and returns notes for the log.
        without_shape: Function that takes the known fields, and returns {field: arbitrary value}
            for fields on which no shape depends. With these values, the shapes of a model can be
            computed before these fields are known.
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
