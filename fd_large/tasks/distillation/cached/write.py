"""Writes a teacher's maps of a dataset's views to a cache, on any number of ranks.

Each shard is written by a single rank, which writes the records that are still missing. With a
sharded teacher every forward is a collective, so that all ranks run as many forwards as the rank
with most records.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fd_large.backbones.feature_map import FeatureMap
from fd_large.data.bad_images import BadImages, limit_error, past_limit
from fd_large.data.loader import load_batches
from fd_large.errors import CacheError
from fd_large.files import kind_of, write_json
from fd_large.ranks import activity, distributed
from fd_large.recipes.fields import plain
from fd_large.tasks.distillation.cached.files import (
    HEADER,
    MAP,
    UNUSABLE,
    Header,
    Layout,
    Record,
    ShardFile,
    ShardFiles,
    Stored,
    check_of,
    differences,
    encode,
    records_per_shard,
)
from fd_large.tasks.distillation.cached.views import Place, ViewsToStore, set_of
from fd_large.tasks.distillation.section import NamedTeacher
from fd_large.tasks.distillation.teacher import PlacedTeacher

TEACHER_FACTS = ("teacher_hash", "layer", "teacher_image_size", "statistics", "stored")
"""Names of the facts in a header that describe the teacher."""


def teacher_facts(teacher: PlacedTeacher, entry: NamedTeacher) -> dict[str, Any]:
    """Returns the facts on a teacher that decide its map of a given view, as {name: value}.

    The names are `TEACHER_FACTS`.

    Args:
        teacher: The teacher.
        entry: The teacher's entry in the recipe.
    """
    values = (
        teacher.fingerprint,
        entry.layer,
        entry.teacher_image_size,
        [list(part) for part in teacher.module.statistics],
        "the teacher's own map, before interpolation and normaliser",
    )
    return dict(zip(TEACHER_FACTS, values, strict=True))


def header_for(sample: FeatureMap, precision: str) -> Header:
    """Returns the header of a cache for maps of a given shape, with no facts and no sets yet.

    Args:
        sample: A map whose tokens are (1, N, C).
        precision: Precision of the stored maps.
    """
    header = Header(
        facts={},
        teacher={},
        precision=precision,
        tokens=sample.tokens.shape[1],
        width=sample.tokens.shape[2],
        grid=sample.grid,
        prefix_tokens=sample.num_prefix_tokens,
        dtype=str(sample.tokens.dtype).removeprefix("torch."),
        sets={},
        records_per_shard=1,
    )
    return replace(header, records_per_shard=records_per_shard(header.record_bytes))


def header_of(
    teacher: PlacedTeacher,
    entry: NamedTeacher,
    views: Mapping[str, Any],
    *,
    precision: str,
    sets: Mapping[str, int] | None = None,
) -> Header:
    """Returns the header of a cache of a teacher's maps; all ranks must call this function.

    Args:
        teacher: The teacher, which runs on a grey image to find the shape of its map.
        entry: The teacher's entry in the recipe.
        views: The facts on the views, by name.
        precision: Precision of the stored maps.
        sets: Number of records in each set, by name; None if `views` are the `view_facts` of
            training views, with a set for each view.
    """
    if sets is None:
        sets = {set_of(view): views["images"] for view in range(views["task.distillation.views"])}
    side = views["data.image_size"]
    grey = torch.full((1, 3, side, side), 128, dtype=torch.uint8, device=distributed.device())
    return replace(
        header_for(teacher(grey), precision),
        facts={**teacher_facts(teacher, entry), **views},
        teacher=plain(asdict(entry.parted()[0])),
        sets=sets,
    )


class CacheWriter(ShardFiles):
    """Writes the records of a cache, in any order and from any number of processes.

    A process must call `prepare` before any process writes.

    Args:
        folder: Folder of the cache.
        header: Header of the cache.
    """

    def prepare(self, *, where: str) -> None:
        """Makes the folder with its header, or checks the header of an existing folder.

        Args:
            where: The argument that names the folder, for messages.

        Raises: CacheError: if the folder holds maps of other settings, or cannot be written.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            if not kind_of(self.folder / HEADER):
                write_json(self.folder / HEADER, self.header.to_dict())
        except OSError as error:
            raise CacheError(
                f"{where}: cannot be used; got {error}, expected a folder that can be written. "
                "Choose another folder."
            ) from error
        stored = Header.read(self.folder, where=where)
        if stored.digest != self.header.digest:
            raise CacheError(
                f"{where}: {self.folder}: holds maps that another command wrote; got "
                f"{_other_maps(stored, self.header)}, expected this command's settings. "
                "Use the command that began the folder, or another folder."
            )

    def unfinished(self, only: str = "") -> list[tuple[str, int]]:
        """Returns (name of the set, number in the set) of each shard that is not complete.

        Args:
            only: Name of the set whose shards are returned; "" for all sets.
        """
        return [
            (name, number)
            for name, number in self.header.shards()
            if only in ("", name)
            and not kind_of(self.folder / self.header.layout(name, number).name)
        ]

    def bytes_left(self) -> int:
        """Returns how many bytes of the incomplete shards are not on disk yet."""
        left = 0
        for shard in self.unfinished():
            layout = self.header.layout(*shard)
            part = self._part(layout)
            written_bytes = part.stat().st_blocks * 512 if kind_of(part) else 0
            left += max(0, layout.size - written_bytes)
        return left

    def unwritten(self, name: str, number: int) -> Sequence[int]:
        """Returns the numbers of a shard's records that are missing or incomplete.

        Records whose image could not be used are included, so that the image is tried again.

        Args:
            name: Name of the set.
            number: Number of the shard in the set.
        """
        layout = self.header.layout(name, number)
        numbers = range(layout.first, layout.first + layout.count)
        if not kind_of(self._part(layout)):
            return numbers
        file = self._file(name, number)
        checks = np.empty(layout.count, np.int64)
        file.fill(checks, "checks", 0)
        rows, missing = self._empty(1), []
        for row, record in enumerate(numbers):
            is_map = checks[row] >> 32 == MAP
            if is_map:
                for tensor, array in rows.items():
                    file.fill(array, tensor, row)
            if not is_map or checks[row] != check_of(name, record, rows, MAP):
                missing.append(record)
        return missing

    def write(self, name: str, record: int, content: Record | None) -> None:
        """Writes a record.

        Args:
            name: Name of the set.
            record: Number of the record in the set.
            content: The map and thumbnail; None if the image cannot be used.

        Raises: CacheError: if the record cannot be written.
        """
        rows = self._empty(1)
        if content is None:
            state = UNUSABLE
            for array in rows.values():
                array.fill(0)
        else:
            state = MAP
            parts = (*content.map, content.thumbnail)
            for array, part in zip(rows.values(), parts, strict=True):
                array[0] = part.contiguous().view(-1).view(torch.uint8).numpy()
        try:
            file, row = self._place(name, record)
            for tensor, array in rows.items():
                file.put(array, tensor, row)
            # Last: a record counts once its check is there.
            check = np.array([check_of(name, record, rows, state)], np.int64)
            file.put(check, "checks", row)
        except OSError as error:
            raise _not_written(self.folder, error) from error

    def finish(self, name: str, number: int) -> None:
        """Flushes shard `number` of the set `name` to disk, and gives its file the final name.

        All records of the shard must have been written. Does nothing if another process has already
        finished the shard.

        Raises: CacheError: if the file cannot be written.
        """
        layout = self.header.layout(name, number)
        try:
            file = self._file(name, number)
            os.fsync(file.descriptor)
            self._open.pop((name, number)).close()
            self._part(layout).replace(self.folder / layout.name)
        except OSError as error:
            if kind_of(self.folder / layout.name):
                return  # Another process that writes the same cache was faster.
            raise _not_written(self.folder, error) from error

    def _part(self, layout: Layout) -> Path:
        """Returns the path, which ends in .part, of a shard's file before it is complete.

        Args:
            layout: Layout of the shard.
        """
        return self.folder / f"{layout.name}.part"

    def _opened(self, name: str, number: int) -> ShardFile:
        layout = self.header.layout(name, number)
        file = ShardFile(self._part(layout), layout, os.O_RDWR | os.O_CREAT)
        file.begin()
        return file


@dataclass
class _Shares:
    """The records of a rank's shards, divided into a `Place` for each forward.

    All ranks have the same number of places. The last places of a rank with fewer records are
    empty.

    Attributes:
        writer: Writer of the records.
        batch_size: Largest number of records of a place.
        shards: For each shard of this rank, its set, its number, and the missing records.
        rounds: Number of places of each rank.
    """

    writer: CacheWriter
    batch_size: int
    shards: list[tuple[str, int, Sequence[int]]]
    rounds: int = field(init=False)

    def __post_init__(self) -> None:
        num_places = sum(-(-len(records) // self.batch_size) for *_, records in self.shards)
        self.rounds = int(distributed.max_rank(float(num_places)))

    def __len__(self) -> int:
        return self.rounds

    def __iter__(self) -> Iterator[Place]:
        places = 0
        for name, _, records in self.shards:
            for start in range(0, len(records), self.batch_size):
                yield Place(name, records[start : start + self.batch_size])
                places += 1
        yield from [Place("", ())] * (self.rounds - places)


def write_cache(
    writer: CacheWriter,
    teacher: Callable[[Tensor], FeatureMap],
    views: ViewsToStore,
    *,
    workers: int,
    max_bad_fraction: float,
    where: str,
    only: str = "",
    between: Callable[[], None] = lambda: None,
) -> int:
    """Writes the maps that a cache lacks; all ranks must call this function.

    Args:
        writer: Writer of the cache, whose folder rank 0 prepares here.
        teacher: Returns the map of uint8 images on the device.
        views: Loader of the views.
        workers: Number of loading processes of each rank.
        max_bad_fraction: Fraction of images that may be unusable.
        where: The argument that names the folder, for messages.
        only: Name of the set to write; "" for all sets.
        between: Called before each batch on every rank; may raise to stop. Records that were
            written stay, and the next call writes the others.

    Returns: the number of records that this call wrote, over all ranks.
    Raises:
        CacheError: if the folder holds maps of other settings, if a file cannot be written, or if
            the disk is too small.
        DataError: if too many images cannot be used.
    """
    unfinished = prepared(writer, where=where, only=only)
    own_shards = unfinished[distributed.rank() :: distributed.world_size()]
    shares = _Shares(
        writer,
        views.batch_size,
        [(name, number, writer.unwritten(name, number)) for name, number in own_shards],
    )
    bad = BadImages()
    loaded = iter(load_batches(views, shares, workers=workers))
    written = 0
    left = {(name, number): len(records) for name, number, records in shares.shards}
    per_shard = writer.header.records_per_shard
    _finish(writer, left, bad, max_bad_fraction)
    for place in activity.counted(list(shares), "storing the teacher's maps", "batches"):
        between()
        batch = next(loaded)
        with torch.no_grad():
            stored = encode(
                teacher(batch.images.to(distributed.device())).tokens, writer.header.precision
            )
        values, scales = (part.cpu() for part in stored)
        for row, record in enumerate(place.records):
            content = Record(Stored(values[row], scales[row]), batch.thumbnails[row])
            writer.write(place.name, record, None if batch.bad[row] else content)
            left[place.name, record // per_shard] -= 1
        written += len(place.records)
        bad.add(len(place.records), [message for message in batch.bad if message])
        _finish(writer, left, bad, max_bad_fraction)
    writer.close()
    return int(distributed.sum_tensor(torch.tensor(written)).item())


def prepared(writer: CacheWriter, *, where: str, only: str = "") -> list[tuple[str, int]]:
    """Prepares the folder of a cache on rank 0; all ranks must call this function.

    Args:
        writer, where, only: See `write_cache`.

    Returns: (set, number) of each incomplete shard, the same on every rank.
    Raises:
        CacheError: if the folder holds maps of other settings, if it cannot be written, or if its
            disk is too small.
    """

    def prepare() -> list[tuple[str, int]]:
        writer.prepare(where=where)
        needed, free = writer.bytes_left(), shutil.disk_usage(writer.folder).free
        if needed > free:
            raise CacheError(
                f"{where}: {writer.folder}: too little room; got {free / 1e9:,.1f} GB free, "
                f"expected {needed / 1e9:,.1f} GB. Make room, take fewer views, or store the maps "
                "in fewer bits."
            )
        return writer.unfinished(only)

    return distributed.of_main(prepare)


def _finish(
    writer: CacheWriter, left: dict[tuple[str, int], int], bad: BadImages, max_bad_fraction: float
) -> None:
    """Finishes the shards that have no missing records, and removes them from `left`.

    Args:
        writer: Writer of the shards.
        left: Number of missing records of each of this rank's shards, by (set, number).
        bad: This rank's unusable images.
        max_bad_fraction: Fraction of images that may be unusable.

    Raises: DataError: if too many images cannot be used; their shards then stay unfinished.
    """
    for shard in [shard for shard, count in left.items() if not count]:
        if past_limit(bad.count, max_bad_fraction):
            error = limit_error(bad.count, max_bad_fraction, bad.names)
            error.rank_local = True
            raise error
        writer.finish(*shard)
        del left[shard]


def _other_maps(stored: Header, expected: Header) -> str:
    """Returns the differences between the headers `stored` and `expected` in words, for a message.

    The words name the facts that differ. If no facts differ, they name the fields of the section
    `teacher` that differ, and if no such fields differ, all fields of the header that differ.
    """
    words = {"teacher_hash": "hash of the teacher's weights", "stored": "kind of map"}
    facts, sections, all_ = [], [], []
    for header in (stored, expected):
        entry = {words.get(name, name): value for name, value in header.facts.items()}
        facts.append(entry | {"precision": header.precision, "type of the maps": header.dtype})
        sections.append({f"teacher.{name}": value for name, value in header.teacher.items()})
        all_.append(asdict(header))
    return differences(*facts) or differences(*sections) or differences(*all_)


def _not_written(folder: Path, error: OSError) -> CacheError:
    """Returns the error for a record or shard that this rank alone could not write.

    Args:
        folder: Folder of the cache.
        error: The error of the system call.
    """
    refused = CacheError(
        f"{folder}: cannot be written; got {error}, expected room for the cache. Written maps are "
        "kept: repeat the command when there is room."
    )
    refused.rank_local = True
    return refused
