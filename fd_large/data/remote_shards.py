"""Source of the images in tar shards at a URL, where each shard is a block that is fetched whole.

Images are in the order of the shards' names, and within a shard in the order of its members. A
truncated or damaged shard is used up to its damage. The first command that opens the shards fetches
every shard once to count its images, and keeps the counts in the cache.
"""

from __future__ import annotations

import hashlib
import logging
import shutil
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import suppress

import numpy as np
from numpy.typing import NDArray

from fd_large.data.blocks import BlockImages, BlockWriter, block_key, the_cache
from fd_large.data.listing import cache_folder
from fd_large.data.objects import RANGE_BYTES, Stored, fingerprint_of
from fd_large.data.tar_index import NO_LABEL, images_in
from fd_large.errors import DataError
from fd_large.files import json_object, write_json
from fd_large.ranks import activity, meeting

log = logging.getLogger(__name__)

# Number of shards that are fetched at a time while their images are counted.
STREAMS = 8


class RemoteShards(BlockImages):
    """`ImageSource` of the images in some tar shards at a URL.

    Attributes:
        torn: A message for each truncated or damaged shard.
    """

    def __init__(self, root: str, shards: Sequence[Stored], *, where: str) -> None:
        """Counts the images of the shards.

        Args:
            root: The URL that the user gave, for messages and for the name of the kept counts.
            shards: The shards found at this URL.
            where: Name of the configuration field that holds the URL, for messages.

        Raises:
            DataError: if a shard is compressed, or no shard has an image.
            StorageError: if the store does not answer.
        """
        counted = meeting.once(f"images of {root}", lambda: _counted(root, shards, where))
        sizes = np.array([num for num, _ in counted], np.int64)
        self.torn = tuple(torn for _, torn in counted if torn)
        for message in self.torn:
            log.warning("%s", message)
        if not sizes.any():
            raise DataError(
                f"{where}: no image in the tar shards; got {root!r}, expected names ending in "
                ".jpg, .png and the like. Name other shards."
            )
        counts = list(zip(shards, sizes.tolist(), strict=True))
        blocks = [(i, 0, images, shard.size) for i, (shard, images) in enumerate(counts) if images]
        super().__init__(
            shards,
            np.array(blocks, np.int64),
            fingerprint=fingerprint_of(shards, (f"{s.size}\0{s.stamp}\0{n}" for s, n in counts)),
            kind=f"{len(shards)} tar shards in an object store",
        )
        self._where = where

    def labels(self) -> tuple[NDArray[np.int64], None]:
        """Returns the label of each image, (len,) int64, and None, since classes have no names.

        Raises: DataError: if an image has no label.
        """
        return meeting.once(f"labels of {self.kind} {self.fingerprint}", self._read_labels), None

    def _read_labels(self) -> NDArray[np.int64]:
        labels_of_shards = []
        for number in range(len(self.blocks.ends)):
            labels = self._open(number).labels
            if (labels == NO_LABEL).any():
                raise DataError(
                    f"{self._where}: an image without a label; got an image in "
                    f"{self._place(number)}, expected KEY.cls, a whole number, beside each "
                    "KEY.jpg. Write the shards with labels."
                )
            labels_of_shards.append(labels)
        return np.concatenate(labels_of_shards)

    def _make(self, stored: Stored, part: int, writer: BlockWriter) -> None:
        _write(stored, writer, self._where)


def _counted(root: str, shards: Sequence[Stored], where: str) -> list[tuple[int, str]]:
    """Counts the images of each shard.

    The counts are kept in the user's cache folder, by the URL `root` that the user gave. A shard
    whose count was not kept is fetched.

    Returns: for each shard its number of images, and a message about its damage or "".
    """
    name = hashlib.sha256(root.encode("utf-8", "surrogateescape")).hexdigest()[:32]
    notes = cache_folder() / "listings" / f"{name}.counts.json"
    counts = json_object(notes)
    keys = [block_key(shard, 0) for shard in shards]
    missing = [i for i, key in enumerate(keys) if key not in counts]
    cache = the_cache()

    def count(place: int) -> tuple[int, str]:
        torn: list[str] = []
        block = cache.open(keys[place], lambda w: torn.append(_write(shards[place], w, where)))
        assert block is not None
        return len(block), "".join(torn)

    with ThreadPoolExecutor(STREAMS) as pool:
        pending = {pool.submit(count, place): place for place in missing}
        try:
            with activity.work(f"counting the images of {where}", len(missing), "shards") as work:
                for done in as_completed(pending):
                    counts[keys[pending[done]]] = list(done.result())
                    work.advance()
        finally:
            for waiting in pending:
                waiting.cancel()
            if missing:  # Counts are kept, so that they need not be made again.
                with suppress(OSError):
                    notes.parent.mkdir(parents=True, exist_ok=True)
                    write_json(notes, counts)
    return [(int(counts[key][0]), str(counts[key][1])) for key in keys]


def _write(shard: Stored, writer: BlockWriter, where: str) -> str:
    """Writes the contents and the index of a shard, which is fetched whole, as a block.

    Returns: a message about the shard's damage, or "" for an undamaged shard.
    Raises:
        DataError: if the shard is compressed, or has changed since it was listed.
        StorageError: if the store does not answer.
    """
    with shard.open() as remote:
        shutil.copyfileobj(remote, writer.file, RANGE_BYTES)
    writer.file.seek(0)
    images, torn = images_in(writer.file, shard.url, where=where)
    for image in images:
        writer.note(*image)
    return torn
