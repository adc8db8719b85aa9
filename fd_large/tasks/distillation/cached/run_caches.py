"""The caches that a run learns from: each stands in for a teacher."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor

from fd_large.data.source import ImageSource
from fd_large.data.views import ViewSettings
from fd_large.ranks import meeting
from fd_large.recipes.fields import require
from fd_large.tasks.distillation.cached import held_out as cached_held_out
from fd_large.tasks.distillation.cached.files import CacheReader, Header
from fd_large.tasks.distillation.cached.teacher import CachedTeacher, require_same_views
from fd_large.tasks.distillation.cached.views import StoredMaps, blank, set_of
from fd_large.tasks.distillation.held_out import Crops
from fd_large.tasks.distillation.section import CACHED, NamedTeacher, cached_folder, source_flag


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
        facts = cached_held_out.facts_of(crops, settings)
        self.held_out = {
            name: cached_held_out.reader_of(reader.folder, reader.header, facts)
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
