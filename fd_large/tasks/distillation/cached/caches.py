"""The caches of a run: those of training views, each in a teacher's place, and of held-out views.

CACHE/held_out is a cache like that of the training views, with two sets. So it can be written
later, and what a run is evaluated on says nothing about the maps that it learns from.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from torch import Tensor

from fd_large.data.source import ImageSource
from fd_large.data.views import ViewSettings
from fd_large.errors import CacheError
from fd_large.files import kind_of
from fd_large.ranks import meeting
from fd_large.recipes.fields import require
from fd_large.tasks.distillation.cached.files import HEADER, Header
from fd_large.tasks.distillation.cached.read import (
    CachedTeacher,
    CacheReader,
    StoredMaps,
    blank,
    require_same_views,
)
from fd_large.tasks.distillation.cached.views import ViewsToStore, set_of
from fd_large.tasks.distillation.cached.write import TEACHER_FACTS, CacheWriter, header_of
from fd_large.tasks.distillation.held_out import Crops
from fd_large.tasks.distillation.section import CACHED, NamedTeacher, cached_folder, source_flag
from fd_large.tasks.distillation.teacher import PlacedTeacher

# Folder, in a cache, of the maps of held-out views.
FOLDER = "held_out"


class RunCaches:
    """The caches that the teachers' sources name; none is opened before it is asked for.

    Args:
        entries: What the recipe says of each teacher, by its name.

    Attributes:
        folders: The folder of each cache, by the teacher's name.
        held_out: What reads the maps of held-out views, once `open_held_out` has run.
    """

    def __init__(self, entries: Mapping[str, NamedTeacher]) -> None:
        named = {name: cached_folder(entry.source) for name, entry in entries.items()}
        self.folders = {name: Path(folder) for name, folder in named.items() if folder}
        self.held_out: Mapping[str, CacheReader] = {}

    def __contains__(self, name: str) -> bool:
        return name in self.folders

    def __bool__(self) -> bool:
        return bool(self.folders)

    @cached_property
    def readers(self) -> Mapping[str, CacheReader]:
        """What reads the maps of training views, by the teacher's name.

        Raises: CacheError: if a header is missing or damaged.
        """
        return {
            name: CacheReader(folder, Header.read(folder, where=source_flag(name)))
            for name, folder in self.folders.items()
        }

    def teachers(self) -> dict[str, CachedTeacher]:
        """Returns what stands in the teachers' places."""
        return {n: CachedTeacher(one, where=source_flag(n)) for n, one in self.readers.items()}

    def sources(self) -> dict[str, str]:
        """Returns the sources of the teachers that made the maps."""
        return {name: one.header.teacher["source"] for name, one in self.readers.items()}

    def view_fields(self) -> dict[str, Any]:
        """Returns the fields of `task.distillation` that say which views the caches hold."""
        for reader in self.readers.values():
            facts = reader.header.facts
            return {name: facts[f"task.distillation.{name}"] for name in ("views", "view_seed")}
        return {}

    def check(self, name: str, *, also_stored: str) -> None:
        """Refuses a cache that is not whole; all ranks call it.

        Args:
            name: The teacher's name.
            also_stored: The folder in which the run is to store maps; empty: it stores none.
        """
        where, folder = source_flag(name), self.folders[name]
        require(
            not also_stored,
            "task.distillation.cache: there is no teacher whose maps could be stored",
            f"{also_stored} beside {where} {CACHED}{folder}",
            "one of the two",
            "Leave one of them out",
        )
        meeting.once(f"cache {folder}", lambda: self.readers[name].check_whole(where=where))

    def require_views(self, facts: Mapping[str, Any]) -> None:
        """Refuses caches of other views than those of the run.

        Args:
            facts: The run's `view_facts`.
        """
        for name, reader in self.readers.items():
            require_same_views(reader.header, facts, where=source_flag(name))

    def open_held_out(self, crops: Mapping[str, Crops], settings: ViewSettings) -> None:
        """Opens the maps of the views that held-out losses are measured on.

        Args:
            crops: Cuts the views of each set.
            settings: How an image becomes a view.

        Raises: CacheError: if there are none, or they are of other views or another teacher.
        """
        facts = held_out_facts(crops, settings)
        self.held_out = {
            name: _held_out_reader(reader.folder, reader.header, facts)
            for name, reader in self.readers.items()
        }

    def beside(self, view: int, samples: ImageSource) -> StoredMaps:
        """Returns what loads the maps of a view number beside the views."""
        return StoredMaps(self.readers, set_of(view), samples.__getitem__)

    def blank_maps(self, size: int) -> dict[str, tuple[Tensor, ...]] | None:
        """Returns empty maps of so many images by the teacher's name; None without a cache."""
        if not self.folders:
            return None
        return {
            name: tuple(part.expand(size, *part.shape) for part in blank(reader))
            for name, reader in self.readers.items()
        }


def held_out_facts(crops: Mapping[str, Crops], settings: ViewSettings) -> dict[str, Any]:
    """Returns what decides the views, by the fields that say it.

    Args:
        crops: Cuts the views of each set.
        settings: How an image becomes a view.
    """
    first = next(iter(crops.values()))
    return {
        "data.image_size": settings.image_size,
        "data.min_crop_scale": settings.min_crop_scale,
        "interpolation": settings.interpolation,
        "eval.views": first.views,
        "seed of the views": first.seed,
        **{f"hash of the list of images of {n}": c.source.fingerprint for n, c in crops.items()},
    }


def held_out_writer(
    folder: Path,
    teacher: PlacedTeacher,
    entry: NamedTeacher,
    crops: Mapping[str, Crops],
    settings: ViewSettings,
    *,
    precision: str,
) -> CacheWriter:
    """Returns what writes the maps of a teacher; a collective.

    Args:
        folder: The cache of its training views.
        teacher, entry, precision: See `header_of`.
        crops, settings: See `held_out_facts`.
    """
    facts = held_out_facts(crops, settings)
    sets = {name: len(cut) for name, cut in crops.items()}
    header = header_of(teacher, entry, facts, precision=precision, sets=sets)
    return CacheWriter(folder / FOLDER, header)


def held_out_views(
    crops: Mapping[str, Crops], settings: ViewSettings, batch_size: int
) -> ViewsToStore:
    """Returns what loads the views on the way into a cache."""
    return ViewsToStore(partial(_cut, crops), settings.image_size, batch_size)


def _cut(crops: Mapping[str, Crops], name: str, view: int) -> Tensor:
    return crops[name](view)


def _held_out_reader(folder: Path, training: Header, facts: Mapping[str, Any]) -> CacheReader:
    """Returns what reads the maps of the views that a run is evaluated on.

    Args:
        folder: The cache of the training views.
        training: Its header.
        facts: The `held_out_facts` of the run.

    Raises: CacheError: if there are none, or they are of other views or another teacher.
    """
    own = folder / FOLDER
    if not kind_of(own / HEADER):
        raise CacheError(
            f"eval.root: {folder} has no maps of held-out images; got no {FOLDER}/{HEADER}, "
            "expected those of this eval.root. Give the command that wrote the cache once more, "
            "with --eval.root: it adds them. Or set --eval.root '' and go without."
        )
    header = Header.read(own, where="eval.root")
    of_teacher = {name: training.facts[name] for name in TEACHER_FACTS}
    require_same_views(header, {**of_teacher, **facts}, where="eval.root")
    reader = CacheReader(own, header)
    reader.check_whole(where="eval.root")
    return reader
