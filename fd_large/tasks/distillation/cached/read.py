"""Reads the records of a cache, verifies their checksums, and replaces teachers by cached maps.

A record holds a map, and a thumbnail of the view from which the teacher computed the map. A run
compares the thumbnail with its own view. Thus an image that was replaced under its old name, or a
view that is cropped differently, is found before the student learns from the map.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor

from fd_large.backbones.feature_map import FeatureMap
from fd_large.errors import CacheError, ConfigError, DataError
from fd_large.files import retried
from fd_large.recipes.fields import from_plain
from fd_large.recipes.sections import AUTO
from fd_large.tasks.distillation.cached.files import (
    HEADER,
    PRECISIONS,
    UNUSABLE,
    Header,
    Record,
    ShardFile,
    ShardFiles,
    Stored,
    check_of,
    damaged,
    decode,
    differences,
)
from fd_large.tasks.distillation.cached.views import thumbnail
from fd_large.tasks.distillation.section import NamedTeacher, Teacher, cached_folder
from fd_large.tasks.distillation.task import Maps

# Grey levels: other processors may resize a view to pixels that differ by one.
TOLERANCE = 2


class CacheReader(ShardFiles):
    """Reader of a cache's records, which verifies their checksums and can be pickled.

    Args:
        folder: Folder of the cache.
        header: Header of the cache.
    """

    def check_whole(self, *, where: str) -> None:
        """Checks that all shards exist and have the sizes that the header gives.

        Args:
            where: The recipe's field that names the cache, for messages.

        Raises: CacheError: if a shard is missing or has a wrong size.
        """
        sizes = {
            entry.name: entry.stat().st_size
            for entry in retried(lambda: list(os.scandir(self.folder)), self.folder)
        }
        layouts = [self.header.layout(*shard) for shard in self.header.shards()]
        missing = [layout.name for layout in layouts if layout.name not in sizes]
        if missing:
            raise CacheError(
                f"{where}: {self.folder}: not finished; got {len(layouts) - len(missing)} of "
                f"{len(layouts)} shards ({missing[0]} is missing), expected all shards. Repeat "
                "the command that wrote the cache: it continues where it stopped."
            )
        for layout in layouts:
            if sizes[layout.name] != layout.size:
                path = self.folder / layout.name
                raise damaged(path, f"{sizes[layout.name]:,} bytes", f"{layout.size:,}")

    def read(self, name: str, record: int) -> Record | None:
        """Returns a record; None if the record's image was not usable when the cache was written.

        Args:
            name: Name of the set.
            record: Number of the record in the set.

        Raises: CacheError: if the file is damaged; the message names the file and the record.
        """
        file, row = self._place(name, record)
        rows = self._empty(1)
        try:
            for tensor, array in rows.items():
                file.fill(array, tensor, row)
            check = np.empty(1, np.int64)
            file.fill(check, "checks", row)
        except OSError as error:
            raise damaged(file.path, f"{error}", "a whole file", record) from error
        expected = check_of(name, record, rows, int(check[0]) >> 32)
        if check[0] != expected or not expected >> 32:
            got = f"bytes of checksum {expected & 0xFFFFFFFF:08x}"
            raise damaged(file.path, got, f"{int(check[0]) & 0xFFFFFFFF:08x}", record)
        if expected >> 32 == UNUSABLE:
            return None
        tensors = {}
        for tensor, (dtype, shape) in self.header.rows(1).items():
            if tensor != "checks":
                flat = torch.from_numpy(rows[tensor][0])
                # An empty tensor cannot be viewed as another type.
                flat = flat.view(dtype) if len(flat) else flat.to(dtype)
                tensors[tensor] = flat.view(shape[1:])
        return Record(Stored(tensors["values"], tensors["scales"]), tensors["thumbnails"])

    def _opened(self, name: str, number: int) -> ShardFile:
        layout = self.header.layout(name, number)
        path = self.folder / layout.name
        try:
            file = ShardFile(path, layout, os.O_RDONLY)
        except OSError as error:
            raise damaged(path, f"{error}", "a file that can be read") from error
        header = retried(lambda: os.pread(file.descriptor, len(layout.header), 0), path)
        size = os.fstat(file.descriptor).st_size
        if header != layout.header or size != layout.size:
            file.close()
            got = f"{size:,} bytes" if header == layout.header else "a header of other bytes"
            raise damaged(path, got, f"{layout.size:,} bytes and the header that {HEADER} gives")
        return file


@dataclass(frozen=True)
class StoredMaps:
    """Reads the stored maps of each view, which become the targets of a batch.

    The class implements the loader's interface `Beside`.

    Attributes:
        readers: Readers of the caches, by the teacher's name.
        name: Name of the set of views.
        name_of: Returns the name of an image from its index.
    """

    readers: Mapping[str, CacheReader]
    name: str
    name_of: Callable[[int], str]

    def of(self, index: int, view: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
        """Returns the stored maps of an image's view, by the teacher's name.

        Each map is a pair (values, scales), which `CachedTeacher.of_stored` decodes. values are
        (N, K) uint8, where K is the number of bytes of a token's C stored values; scales are (N, 2)
        float32, or (N, 0) for maps stored as fp32.

        Args:
            index: Index of the image.
            view: (3, S, S) uint8, the run's view, which must agree with the stored thumbnail.

        Raises:
            DataError: if the image could not be used when the cache was written.
            CacheError: if the cache is damaged, or holds the map of another view.
        """
        maps = {}
        for name, reader in self.readers.items():
            record = reader.read(self.name, index)
            if record is None:
                raise DataError(
                    f"{self.name_of(index)}: no map in {reader.folder}; got an image that could "
                    "not be used when the cache was written, expected a usable image. Write the "
                    "cache again."
                )
            off = (record.thumbnail.int() - thumbnail(view).int()).abs().max().item()
            if off > TOLERANCE:
                error = CacheError(
                    f"{reader.folder}: a map of another view; {self.name_of(index)}, {self.name}, "
                    f"differs by {off} grey levels from the teacher's view, expected at most "
                    f"{TOLERANCE}. The image has changed since the cache was written: restore it, "
                    "or write the cache again."
                )
                error.rank_local = True
                raise error
            maps[name] = (record.map.values.view(torch.uint8), record.map.scales)
        return maps

    def blank(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Returns zeros with the shapes of the result of `of`, for an image that cannot be used."""
        return {name: blank(reader) for name, reader in self.readers.items()}


def blank(reader: CacheReader) -> tuple[Tensor, Tensor]:
    """Returns zeros with the shapes of a stored map, a pair (values, scales) as in `StoredMaps.of`.

    Args:
        reader: Reader of the cache, whose header gives the shapes.
    """
    (dtype, values), (_, scales) = (reader.header.rows(1)[name] for name in ("values", "scales"))
    bytes_of_values = (values[1], values[2] * dtype.itemsize)
    return torch.zeros(bytes_of_values, dtype=torch.uint8), torch.zeros(scales[1:])


class CachedTeacher:
    """A teacher whose maps are read from a cache.

    Args:
        reader: Reader of the cache.
        where: The recipe's field that names the cache, for messages.

    Attributes:
        reader: Reader of the cache.
        width: Number of channels of the map.
        fingerprint: Hash of the weights of the teacher that made the maps.
    """

    def __init__(self, reader: CacheReader, *, where: str) -> None:
        self.reader, self._where = reader, where
        self.width = reader.header.width
        self.fingerprint: str = reader.header.facts["teacher_hash"]

    def grid(self, image_size: int) -> tuple[int, int]:
        """Returns the rows and columns of the stored maps, for any side of the student's images.

        Args:
            image_size: Not used.
        """
        return self.reader.header.grid

    def of_stored(self, images: Tensor, stored: Sequence[Tensor]) -> FeatureMap:
        """Returns the decoded map of a batch.

        Args:
            images: (B, 3, S, S) uint8, not used here.
            stored: The pair (values, scales) from the loader. values are (B, N, K) uint8, where K
                is the number of bytes of a token's C stored values; scales are (B, N, 2) float32,
                or (B, N, 0) for maps stored as fp32.
        """
        header, (values, scales) = self.reader.header, stored
        encoded = Stored(values.view(PRECISIONS[header.precision]), scales)
        tokens = decode(encoded, getattr(torch, header.dtype))
        return FeatureMap(tokens, header.grid, header.prefix_tokens)

    def __call__(self, images: Tensor) -> NoReturn:
        """Raises ConfigError in all cases, since there is no model to run on images."""
        raise ConfigError(
            f"{self._where}: cached targets cover training views only; got {len(images)} other "
            "images, expected none. Name the teacher itself, whose maps were stored: "
            f"{self.reader.header.teacher['source']}."
        )


class FromStored:
    """Wraps `Distillation.teachers`, and takes maps from a cache or stores maps in it.

    The loader adds to a batch stored maps, or the numbers of records in which to store maps. A
    `CachedTeacher` decodes stored maps. A `Recorder` decodes stored maps too; given the numbers of
    records, it computes the maps from the images and stores them.

    Args:
        teachers: The wrapped object.
    """

    def __init__(self, teachers: Any) -> None:
        self._teachers, self.by_name = teachers, teachers.by_name

    def __call__(self, images: Tensor, given_maps: Maps, training: bool) -> Maps:
        """Returns `given_maps`, in which stored maps and numbers of records have become maps.

        Args:
            images: (B, 3, H, W) uint8.
            given_maps: What the loader added: by the teacher's name a stored map or the numbers of
                records, and other targets of the batch. A FeatureMap is returned unchanged.
            training: Whether the task is in training mode.
        """
        maps = {
            name: teacher.of_stored(images, given_maps[name])
            for name, teacher in self.by_name.items()
            if name in given_maps and not isinstance(given_maps[name], FeatureMap)
        }
        return self._teachers(images, {**given_maps, **maps}, training)


def settled(entry: NamedTeacher, *, where: str) -> NamedTeacher:
    """Returns the entry of a teacher whose maps are cached, completed from the cache.

    The fields model, architecture, statistics, residual_dtype, layer and teacher_image_size get the
    values with which the maps in the cache were made.

    Args:
        entry: The teacher's entry, whose source is a cache.
        where: The flag of the source, for messages.

    Raises:
        CacheError: if there is no cache, or if the entry sets one of the six fields to another
            value than the cache has.
    """
    header = Header.read(Path(cached_folder(entry.source)), where=where)
    made_by = from_plain(Teacher, dict(header.teacher), "teacher.")
    stored = {
        "model": made_by.model,
        "architecture": made_by.architecture,
        "statistics": made_by.statistics,
        "residual_dtype": made_by.residual_dtype,
        **{name: header.facts[name] for name in ("layer", "teacher_image_size")},
    }
    usual = NamedTeacher()
    # Fields that the recipe leaves to the weights or to the teacher's grid come from the cache.
    free = {name: (getattr(usual, name), AUTO) for name in stored if name != "layer"}
    free["layer"] = ()
    recipe_values = {
        name: getattr(entry, name) for name in stored if getattr(entry, name) not in free[name]
    }
    if other := differences({name: stored[name] for name in recipe_values}, recipe_values):
        raise CacheError(
            f"{where}: maps of another kind than the recipe's; got {other}, expected the same. "
            "Leave these fields out, or write a cache for them."
        )
    return replace(entry, **stored)


def require_same_views(header: Header, views: Mapping[str, Any], *, where: str) -> None:
    """Checks that a cache holds the maps of a run's views.

    Args:
        header: Header of the cache.
        views: The facts on the run's views, by name.
        where: The recipe's field that names the cache, for messages.

    Raises: CacheError: if facts differ; the message names the differences.
    """
    stored = {name: header.facts[name] for name in views}
    if other := differences(stored, views):
        raise CacheError(
            f"{where}: cached targets of other views than this run's; got {other}, expected the "
            "same. Set these fields to the values in the cache, or write a cache for this run: "
            "fd-large cache."
        )
