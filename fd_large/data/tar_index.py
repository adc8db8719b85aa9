"""The index of a tar archive: the places of its images, and damage.

Archives may follow WebDataset's naming (KEY.jpg, KEY.cls, KEY.json ...) or any other: every member
with an image's extension is a sample, and other members are passed over. KEY is the name up to the
first dot after the last slash, and KEY.cls holds a label as a decimal number.

Python's tarfile ends silently at a damaged header. Here an archive ends only at the block
of zeros that every archive has; anything else in a header's place is reported as `Torn`.
"""

from __future__ import annotations

import os
import tarfile
from collections.abc import Iterator
from typing import Any, BinaryIO, NamedTuple

from fd_large.data.folder import EXTENSIONS
from fd_large.errors import DataError, without_secrets

NO_LABEL = -1
_ENDINGS = tuple(extension.encode() for extension in EXTENSIONS)
_COMPRESSED = {b"\x1f\x8b": "gzip", b"BZ": "bzip2", b"\xfd7": "xz", b"\x28\xb5": "zstd"}
# Longest label in bytes; a label is a decimal number.
_MAX_LABEL_BYTES = 32
# Archives are padded to a multiple of the record, 10 kB by default.
_MAX_PADDING = 1 << 20


class Member(NamedTuple):
    """A regular file in an archive: its bytes are [offset, offset + size) of the archive."""

    name: bytes
    offset: int
    size: int


class Torn(Exception):
    """A damaged or truncated archive; the message names the place and the damage."""


class TarImage(NamedTuple):
    """An image in an archive: its bytes are [offset, offset + size) of the archive.

    Attributes:
        name: Name in the archive.
        offset: See above.
        size: See above.
        label: The number in KEY.cls, or `NO_LABEL`.
    """

    name: bytes
    offset: int
    size: int
    label: int


def images_in(file: BinaryIO, path: str, *, where: str) -> tuple[list[TarImage], str]:
    """Lists the images of an open archive, as far as it is sound, without hidden members.

    Args:
        file: The archive, at its beginning.
        path: Name of the archive for messages.
        where: The field that names it, for messages.

    Returns: the images in the archive's order, and the damage of the archive or "".
    Raises: DataError: if it is compressed.
    """
    if kind := _COMPRESSED.get(os.pread(file.fileno(), 2, 0)):
        raise DataError(
            f"{where}: a compressed shard; got {kind} for {path!r}, expected a plain tar file, "
            "whose members can be read in place. Decompress it (images gain nothing)."
        )
    images: list[Member] = []
    labels: dict[bytes, int] = {}
    torn = ""
    try:
        for member in members(file):
            name, offset, size = member
            if name.startswith(b".") or b"/." in name:
                continue
            if name.lower().endswith(_ENDINGS):
                images.append(member)
            elif name.endswith(b".cls"):
                text = os.pread(file.fileno(), min(size, _MAX_LABEL_BYTES), offset).strip()
                labels[_key(name)] = int(text) if text.isdigit() else NO_LABEL
    except Torn as error:
        torn = without_secrets(
            f"{path}: a shard that is not whole: {error}; {len(images)} images before that are "
            "used. Fetch or write the shard again."
        )
    return [TarImage(*image, labels.get(_key(image.name), NO_LABEL)) for image in images], torn


def _key(name: bytes) -> bytes:
    """Returns the name up to the first dot after the last slash."""
    folder, slash, last = name.rpartition(b"/")
    return folder + slash + last.partition(b".")[0]


class _Header(tarfile.TarInfo):
    @classmethod
    def frombuf(cls, *args: Any, **named: Any) -> tarfile.TarInfo:
        """Reads a header, and refuses GNU's negative sizes, which tarfile accepts."""
        header = super().frombuf(*args, **named)
        if header.size < 0:
            raise tarfile.InvalidHeaderError(f"a size of {header.size}")
        return header

    @classmethod
    def fromtarfile(cls, archive: tarfile.TarFile) -> tarfile.TarInfo:
        """Reads a header; raises `Torn` for damage that tarfile would ignore."""
        try:
            return super().fromtarfile(archive)
        except tarfile.EOFHeaderError:
            raise  # The block of zeros ends every archive.
        except (tarfile.EmptyHeaderError, tarfile.TruncatedHeaderError):
            raise Torn(f"it ends at byte {archive.fileobj.tell()} without the end mark") from None
        except (tarfile.HeaderError, ValueError, OverflowError) as error:
            start = archive.fileobj.tell() - tarfile.BLOCKSIZE
            raise Torn(f"the header at byte {start} is damaged ({error})") from None


def members(file: BinaryIO) -> Iterator[Member]:
    """Yields the regular files of an open tar archive, reading headers alone.

    Args:
        file: The archive, at its beginning.

    Raises: Torn: after the last whole member, if the archive is cut, damaged or no tar at all.
    """
    end = os.fstat(file.fileno()).st_size
    try:
        archive = tarfile.TarFile(fileobj=file, tarinfo=_Header, encoding="utf-8")
        while (info := archive.next()) is not None:
            archive.members.clear()  # Otherwise tarfile keeps all members in memory.
            regular, rest = info.isreg() and not info.issparse(), end - info.offset_data
            # A pax header may have another size than the header that `frombuf` reads.
            if info.size < 0 or archive.offset <= info.offset or (regular and info.size > rest):
                raise Torn(f"the member at byte {info.offset} has {rest} of {info.size} bytes")
            if regular:
                name = info.name.encode("utf-8", "surrogateescape")
                while name.startswith(b"./"):
                    name = name[2:]
                yield Member(name, info.offset_data, info.size)
    except tarfile.ReadError:
        raise Torn(f"it ends at byte {end} without the end mark") from None
    _check_tail(file.fileno(), archive.offset, end)


def _check_tail(descriptor: int, start: int, end: int) -> None:
    """Refuses anything but padding, such as further archives or holes of an unfinished download."""
    if end - start > _MAX_PADDING:
        raise Torn(f"it ends at byte {start}, the file at byte {end}")
    if os.pread(descriptor, end - start, start).strip(b"\0"):
        raise Torn(f"it ends at byte {start}, and other data follow")
