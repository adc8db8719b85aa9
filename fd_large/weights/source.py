"""A start's weights: each source is located and opened once, in the names of one of our models.

What a path means beside files (the folder of a run) is read by whoever a `Sources` was given.
"""

from __future__ import annotations

import logging
import math
import os
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from fd_large import doors
from fd_large.backbones.family import Family, Scheme
from fd_large.backbones.published import Published, Wanted
from fd_large.backbones.registry import (
    family_of,
    family_of_source,
    parameter_shapes,
    statistics_of,
)
from fd_large.backbones.statistics import Statistics
from fd_large.backbones.translation import Piece, Pieces, Shape, Shapes, translated
from fd_large.errors import WeightsError
from fd_large.recipes.architectures import (
    Architecture,
    brings_model,
    filled,
    name_of,
    overrides,
    set_fields,
    whole,
)
from fd_large.recipes.family import FamilyArchitecture
from fd_large.weights.coverage import Fitted
from fd_large.weights.formats import FORMATS, detect
from fd_large.weights.locate import OPEN_CLIP, locate
from fd_large.weights.read import OTHER, Tensors, read, split_part
from fd_large.weights.sidecar import (
    Described,
    Sidecar,
    described,
    read_library,
    read_own,
    read_sidecar,
)

log = logging.getLogger(__name__)

_TEACHER = "feature_model."
# What stands between a backbone and its heads, under the backbone's name.
_OF_HEADS = re.compile(r"backbone\.(norm\d|hidden_states_norms|fpn\d|fpn)\.")
_LONGEST_NAME = 255  # What file systems take.


@dataclass(frozen=True)
class Weights:
    """An opened file of a model, in our names; nothing is read yet.

    Attributes:
        source: The source as the user gave it; for a run's folder the checkpoint that was taken.
        form: Name of its format.
        file: Its tensors as they are.
        pieces: {our name: what makes it}.
        dropped: Names in the file that are left out on purpose.
        unfit: Names in the file that make no tensor.
        found: What names and shapes show of the architecture; None in other fields.
        stated: What the format and a configuration beside the file state about it.
        statistics: Image statistics that it was trained with; None if unknown.
        own: Whether this project wrote it.
        path: The file, the index of several, or the checkpoint; None if a library brings it.
    """

    source: str
    form: str
    file: Tensors
    pieces: Pieces
    dropped: list[str]
    unfit: list[str]
    found: Architecture
    stated: Architecture
    statistics: Statistics | None
    own: bool
    path: Path | None

    @property
    def family(self) -> Family:
        """The family of the model."""
        return FORMATS[self.form].family

    @property
    def published(self) -> Published:
        """What the family says of its files."""
        assert self.family.published is not None
        return self.family.published

    @property
    def what(self) -> str:
        """File and format in words."""
        ours = "this project, " if self.own else ""
        return f"{self.source} ({ours}{FORMATS[self.form].format.what})"

    def shapes(self) -> dict[str, Shape]:
        """Returns the shapes in our names."""
        return {name: piece.shape(self.file.shape) for name, piece in self.pieces.items()}

    @property
    def trained_with(self) -> str:
        """Which statistics its publishers use, where they are unknown and a guess would not do."""
        guess_does = self.own or self.statistics is not None
        return "" if guess_does else FORMATS[self.form].format.trained_with

    def unknown(self, wanted: Architecture) -> tuple[str, ...]:
        """Returns fields of the format that neither file, configuration nor user determines."""
        return tuple(
            name
            for name in FORMATS[self.form].format.ask
            if getattr(self.stated, name) is None and getattr(wanted, name) is None
        )

    def adapted(
        self, architecture: FamilyArchitecture, expected: Shapes
    ) -> tuple[Pieces, list[str]]:
        """Returns the pieces for a model, and in words what was done to those of the file.

        Args:
            architecture: The model, which may differ from the file's where its family allows.
            expected: Shapes of the tensors of the model.
        """
        pieces = self.pieces | {name: Piece((name,)) for name in self.unfit}
        wanted = Wanted(architecture, expected, self.found, self.dropped)
        pieces, notes = self.published.adapt(pieces, wanted)
        if self.dropped:
            notes = [f"left out on purpose: {_groups(self.dropped)}", *notes]
        return pieces, notes

    def fitted(
        self,
        architecture: FamilyArchitecture,
        *,
        without: Collection[str] = (),
        allow: tuple[str, ...] = (),
        where: str = "weights",
        remedy: str = "",
    ) -> Fitted:
        """Returns the tensors for a model, checked against its shapes.

        Args:
            architecture: The model.
            without: Names of tensors that are not wanted.
            allow: Patterns of names that may be missing or left over.
            where: What the user set, for messages.
            remedy: What the user can do about tensors that do not fit.

        Raises: WeightsError: if the file does not cover the model.
        """
        shapes = parameter_shapes(architecture)
        expected = {name: shape for name, shape in shapes.items() if name not in without}
        pieces, notes = self.adapted(architecture, expected)
        return Fitted(
            pieces,
            self.file,
            expected,
            allow=(*allow, *without),
            what=self.what,
            where=where,
            margin=0.0 if self.own else FORMATS[self.form].format.resize_margin,
            notes=notes,
            remedy=remedy,
        )


class Stored(NamedTuple):
    """A model of this project's that no weights file holds.

    Attributes:
        path: Path by which it is opened again, whatever is stored since.
        file: Its tensors in our names.
        architecture: The model.
        statistics: Mean and deviation by which its images are normalised.
        sizes: Number of elements of each tensor, by the name that it is stored under.
    """

    path: Path
    file: Tensors
    architecture: FamilyArchitecture
    statistics: Statistics
    sizes: Mapping[str, int]


# (path, what the user set) -> the model, or None where the path means nothing to it.
StoredReader = Callable[[Path, str], Stored | None]


class Sources:
    """The weights that one start uses; each is located and opened once.

    Args:
        readers: Asked of a path before it is taken for a file; without collectives.
        guesses: Whether image statistics that nothing states are guessed, with a warning, where
            they would be asked for: there is nobody to set them.
        settled: {source: image statistics by which it was settled earlier, empty: a guess}, for
            where nothing states them; of such a source they are not asked for again. If its file
            holds a student and a teacher and it names neither, it is the student.
    """

    def __init__(
        self,
        *readers: StoredReader,
        guesses: bool = False,
        settled: Mapping[str, tuple[float, ...]] | None = None,
    ) -> None:
        self._readers = readers
        self.guesses = guesses
        self.settled = dict(settled or {})
        self._opened: dict[str, Weights] = {}
        self._files: dict[str, Tensors] = {}
        self._own: dict[str, Stored | None] = {}
        self._read: dict[Path, Stored | None] = {}
        self._described: dict[str, Described | None] = {}

    def open(self, source: str | Path, *, where: str = "weights") -> Weights:
        """Opens a source that ends in a file, finds its format, and what is known of its model.

        Args:
            source: See above; `#student`, `#teacher` or `#projector` after a path name a part.
            where: What the user set, for messages.

        Raises: WeightsError: if it cannot be fetched or read, or is of no known format.
        """
        if str(source) not in self._opened:
            weights = self._open(str(source), where)
            # The checkpoint that a run's folder meant is the same weights under another name.
            self._opened |= {str(source): weights, weights.source: weights}
        return self._opened[str(source)]

    def fitted(
        self,
        source: str,
        architecture: FamilyArchitecture,
        *,
        without: Collection[str] = (),
        allow: tuple[str, ...] = (),
        where: str = "weights",
        remedy: str = "",
    ) -> Fitted:
        """Returns the tensors of a source for a model of any family; see `Weights.fitted`."""
        matched = family_of(architecture).matched
        if matched is None:
            return self.open(source, where=where).fitted(
                architecture, without=without, allow=allow, where=where, remedy=remedy
            )
        if source not in self._files:
            own = self.own(source, where=where)
            self._files[source] = own.file if own else _foreign(source, where)
        file, own = self._files[source], self._own.get(source)
        try:
            found = matched(architecture, {name: file.shape(name) for name in file}, where)
        except WeightsError as error:
            if own is None or own.architecture == architecture:
                raise
            raise other_model(source, own.architecture, architecture, where) from error
        return Fitted(
            found.pieces,
            file,
            found.shapes,
            allow=allow,
            what=f"{source} ({found.what})",
            where=where,
            notes=found.notes,
            remedy=_named(own.architecture) if own else found.remedy,
            resize=False,
        )

    def own(self, source: str, *, where: str = "weights") -> Stored | None:
        """Opens a model of ours whose family has no published names; None if a source is another.

        Args:
            source: The folder of a run, of one of its checkpoints, or of an export.
            where: What the user set, for messages.

        Raises: FDError: if it cannot be read.
        """
        found = self.ours(source, where=where)
        return found if found and family_of(found.architecture).published is None else None

    def ours(self, source: str, *, where: str = "weights") -> Stored | None:
        """Opens a model that this project stored; None if a source is another. Imports no code.

        Args:
            source: The folder of a run, of one of its checkpoints, or of an export.
            where: What the user set, for messages.

        Raises: FDError: if it cannot be read.
        """
        if source not in self._own:
            path, found = Path(source), None
            if any(len(os.fsencode(part)) > _LONGEST_NAME for part in path.parts):
                raise WeightsError(
                    f"{where}: {source[:200]}: no such file; got a name of more than "
                    f"{_LONGEST_NAME} bytes, expected the path of a file. Check it."
                )
            if not family_of_source(source):
                found = self._stored(path, where) or _exported(path, where)
            self._own[source] = found
            if found is not None:
                self._own[str(found.path)] = found
        return self._own[source]

    def described(self, source: str, *, where: str = "weights") -> Described | None:
        """Returns a library's model that a folder says it is; None if names of tensors tell it.

        Args:
            source: A folder or a file in it, `hf:REPO`, or another source, which is none.
            where: What the user set, for messages.

        Raises: WeightsError: if its configuration names a model that nothing here reads.
        """
        if source not in self._described:
            found = None
            if not brings_model(source) and not source.startswith(OPEN_CLIP):
                found = read_library(locate(source, where=where).path, where)
            self._described[source] = found
        return self._described[source]

    def statistics(
        self, source: str, architecture: FamilyArchitecture, *, where: str = "weights"
    ) -> Statistics | None:
        """Returns the image statistics that a source states for a model; None if it states none."""
        if family_of(architecture).matched is None:
            return self.open(source, where=where).statistics
        own = self.own(source, where=where)
        return own.statistics if own else None

    def path(self, source: str, *, where: str = "weights") -> Path | None:
        """Returns the file, index or checkpoint that a source means; None if it is no file."""
        if source in self._opened:
            return self._opened[source].path
        if (own := self._own.get(source)) is not None:
            return own.file.path or own.path
        if family_of_source(source):
            return None
        return self.tensors(source, where=where).path

    def tensors(self, source: str, *, where: str = "weights") -> Tensors:
        """Opens the tensors of a source under their own names.

        Raises: WeightsError: if it cannot be fetched or read.
        """
        if source not in self._files:
            self._files[source] = _foreign(source, where)
        return self._files[source]

    def fetch(self, source: str, *, where: str = "weights") -> None:
        """Downloads what a library would download once tensors are read; in a meeting of all ranks.

        Raises: WeightsError: if it cannot be had.
        """
        brought = family_of_source(source)
        # What was opened has its tensors.
        if brought and brought[0].scheme.fetch and source not in self._opened:
            brought[0].scheme.fetch(brought[1], where)

    def forget(self) -> None:
        """Lets go of all files; some are in memory whole. What is asked for is opened again."""
        self._opened.clear()
        self._files.clear()
        self._own.clear()
        self._read.clear()
        self._described.clear()

    def _stored(self, path: Path, where: str) -> Stored | None:
        # Once: a run that trains on must not show a start two checkpoints.
        if path not in self._read:
            answers = (reader(path, where) for reader in self._readers)
            self._read[path] = next((found for found in answers if found), None)
        return self._read[path]

    def _open(self, source: str, where: str) -> Weights:
        located = locate(source, where=where)
        name, part = split_part(located.path, where=where)
        file, stored, ignored = located.tensors, None, []
        if file is None and part in ("", "student"):
            stored = self._stored(Path(name), where)
        if stored is not None:
            file, source = stored.file, str(stored.path)
        if file is None:
            # Recipes name the part; those of earlier versions do not, and mean the student.
            is_open = source == name and source not in self.settled
            file = read(name, where=where, part=part or ("" if is_open else "student"))
            # Feature-Distillation learns from EsViT's student; DINO's and iBOT's own code evaluates
            # the teacher.
            unnamed = file.other_part == "student" and not part
            if unnamed and detect(file, where=where, wrapping=file.wrapping) == "esvit":
                file = read(name, where=where, part="student")
            if file.other_part and not part:
                taken = OTHER[file.other_part]
                source = f"{source}#{taken}" if is_open else source
                _tell_part(file, name, taken, where)
            file, ignored = _part(file, part, name, where)
            file, heads = _backbone(file)
            ignored += heads
        form = detect(file, where=where, wrapping=file.wrapping)
        if form == "open_clip" and part == "teacher":
            form = "openai_clip"  # The only CLIP that Feature-Distillation teaches with.
        family, line = FORMATS[form]
        published = family.published
        assert published is not None
        translation = translated(file, line.rule)
        pieces, dropped = translation.pieces, [*ignored, *translation.dropped]
        projector = {n: p for n, p in pieces.items() if n.startswith("projection.")}
        if part == "projector":
            pieces = projector
        else:
            pieces = {n: p for n, p in pieces.items() if n not in projector}
            dropped += [name for piece in projector.values() for name in piece.sources]
        beside = Sidecar(Architecture(), None)
        if stored is not None:
            beside = Sidecar(overrides(stored.architecture), stored.statistics, own=True)
        elif file.path:
            beside = read_sidecar(file.path, published, line.library, where)
        stated = filled(
            described(published, located.library, located.config, where), beside.architecture
        )
        # The size of its images says nothing of how a model computes.
        explained = beside.own or bool(set_fields(stated).keys() - {"image_size"})
        statistics = located.statistics or beside.statistics
        if not beside.own:  # Names that are ours alone say nothing of who trained the weights.
            stated, statistics = filled(stated, line.facts), statistics or line.statistics
        shapes = {ours: piece.shape(file.shape) for ours, piece in pieces.items()}
        found = _recognised(family, shapes, file, f"{where}: {source}")
        doubtful = not explained and part != "projector"
        if doubtful and (beyond := published.beyond(shapes)):
            raise WeightsError(
                f"{where}: {source} ({line.what}): a model of another kind than its names say; "
                f"got {beyond}, expected what a {family.architecture.family} model has. A folder "
                "with its config.json is read as it is. If timm has the model, set "
                f"{_model_flag(where)} timm:NAME with this file."
            )
        return Weights(
            source=source,
            form=form,
            file=file,
            pieces=pieces,
            dropped=dropped,
            unfit=translation.unfit,
            found=found,
            stated=filled(stated, published.guess(found)),
            statistics=statistics,
            own=beside.own,
            path=stored.path if stored else file.path,
        )


def _model_flag(where: str) -> str:
    """The flag of the model, beside that of the source."""
    section = where.rpartition(".")[0]
    return f"{section}.model" if section.startswith("--") else "--teacher.model"


def other_model(
    source: str, held: FamilyArchitecture, wanted: FamilyArchitecture, where: str
) -> WeightsError:
    """Returns the refusal of what this project stored, where it is not the model that is wanted."""
    return WeightsError(
        f"{where}: {source}: another model; it holds {name_of(held)}, expected {name_of(wanted)}. "
        f"{_named(held)}"
    )


def _named(held: FamilyArchitecture) -> str:
    return f"Set --student.model {name_of(held)}, which it holds."


def _recognised(family: Family, shapes: Shapes, file: Tensors, where: str) -> Architecture:
    """What the tensors show.

    Raises: WeightsError: if one has no elements, or has a shape that no model of the family has.
    """
    empty = [name for name, shape in shapes.items() if 0 in shape]
    if empty:
        raise WeightsError(
            f"{where}: tensors without numbers; got {len(empty)} of {len(shapes)}, "
            f"{empty[0]} {shapes[empty[0]]} the first, expected whole ones. state_dict() of a "
            "model in shards (ZeRO-3) holds none: gather it before it is saved."
        )
    name = family.architecture.family
    if "patch_embed.proj.weight" not in shapes:
        return Architecture(family=name)
    assert family.published is not None
    try:
        return family.published.recognise(shapes, file)
    except (ArithmeticError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise WeightsError(
            f"{where}: shapes of no {name} model; got patch_embed.proj.weight "
            f"{shapes['patch_embed.proj.weight']} and others ({error}), expected (width, 3, patch, "
            "patch) and tables of its kind. Use the weights of another model."
        ) from error


def _exported(path: Path, where: str) -> Stored | None:
    """A folder that `export` wrote, of a model whose file does not show it; None if it is none."""
    found = read_own(path, where)
    if found is None or not found.architecture.family:
        return None
    architecture = whole(set_fields(found.architecture))
    code_hash = doors.hashes(architecture.code).get(architecture.code, "")
    if code_hash and code_hash != found.code_hash:
        log.warning(
            "%s: %s is NOT THE FILE that made this model (its hash was %s, now %s)",
            path,
            architecture.code,
            found.code_hash[:12],
            code_hash[:12],
        )
    statistics = found.statistics or statistics_of("", architecture)
    file = read(str(path), where=where)
    return Stored(path, file, architecture, statistics, {n: math.prod(file.shape(n)) for n in file})


def _foreign(source: str, where: str) -> Tensors:
    """The tensors of a source whose names are of no format."""
    brought = family_of_source(source)
    if brought is None:
        name, part = split_part(locate(source, where=where).path, where=where)
        file = read(name, where=where, part=part or "student")
        if file.other_part and not part:
            _tell_part(file, name, "student", where)
        return file
    family, rest = brought
    assert family.scheme is not None
    return _Brought(family.scheme, rest, where)


class _Brought(Tensors):
    """The tensors of a module that comes once the first is asked for."""

    def __init__(self, scheme: Scheme, rest: str, where: str) -> None:
        assert scheme.weightless is not None
        super().__init__(scheme.weightless(rest, where))
        self._scheme, self._rest, self._where = scheme, rest, where
        self._is_there = False

    def __getitem__(self, name: str) -> Tensor:
        if not self._is_there:
            loaded = self._scheme.load(self._rest, self._where)
            self._entries, self._is_there = dict(loaded.net.state_dict()), True
        return super().__getitem__(name)


def _tell_part(file: Tensors, name: str, taken: str, where: str) -> None:
    log.info(
        "%s: %s holds a student and a teacher: the %s is taken; %s#%s is the other",
        where,
        name,
        taken,
        name,
        file.other_part,
    )


def _part(file: Tensors, part: str, name: str, where: str) -> tuple[Tensors, list[str]]:
    """The model asked for, of a file of Feature-Distillation that holds several; and what is not.

    Raises: WeightsError: if the file holds no such part.
    """
    taught = {n.removeprefix(_TEACHER): n for n in file if n.startswith(_TEACHER)}
    has_projector = "decoder.0.weight" in file
    if part == "teacher" and taught:
        return file.under(taught), [n for n in file if n not in set(taught.values())]
    found = part in ("", "student") or part in file.wrapping
    if not found and not (part == "projector" and has_projector):
        raise WeightsError(
            f"{where}: {name}: no such part in the file; got #{part}, expected the file alone"
            f"{', #teacher' if taught else ''}{', #projector' if has_projector else ''}. Leave "
            "the part out."
        )
    rest = {n: n for n in file if not n.startswith(_TEACHER)}
    return file.under(rest), list(taught.values())


def _backbone(file: Tensors) -> tuple[Tensors, list[str]]:
    """The backbone of a whole segmentation model, and the names of its heads and their maps."""
    if not any(name.startswith("decode_head.") for name in file):
        return file, []
    own = {
        name.removeprefix("backbone."): name
        for name in file
        if name.startswith("backbone.") and not _OF_HEADS.match(name)
    }
    taken = set(own.values())
    return file.under(own), [name for name in file if name not in taken]


def _groups(names: list[str]) -> str:
    """Names by their first word, with counts."""
    groups: dict[str, int] = {}
    for name in names:
        groups[name.split(".")[0]] = groups.get(name.split(".")[0], 0) + 1
    return ", ".join(f"{name} ({count})" for name, count in groups.items())
