"""Images in tar shards, read in place: nothing is unpacked.

WebDataset's naming (KEY.jpg, KEY.cls, KEY.json ...) and any other tar of images do: every member
with a picture's extension is a sample, other members are passed over.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from copy import copy
from typing import Any

from fd_large.data.folder import EXTENSIONS, MAX_FILE_BYTES
from fd_large.data.listing import Listing, ListingWriter, listed, settled
from fd_large.data.tar_index import Torn, members
from fd_large.errors import DataError

log = logging.getLogger(__name__)

_ENDINGS = tuple(extension.encode() for extension in EXTENSIONS)
_COMPRESSED = {b"\x1f\x8b": "gzip", b"BZ": "bzip2", b"\xfd7": "xz", b"\x28\xb5": "zstd"}


class TarShards:
    """The images in some tar files: `len(shards)`, `shards[i]` (its place), `shards.read(i)`.

    The order is that of the members' names over all shards (of equal names the shard's place
    decides), so that a folder and its tar files, however packed, are the same data set.

    A shard that is cut or damaged is read as far as it is sound: `torn` says so for each, and the
    log. An index is kept in the cache (`listing.py`) and made again when the size or modification
    time of any shard changed, or their list.
    """

    def __init__(self, paths: Sequence[str], *, where: str = "data.root") -> None:
        """Indexes the shards.

        Args:
            paths: The tar files, at least one.
            where: The field that names them, for messages.

        Raises: DataError: if one cannot be read or is compressed, or none holds an image.
        """
        self.paths, self._where = list(paths), where
        key = "\n".join(os.path.realpath(path) for path in self.paths)
        self._listing: Listing = listed(
            f"shards {key}",
            columns=("offset", "size", "shard"),
            fill=self._fill,
            is_current=self._is_current,
        )
        facts = self._listing.facts
        self.sizes_and_times: list[list[int]] = facts["shards"]
        self.torn: tuple[str, ...] = tuple(facts["torn"])
        for message in self.torn:
            log.warning("%s", message)
        if not len(self._listing):
            torn = f" ({'; '.join(self.torn)})" if self.torn else ""
            raise DataError(
                f"{where}: no image in {_some(self.paths)}{torn}; got members of other kinds "
                f"or none, expected names ending in {' '.join(EXTENSIONS)}. Set --{where} to "
                "tar files of images."
            )
        self.fingerprint = self._listing.fingerprint

    def __len__(self) -> int:
        return len(self._listing)

    def __getitem__(self, index: int) -> str:
        shard = self.paths[self._listing.number("shard", index)]
        return f"{shard}/{os.fsdecode(self._listing.name(index))}"

    def at(self, paths: Sequence[str]) -> TarShards:
        """The same samples, read from copies of the shards.

        Args:
            paths: Of the copies, in the order of `self.paths`.
        """
        assert len(paths) == len(self.paths)
        moved = copy(self)
        moved.paths = list(paths)
        moved.sizes_and_times = []
        for path in paths:
            status = os.stat(path)
            moved.sizes_and_times.append([status.st_size, status.st_mtime_ns])
        return moved

    def read(self, index: int) -> bytearray:
        """The bytes of image `index`.

        Raises: DataError: if the shard cannot be read or is no longer the one that was indexed.
        """
        number = self._listing.number("shard", index)
        size = self._listing.number("size", index)
        try:
            if size > MAX_FILE_BYTES:
                raise OSError(f"a member of {size} bytes")
            with open(self.paths[number], "rb", buffering=0) as file:
                if _size_and_time(file.fileno()) != self.sizes_and_times[number]:
                    raise OSError("a shard that changed since it was indexed")
                encoded = bytearray(size)
                done = os.preadv(file.fileno(), [encoded], self._listing.number("offset", index))
                if done < size:
                    raise OSError(f"{done} of {size} bytes")
                return encoded
        except OSError as error:
            raise DataError(
                f"{self[index]}: cannot be read; got {error.strerror or error}, expected a "
                "image. Restore the shard, or start again to index it anew."
            ) from error

    def _fill(self, writer: ListingWriter) -> dict[str, Any]:
        found: list[tuple[bytes, int, int, int]] = []  # name, shard, offset, size
        torn, shards = [], []
        for number, path in enumerate(self.paths):
            before = len(found)
            try:
                with open(path, "rb", buffering=0) as file:
                    shards.append(_size_and_time(file.fileno()))
                    _refuse_compressed(path, os.pread(file.fileno(), 2, 0), self._where)
                    for name, offset, size in members(file.fileno()):
                        if name.lower().endswith(_ENDINGS) and not _hidden(name):
                            found.append((name, number, offset, size))
            except Torn as error:
                torn.append(
                    f"{path}: a shard that is not whole: {error}; {len(found) - before} images "
                    "before that are used. Fetch or write the shard again."
                )
            except OSError as error:
                raise DataError(
                    f"{self._where}: a shard cannot be read; got {error.strerror or error} for "
                    f"{path!r}, expected a tar file. Mend its permissions or leave it out."
                ) from error
        found.sort()
        for name, number, offset, size in found:
            writer.add(name, offset, size, number)
        return {"torn": torn, "shards": shards}

    def _is_current(self, facts: dict[str, Any]) -> bool:
        if len(facts["shards"]) != len(self.paths):
            return False
        for path, (size, modified) in zip(self.paths, facts["shards"], strict=True):
            status = os.stat(path)
            if (status.st_size, status.st_mtime_ns) != (size, modified):
                return False
            if not settled(modified, facts["listed_at"]):
                return False
        return True


def _hidden(name: bytes) -> bool:
    return name.startswith(b".") or b"/." in name


def _size_and_time(descriptor: int) -> list[int]:
    status = os.fstat(descriptor)
    return [status.st_size, status.st_mtime_ns]


def _refuse_compressed(path: str, start: bytes, where: str) -> None:
    if kind := _COMPRESSED.get(start):
        raise DataError(
            f"{where}: a compressed shard; got {kind} for {path!r}, expected a plain tar file, "
            "whose members can be read in place. Decompress it (images gain nothing by it)."
        )


def _some(paths: Sequence[str]) -> str:
    return paths[0] if len(paths) == 1 else f"{paths[0]} and {len(paths) - 1} other tar files"
