"""A start's weights: each source is located and opened once, in the names of one of our models.

What a path means beside files (the folder of a run) is read by whoever a `Sources` was given.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from pathlib import Path

from torch import Tensor

from fd_large.backbones.family import Scheme
from fd_large.backbones.registry import family_of, family_of_source
from fd_large.backbones.statistics import Statistics
from fd_large.errors import WeightsError
from fd_large.recipes.architectures import brings_model
from fd_large.recipes.family import FamilyArchitecture
from fd_large.weights.coverage import Fitted
from fd_large.weights.formats import detect
from fd_large.weights.locate import OPEN_CLIP, locate
from fd_large.weights.opened import Weights, in_our_names
from fd_large.weights.parts import backbone_of, part_of, tell_part
from fd_large.weights.read import OTHER, Tensors, read, split_part
from fd_large.weights.sidecar import Described, read_library
from fd_large.weights.stored_models import Stored, StoredReader, exported, other_model, remedy_for

_LONGEST_NAME = 255  # File systems take no longer one.


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
            remedy=remedy_for(own.architecture) if own else found.remedy,
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
                found = self._stored(path, where) or exported(path, where)
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
                tell_part(file, name, taken, where)
            file, ignored = part_of(file, part, name, where)
            file, heads = backbone_of(file)
            ignored += heads
        return in_our_names(
            file,
            source,
            part=part,
            ignored=ignored,
            located=located,
            stored=stored,
            where=where,
        )


def _foreign(source: str, where: str) -> Tensors:
    """The tensors of a source whose names are of no format."""
    brought = family_of_source(source)
    if brought is None:
        name, part = split_part(locate(source, where=where).path, where=where)
        file = read(name, where=where, part=part or "student")
        if file.other_part and not part:
            tell_part(file, name, "student", where)
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
