"""Finds the weights of a user's source; all code does so by `Sources.resolve`.

There are five kinds of sources: a model that a library or the user's code provides (`timm:NAME`,
`module:FILE.py:NAME`); a run, a checkpoint or an export, whose own files describe the model; a
folder whose configuration names a library's model; tensors in a published format, whose names and
shapes show the model; and other tensors, for a model that the user names.
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Callable, Collection, Mapping
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from fd_large import doors
from fd_large.backbones.family import Scheme
from fd_large.backbones.registry import family_of, family_of_source, statistics_of
from fd_large.backbones.statistics import Statistics
from fd_large.errors import WeightsError
from fd_large.files import kind_of
from fd_large.recipes.architectures import brings_model, name_of, overrides, set_fields, whole
from fd_large.recipes.family import FamilyArchitecture
from fd_large.weights.coverage import Fitted
from fd_large.weights.download import Located, locate
from fd_large.weights.named import OPEN_CLIP
from fd_large.weights.published import PublishedWeights, backbone_of, detect, in_our_names, part_of
from fd_large.weights.read import OTHER, Tensors, file_of, read, split_part
from fd_large.weights.sidecar import Configuration, Described, Stated

log = logging.getLogger(__name__)

_LONGEST_NAME = 255  # In bytes; file systems refuse longer names.
_FILES_OF_LIBRARIES = (".safetensors", ".bin", ".json")


class Stored(NamedTuple):
    """A model that this project stored in a run, a checkpoint or an exported folder.

    Attributes:
        path: Path that opens the same model again, even if the run has stored later checkpoints.
        file: The tensors of the model.
        architecture: The model.
        statistics: Mean and standard deviation by which the model's images are normalised.
        sizes: {stored name: number of elements} of each tensor.
    """

    path: Path
    file: Tensors
    architecture: FamilyArchitecture
    statistics: Statistics
    sizes: Mapping[str, int]


StoredReader = Callable[[Path, str], Stored | None]
"""Function of a path and the field that the user set; returns the stored model at the path, or None
if there is none."""


class Sources:
    """The weights of all sources in one launch of a command; each source is resolved once.

    Args:
        readers: Functions that open a run or checkpoint at a path and return its model, or None if
            there is none. They are called before the path is read as a weights file, and contain no
            collectives.
        guesses: True if unknown image statistics are always guessed with a warning, since the
            command has no flag to set them; False if they are an error for formats whose publishers
            use different statistics.
        settled: {source: image statistics}, for the sources whose models an earlier launch of the
            command determined. A value is an empty tuple if that launch guessed the statistics. A
            value is used if the weights state no statistics. If a source in this dict has a file
            with a student and a teacher, and does not name one of them, the student is taken.
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
        self._resolved: dict[str, ResolvedWeights] = {}
        self._stored: dict[Path, Stored | None] = {}

    def resolve(self, source: str | Path, *, where: str = "") -> ResolvedWeights:
        """Returns the weights of a source; nothing is read or downloaded yet.

        Args:
            source: A path, or a source with a prefix, such as `hf:REPO` or `timm:NAME`. `#student`,
                `#teacher` or `#projector` after the path of a file names a part of the file.
            where: Field that the user set, for messages; "" keeps the field of an earlier call.
        """
        source = str(source)
        if source not in self._resolved:
            # A settled recipe names the same weights by their settled source.
            known = (w for w in self._resolved.values() if w.settled_source == source)
            new = ResolvedWeights(source, self._read_stored, was_settled=source in self.settled)
            self._resolved[source] = next(known, new)
        self._resolved[source].where = where or self._resolved[source].where
        return self._resolved[source]

    def forget(self) -> None:
        """Releases all opened files and their memory; `resolve` then opens files again."""
        self._resolved.clear()
        self._stored.clear()

    def _read_stored(self, path: Path, where: str) -> Stored | None:
        # Read once, so that a start sees one checkpoint of a run that is still training.
        if path not in self._stored:
            answers = (reader(path, where) for reader in self._readers)
            self._stored[path] = next((stored for stored in answers if stored), None)
        return self._stored[path]


class ResolvedWeights:
    """The weights of one source; properties are computed on first access and kept.

    Every property raises FDError if the source cannot be downloaded or read, or is damaged.
    `origin.py` finds the licence and the repository, from the source's name alone.

    Args:
        source: The source as the user wrote it.
        read_stored: Opens runs and checkpoints.
        was_settled: Whether the source is one of `Sources.settled`.

    Attributes:
        source: The source as the user wrote it.
        settled_source: The source by which the recipe names the same weights after its sections are
            completed: for a run, the checkpoint that was taken; for a file with two models,
            FILE#PART.
        brought: (family, name) if a family's library or the user's code provides the model with its
            weights, as for `timm:NAME`; None for other sources.
    """

    def __init__(self, source: str, read_stored: StoredReader, *, was_settled: bool) -> None:
        self.source = self.settled_source = source
        self.where = "weights"
        self.brought = family_of_source(source)
        self._read_stored, self._was_settled = read_stored, was_settled
        self._files: dict[str, Tensors] = {}

    @cached_property
    def stored(self) -> Stored | None:
        """The model of a run, a checkpoint or an exported folder; None for other sources.

        The user's code that makes the model is not imported.
        """
        path = Path(self.source)
        if any(len(os.fsencode(part)) > _LONGEST_NAME for part in path.parts):
            raise WeightsError(
                f"{self.where}: {self.source[:200]}: no such file; got a name of more than "
                f"{_LONGEST_NAME} bytes, expected the path of a file. Check the path."
            )
        if self.brought:
            return None
        stored = self._read_stored(path, self.where)
        if stored is None:
            return self._exported()
        self.settled_source = str(stored.path)
        return stored

    @property
    def unpublished(self) -> Stored | None:
        """The stored model if its family has no published formats; otherwise None.

        The tensors of a model of such a family do not show its architecture. A source without a
        stored model has the value None.
        """
        stored = self.stored
        return stored if stored and family_of(stored.architecture).published is None else None

    @cached_property
    def described(self) -> Described | None:
        """The model of a library that the config.json next to the weights describes.

        The value is None if there is no such file, or if the tensor names show the model.
        """
        if brings_model(self.source) or self.source.startswith(OPEN_CLIP):
            return None
        path = self._located.path
        if kind_of(path) != "folder" and path.suffix not in _FILES_OF_LIBRARIES:
            return None
        return self._configuration.model

    @cached_property
    def published(self) -> PublishedWeights:
        """The weights with tensor names translated to ours, and what they show of the model.

        Raises: WeightsError: if the weights have no published format.
        """
        name, part = self._name_and_part
        is_student = part in ("", "student") and not self.brought
        if is_student and (stored := self._read_stored(Path(name), self.where)):
            self.settled_source = str(stored.path)
            recipe = Stated(overrides(stored.architecture), stored.statistics, own=True)
            return in_our_names(
                stored.file, self.settled_source, stated=lambda *_: recipe, where=self.where
            )
        file, ignored = self._backbone()
        return in_our_names(
            file,
            self.settled_source,
            part=part,
            ignored=ignored,
            stated=self._configuration.stated,
            where=self.where,
        )

    @cached_property
    def tensors(self) -> Tensors:
        """The tensors by their names in the file or in the library's module.

        From a file with a student and a teacher, the student's tensors are taken unless the source
        names the teacher.
        """
        if self.brought:
            family, rest = self.brought
            assert family.scheme is not None
            return _Brought(family.scheme, rest, self.where)
        name, part = self._name_and_part
        file = self._file(part or "student")
        if file.other_part and not part:
            _tell_part(file, name, "student", self.where)
        return file

    @property
    def path(self) -> Path | None:
        """The path of the file, index or checkpoint; None if a library provides the weights."""
        if self.brought:
            return None
        if self.stored:
            return self.stored.file.path or self.stored.path
        return file_of(Path(self._name_and_part[0]), where=self.where)

    @property
    def folder(self) -> Path | None:
        """The folder of the file; None if a library provides the weights."""
        return self.path.parent if self.path else None

    def statistics_for(self, architecture: FamilyArchitecture) -> Statistics | None:
        """Returns the image statistics that the weights or their configuration state, or None.

        The weights are loaded into the model `architecture`.
        """
        if family_of(architecture).matched is None:
            return self.published.statistics
        return self.unpublished.statistics if self.unpublished else None

    def fitted(
        self,
        architecture: FamilyArchitecture,
        *,
        without: Collection[str] = (),
        allow: tuple[str, ...] = (),
        remedy: str = "",
    ) -> Fitted:
        """Returns the weights for a model of any family, after a check of names and shapes.

        The arguments are those of `PublishedWeights.fitted`; `without` and `remedy` are used only
        for families with published formats.

        Raises: WeightsError: if the tensors do not cover the model.
        """
        matched = family_of(architecture).matched
        if matched is None:
            return self.published.fitted(
                architecture, without=without, allow=allow, where=self.where, remedy=remedy
            )
        stored = self.unpublished
        file = stored.file if stored else self.tensors
        try:
            matching = matched(architecture, {name: file.shape(name) for name in file}, self.where)
        except WeightsError as error:
            if stored is None or stored.architecture == architecture:
                raise
            raise other_model(self.source, stored.architecture, architecture, self.where) from error
        return Fitted(
            matching.pieces,
            file,
            matching.shapes,
            allow=allow,
            label=f"{self.source} ({matching.what})",
            where=self.where,
            notes=matching.notes,
            remedy=remedy_for(stored.architecture) if stored else matching.remedy,
            resize=False,
        )

    def fetch(self) -> None:
        """Downloads the weights into the library's cache, if a library provides them.

        All ranks must call this method, in a meeting of ranks (`ranks.meeting`): one rank downloads
        for all ranks that share its cache.

        Raises: WeightsError: if the weights cannot be downloaded.
        """
        if self.brought and self.brought[0].scheme.fetch:
            self.brought[0].scheme.fetch(self.brought[1], self.where)

    @cached_property
    def _located(self) -> Located:
        return locate(self.source, where=self.where)

    @cached_property
    def _name_and_part(self) -> tuple[str, str]:
        return split_part(self._located.path, where=self.where)

    @cached_property
    def _configuration(self) -> Configuration:
        path = Path(self._name_and_part[0])
        folder = path if kind_of(path) == "folder" else path.parent
        return Configuration(self._located, folder, self.where)

    def _backbone(self) -> tuple[Tensors, list[str]]:
        """Returns the tensors of one backbone, and the names of the file's other tensors.

        If the file has a student and a teacher, and the source does not name one of them, the
        choice is logged. The student is taken from EsViT's files, for a source that is not a path,
        and if an earlier launch of the command determined the model. In all other cases the teacher
        is taken.
        """
        if self._located.tensors is not None:
            return self._located.tensors, []
        (name, part), where = self._name_and_part, self.where
        # Settled recipes name the part; those of earlier versions do not, and mean the student.
        is_open = self.source == name and not self._was_settled
        file = self._file(part or ("" if is_open else "student"))
        # Feature-Distillation learns from EsViT's student; DINO's and iBOT's own code evaluates
        # the teacher.
        unnamed = file.other_part == "student" and not part
        if unnamed and detect(file, where=where, wrapping=file.wrapping) == "esvit":
            file = self._file("student")
        if file.other_part and not part:
            taken = OTHER[file.other_part]
            if is_open:
                self.settled_source = f"{self.source}#{taken}"
            _tell_part(file, name, taken, where)
        file, others = part_of(file, part, name, where)
        file, heads = backbone_of(file)
        return file, [*others, *heads]

    def _file(self, part: str) -> Tensors:
        """Returns the tensors of one part of the file (`read.read`)."""
        if part not in self._files:
            name, _ = self._name_and_part
            self._files[part] = read(name, where=self.where, part=part)
        return self._files[part]

    def _exported(self) -> Stored | None:
        """Returns the model of an exported folder whose config.json describes a model, or None."""
        is_folder = kind_of(self._located.path) == "folder"
        stated = self._configuration.own if is_folder else None
        if stated is None or not stated.architecture.family:
            return None
        architecture = whole(set_fields(stated.architecture))
        doors.warn_if_changed(architecture.code, stated.code_hash, model=self.source)
        statistics, file = stated.statistics or statistics_of("", architecture), self._file("")
        sizes = {name: math.prod(file.shape(name)) for name in file}
        return Stored(Path(self.source), file, architecture, statistics, sizes)


class _Brought(Tensors):
    """Tensors of a library's module, which loads its weights when a tensor is first read."""

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
    """Logs that of the two models in the file `name` the one called `taken` is used."""
    log.info(
        "%s: %s holds a student and a teacher: the %s is used; for the other, name %s#%s",
        where,
        name,
        taken,
        name,
        file.other_part,
    )


def other_model(
    source: str, stored: FamilyArchitecture, requested: FamilyArchitecture, where: str
) -> WeightsError:
    """Returns the error for a `source` whose model is `stored` instead of `requested`."""
    return WeightsError(
        f"{where}: {source}: another model; got {name_of(stored)}, expected "
        f"{name_of(requested)}. {remedy_for(stored)}"
    )


def remedy_for(architecture: FamilyArchitecture) -> str:
    """Returns the remedy for an error message: to set `--student.model` to the weights' model."""
    return f"Set --student.model {name_of(architecture)}, the model of these weights."
