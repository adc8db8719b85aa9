"""Stores a teacher's maps during the first epochs of a run, and reads them afterwards.

In the first epoch with a view, each rank writes the maps of its own micro-batches. Some maps may
then be missing (of images beyond the last full batch) or incomplete (after a crash). These maps are
written before the next epoch with the same view.
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
    """Adds to a batch the numbers of the records in which to store the maps of its images.

    The class implements the loader's interface `Beside`.

    Args:
        names: Names of the teachers whose maps are stored.
        view: Number of the view.
    """

    def __init__(self, names: tuple[str, ...], view: int) -> None:
        self._names, self._view = names, view

    def of(self, index: int, view: Tensor) -> dict[str, dict[str, Tensor]]:
        """Returns where to store the maps of an image, by the teacher's name.

        Each value has the tensors "view" and "record", the numbers of the view and of the record,
        and "thumbnail", (64,) uint8.

        Args:
            index: Index of the image, which is also the number of its record.
            view: (3, S, S) uint8, the view.
        """
        place = {
            "view": torch.tensor(self._view),
            "record": torch.tensor(index),
            "thumbnail": thumbnail(view),
        }
        return dict.fromkeys(self._names, place)

    def blank(self) -> dict[str, dict[str, Tensor]]:
        """Returns the result of `of` for an image that cannot be used; "record" is -1."""
        return self.of(-1, torch.zeros(3, 1, 1, dtype=torch.uint8))


class Recorder:
    """A teacher that stores its maps of training views, and later reads them instead of running.

    Args:
        teacher: The teacher.
        where: The recipe's field that names the folder, for messages.

    Attributes:
        module, width: The teacher's model, and the number of channels of the teacher's map.
        writer: Writer of the maps; None before `begin` is called.
    """

    def __init__(self, teacher: PlacedTeacher, *, where: str) -> None:
        self._teacher, self._where = teacher, where
        self.module, self.width = teacher.module, teacher.width
        self.writer: CacheWriter | None = None

    def begin(
        self, folder: Path, entry: NamedTeacher, facts: Mapping[str, Any], *, precision: str
    ) -> CacheReader:
        """Prepares a folder for the maps; all ranks must call this method.

        Args:
            folder: The folder.
            entry: The teacher's entry in the recipe.
            facts: The `view_facts` of the run.
            precision: Precision of the stored maps.

        Returns: the reader of the folder's maps.
        Raises:
            CacheError: if the folder holds maps of other settings, if it cannot be written, or if
                its disk is too small.
        """
        header = header_of(self._teacher, entry, facts, precision=precision)
        self.writer, reader = CacheWriter(folder, header), CacheReader(folder, header)
        prepared(self.writer, where=self._where)
        self._stored = CachedTeacher(reader, where=self._where)
        return reader

    def __call__(self, images: Tensor) -> FeatureMap:
        """Returns the teacher's map of `images`, (B, 3, H, W) uint8, without storing the map."""
        return self._teacher(images)

    def of_stored(self, images: Tensor, stored: Any) -> FeatureMap:
        """Returns the map of a batch, which is decoded, or computed and then stored.

        Args:
            images: (B, 3, S, S) uint8.
            stored: What the loader added for this teacher: a stored map (`StoredMaps`), or the
                records in which to store the map (`ToRecord`).
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
        """Returns whether all maps of view number `view` are stored, the same on all ranks.

        All ranks must call this method.
        """
        assert self.writer is not None
        return distributed.broadcast_object(not self.writer.unfinished(set_of(view)))

    def complete(self, view: int, views: ViewsToStore, **options: Any) -> None:
        """Writes the missing maps of a view; all ranks must call this method.

        Args:
            view: Number of the view.
            views: Loader of the views.
            options: Further arguments of `write_cache`.
        """
        assert self.writer is not None
        self.writer.close()
        distributed.barrier()  # What other ranks wrote is there.
        write_cache(
            self.writer, self._teacher, views, only=set_of(view), where=self._where, **options
        )
        distributed.barrier()
