"""Writes a teacher's maps of the views of a dataset: ranks share the shards, any number of them.

A rank takes whole shards, and of these what is not written yet. Under a teacher in shards every
forward is a collective, so all ranks make as many as the one with most to do.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fd_large.backbones.feature_map import FeatureMap
from fd_large.data.bad_images import BadImages, limit_error, past_limit
from fd_large.data.loader import load_batches
from fd_large.errors import CacheError
from fd_large.ranks import activity, distributed
from fd_large.tasks.distillation.cached.files import CacheWriter, Record
from fd_large.tasks.distillation.cached.precision import Stored, encode
from fd_large.tasks.distillation.cached.views import Place, ViewsToStore


@dataclass
class _Shares:
    """A rank's places, `rounds` of them; those beyond its work are empty.

    Attributes:
        writer: Writes the records.
        batch_size: Records of a place.
        shards: (set, number) of this rank's shards, and the records that they still need.
        rounds: Places in all; set once all ranks have said theirs.
    """

    writer: CacheWriter
    batch_size: int
    shards: list[tuple[str, int, Sequence[int]]]
    rounds: int = field(init=False)

    def __post_init__(self) -> None:
        own = sum(-(-len(records) // self.batch_size) for *_, records in self.shards)
        self.rounds = int(distributed.max_rank(float(own)))

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
    """Writes what is missing; a collective.

    Args:
        writer: Writes the records; its folder is prepared by rank 0 here.
        teacher: Gives the map of images on the device.
        views: Loads the views.
        workers: Number of loading processes of each rank.
        max_bad_fraction: Fraction of images that may be unusable.
        where: The argument that names the folder, for messages.
        only: The set that is written; empty: all are.
        between: Called before each batch, on every rank alike; may raise to end it. What was
            written stays, and the next call goes on from there.

    Returns: the records that this start wrote, over all ranks.
    Raises: CacheError: if the folder holds something else, or the disk is too small; DataError: if
        too many images cannot be used.
    """
    unfinished = prepared(writer, where=where, only=only)
    own = unfinished[distributed.rank() :: distributed.world_size()]
    shares = _Shares(
        writer,
        views.batch_size,
        [(name, number, writer.unwritten(name, number)) for name, number in own],
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
    """Makes a folder ready; a collective.

    Args:
        writer, where, only: See `write_cache`.

    Returns: (set, number) of the shards that are not whole yet, the same on every rank.
    Raises: CacheError: if the folder holds something else, or its disk is too small.
    """

    def prepare() -> list[tuple[str, int]]:
        if not distributed.is_main():
            return []
        writer.prepare(where=where)
        needed, free = writer.bytes_left(), shutil.disk_usage(writer.folder).free
        if needed > free:
            raise CacheError(
                f"{where}: {writer.folder}: too little room; got {free / 1e9:,.1f} GB free, "
                f"expected {needed / 1e9:,.1f} GB. Make room, take fewer views, or store them in "
                "fewer bits."
            )
        return writer.unfinished(only)

    return distributed.broadcast_object(distributed.together(prepare))


def _finish(
    writer: CacheWriter, left: dict[tuple[str, int], int], bad: BadImages, max_bad_fraction: float
) -> None:
    """Finishes the shards of which no record is left.

    Raises: DataError: if too many of this rank's images could not be used: what was written of
        them would stay.
    """
    for shard in [shard for shard, count in left.items() if not count]:
        if past_limit(bad.count, max_bad_fraction):
            error = limit_error(bad.count, max_bad_fraction, bad.names)
            error.rank_local = True
            raise error
        writer.finish(*shard)
        del left[shard]
