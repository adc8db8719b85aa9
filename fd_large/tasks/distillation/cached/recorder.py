"""Stores a teacher's maps during the first epochs of a run, and reads them afterwards.

In the first epochs each rank writes the maps of its own micro-batches. Maps that are still missing
(of images beyond the last whole batch) or incomplete (after a crash) are written before a view
comes for the second time.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fd_large.backbones.feature_map import FeatureMap
from fd_large.ranks import distributed
from fd_large.tasks.distillation.cached.files import Record, Stored, encode
from fd_large.tasks.distillation.cached.read import CachedTeacher, CacheReader
from fd_large.tasks.distillation.cached.views import ViewsToStore, set_of, thumbnail
from fd_large.tasks.distillation.cached.write import CacheWriter, header_of, prepared, write_cache
from fd_large.tasks.distillation.section import NamedTeacher
from fd_large.tasks.distillation.teacher import PlacedTeacher


class ToRecord:
    """Adds to each view in a batch the place of its record in the cache; a `Beside` of the loader.

    Args:
        names: The teachers' names.
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
        """Returns a marker for a view that is not stored."""
        return self.of(-1, torch.zeros(3, 1, 1, dtype=torch.uint8))


class Recorder:
    """A teacher that stores its maps of training views, and later reads them instead of computing.

    Args:
        teacher: The teacher.
        where: The field that names the folder, for messages.

    Attributes:
        module, width: The teacher's model, and the channels of its map.
        writer: Writer of the maps; None until `begin`.
    """

    def __init__(self, teacher: PlacedTeacher, *, where: str) -> None:
        self._teacher, self._where = teacher, where
        self.module, self.width = teacher.module, teacher.width
        self.writer: CacheWriter | None = None

    def begin(
        self, folder: Path, entry: NamedTeacher, facts: Mapping[str, Any], *, precision: str
    ) -> CacheReader:
        """Prepares the folder; a collective.

        Args:
            folder: Folder for the maps.
            entry, facts, precision: See `header_of`.

        Returns: the reader of the folder's maps.
        Raises: CacheError: if the folder has other contents, or its disk is too small.
        """
        header = header_of(self._teacher, entry, facts, precision=precision)
        self.writer, reader = CacheWriter(folder, header), CacheReader(folder, header)
        prepared(self.writer, where=self._where)
        self._stored = CachedTeacher(reader, where=self._where)
        return reader

    def __call__(self, images: Tensor) -> FeatureMap:
        """Returns the teacher's map of any images, without storing it."""
        return self._teacher(images)

    def of_stored(self, images: Tensor, stored: Any) -> FeatureMap:
        """Returns the stored map of a batch, or computes and stores it.

        Args:
            images: (B, 3, S, S) uint8.
            stored: The entries that `StoredMaps` or `ToRecord` added to the images.
        """
        if not isinstance(stored, Mapping):
            return self._stored.of_stored(images, stored)
        assert self.writer is not None
        map_ = self._teacher(images)
        encoded = encode(map_.tokens, self.writer.header.precision)
        values, scales = (part.cpu() for part in encoded)
        thumbnails = stored["thumbnail"].cpu()
        places = zip(stored["view"].tolist(), stored["record"].tolist(), strict=True)
        for row, (view, record) in enumerate(places):
            if record >= 0:
                content = Record(Stored(values[row], scales[row]), thumbnails[row])
                self.writer.write(set_of(view), record, content)
        return map_

    def is_whole(self, view: int) -> bool:
        """Returns whether all maps of a view are stored, the same on every rank."""
        assert self.writer is not None
        return distributed.broadcast_object(not self.writer.unfinished(set_of(view)))

    def complete(self, view: int, views: ViewsToStore, **options: Any) -> None:
        """Writes the missing maps of a view; a collective.

        Args:
            view: Number of the view.
            views: Loads the views.
            options: Further arguments of `write_cache`.
        """
        assert self.writer is not None
        self.writer.close()
        distributed.barrier()  # What other ranks wrote is there.
        write_cache(
            self.writer, self._teacher, views, only=set_of(view), where=self._where, **options
        )
        distributed.barrier()
