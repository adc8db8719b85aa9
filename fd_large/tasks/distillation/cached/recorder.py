"""Stores a teacher's maps while a run learns from them, and then learns from what is stored.

In the first epochs each rank writes the maps of its own micro-batches. What these epochs leave out
(the images that a whole number of batches does not take, and what was written after the checkpoint
from which a run went on) is written before a view comes for the second time.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fd_large.backbones.feature_map import FeatureMap
from fd_large.data.loader import Beside
from fd_large.ranks import distributed
from fd_large.tasks.distillation.cached.files import Record, Stored, encode, num_scales
from fd_large.tasks.distillation.cached.read import CachedTeacher, CacheReader, StoredMaps
from fd_large.tasks.distillation.cached.views import ViewsToStore, set_of, thumbnail
from fd_large.tasks.distillation.cached.write import CacheWriter, header_of, prepared, write_cache
from fd_large.tasks.distillation.section import NamedTeacher
from fd_large.tasks.distillation.teacher import PlacedTeacher

log = logging.getLogger(__name__)


class ToRecord:
    """What goes beside a view whose map is to be stored: a `Beside` of the loader.

    Args:
        names: The teachers.
        view: Number of the view.
    """

    def __init__(self, names: tuple[str, ...], view: int) -> None:
        self._names, self._view = names, view

    def of(self, index: int, view: Tensor) -> dict[str, dict[str, Tensor]]:
        """Returns the place of the record, by the teacher's name."""
        place = {
            "view": torch.tensor(self._view),
            "record": torch.tensor(index),
            "thumbnail": thumbnail(view),
        }
        return dict.fromkeys(self._names, place)

    def blank(self) -> dict[str, dict[str, Tensor]]:
        """Returns a place that is none: nothing is stored of it."""
        return self.of(-1, torch.zeros(3, 1, 1, dtype=torch.uint8))


class Recorder:
    """A teacher whose maps of training views are stored, and then read instead.

    Args:
        teacher: The teacher.
        where: The field that names the folder, for messages.

    Attributes:
        module, width: The teacher's.
        writer: Where its maps go; None until `begin`.
    """

    def __init__(self, teacher: PlacedTeacher, *, where: str) -> None:
        self._teacher, self._where = teacher, where
        self.module, self.width = teacher.module, teacher.width
        self.writer: CacheWriter | None = None

    def begin(self, writer: CacheWriter) -> CacheReader:
        """Makes the folder ready; a collective.

        Returns: what reads the maps from there.
        Raises: CacheError: if the folder holds something else, or its disk is too small.
        """
        prepared(writer, where=self._where)
        self.writer, reader = writer, CacheReader(writer.folder, writer.header)
        self._stored = CachedTeacher(reader, where=self._where)
        return reader

    def __call__(self, images: Tensor) -> FeatureMap:
        """Returns the map of any images, of which nothing is stored."""
        return self._teacher(images)

    def of_stored(self, images: Tensor, stored: Any) -> FeatureMap:
        """Returns the map of a batch: the stored one, or the teacher's, which is then stored.

        Args:
            images: (B, 3, S, S) uint8.
            stored: What `StoredMaps` or `ToRecord` put beside them.
        """
        if not isinstance(stored, Mapping):
            return self._stored.of_stored(images, stored)
        assert self.writer is not None
        given = self._teacher(images)
        kept = encode(given.tokens, self.writer.header.precision)
        values, scales, thumbnails = kept.values.cpu(), kept.scales.cpu(), stored["thumbnail"].cpu()
        places = zip(stored["view"].tolist(), stored["record"].tolist(), strict=True)
        for row, (view, record) in enumerate(places):
            if record >= 0:
                content = Record(Stored(values[row], scales[row]), thumbnails[row])
                self.writer.write(set_of(view), record, content)
        return given

    def is_whole(self, view: int) -> bool:
        """Returns whether all maps of a view are stored, the same on every rank."""
        assert self.writer is not None
        return distributed.broadcast_object(not self.writer.unfinished(set_of(view)))

    def complete(self, view: int, views: ViewsToStore, **options: Any) -> None:
        """Writes what is missing of a view; a collective.

        Args:
            view: Number of the view.
            views: Loads the views.
            options: Others of `write_cache`.
        """
        assert self.writer is not None
        self.writer.close()
        distributed.barrier()  # What other ranks wrote is there.
        write_cache(
            self.writer, self._teacher, views, only=set_of(view), where=self._where, **options
        )
        distributed.barrier()


class Recorders:
    """The recorders of all teachers of a run.

    Args:
        teachers: The teachers by name.
        entries: What the settled recipe says of each.
        folder: Where the maps go; those of several teachers into a folder of each one's name.
        precision: How they are stored.

    Attributes:
        by_name: The recorder of each teacher.
        early: Epochs, counted from 1, that learn from maps that were stored before they began,
            though a run that fills the cache learns them from its teacher.
    """

    def __init__(
        self,
        teachers: Mapping[str, PlacedTeacher],
        entries: Mapping[str, NamedTeacher],
        *,
        folder: str,
        precision: str,
    ) -> None:
        self._teachers, self._entries = teachers, entries
        self._folder, self._precision = folder, precision
        self.by_name = {
            name: Recorder(one, where="task.distillation.cache") for name, one in teachers.items()
        }
        self._readers: Mapping[str, CacheReader] = {}
        self.early: list[int] = []

    def beside(
        self,
        epoch: int,
        facts: Mapping[str, Any],
        views: ViewsToStore,
        *,
        name_of: Callable[[int], str],
        **options: Any,
    ) -> Beside:
        """Returns what stores the maps of an epoch's view, or reads them once they are all there.

        A collective.

        Args:
            epoch: Number of the epoch.
            facts: The `view_facts` of the run.
            views: Loads the views.
            name_of: Returns the name of the image of a record.
            options: Others of `write_cache`.
        """
        if not self._readers:
            self._readers = {
                name: recorder.begin(self._writer(name, facts))
                for name, recorder in self.by_name.items()
            }
        count = facts["task.distillation.views"]
        view = epoch % count
        missing = [name for name, one in self.by_name.items() if not one.is_whole(view)]
        if epoch < count and missing:
            return ToRecord(tuple(missing), view)
        if epoch < count and epoch + 1 not in self.early:
            self.early.append(epoch + 1)
            self._tell(epoch + 1)
        for recorder in self.by_name.values():
            recorder.complete(view, views, **options)
        return StoredMaps(self._readers, set_of(view), name_of)

    def _tell(self, epoch: int) -> None:
        """Says that an epoch learns from maps that another run, or an earlier start, has stored."""
        exact = not num_scales(self._precision)
        log.log(
            logging.INFO if exact else logging.WARNING,
            "task.distillation.cache: epoch %d learns from the maps in %s, which were all there "
            "before; the run that stored them had its teacher in this epoch, %s",
            epoch,
            self._folder,
            "and its maps were the same"
            if exact
            else f"and its losses differ from these by the rounding of {self._precision}",
        )

    def _writer(self, name: str, facts: Mapping[str, Any]) -> CacheWriter:
        teacher, entry = self._teachers[name], self._entries[name]
        header = header_of(teacher, entry, facts, precision=self._precision)
        return CacheWriter(Path(self._folder, name), header)
