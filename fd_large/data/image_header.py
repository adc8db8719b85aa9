"""Reads format and size from the headers of image files, and refuses images that are too large.

Only headers of JPEG, PNG and WebP files are read here, since torchvision's decoders do not limit
the size of these images. Pillow reads the headers of other formats without decoding pixels.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

from fd_large.errors import DataError

# 8192 x 8192: 0.2 GB as RGB, at the worst (16 bits, RGB) 0.9 GB while it is decoded.
MAX_PIXELS = 1 << 26

_SOF_HUFFMAN_SEQUENTIAL = (0xC0, 0xC1)
_SOF = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}  # tables, reserved, conditioning
_SOS, _APP1 = 0xDA, 0xE1
_NO_LENGTH = frozenset({0x01, *range(0xD0, 0xD9)})
_ORIENTATION, _SHORT = 0x0112, 3


@dataclass(frozen=True)
class Header:
    """Format and size of an image, as its header states them.

    Attributes:
        format: "JPEG", "PNG" or "WEBP".
        height: Height in pixels as stored, before a rotation by EXIF.
        width: Width in pixels as stored, before a rotation by EXIF.
    """

    format: str
    height: int
    width: int


@dataclass(frozen=True)
class JpegHeader(Header):
    """Format and size of a JPEG, with what is needed to decode only its upper rows.

    Attributes:
        upright: Whether the image needs no rotation by EXIF.
        height_at: Offset in bytes of the header's two bytes for the height.
        row_step: Height in pixels of a row of coded units if a decoder can stop early, because the
            rows are stored in sequence (one scan, Huffman coded, sequential); otherwise 0.
    """

    upright: bool
    height_at: int
    row_step: int


def read_header(encoded: bytes | bytearray) -> Header | None:
    """Reads the header of the bytes of a JPEG, PNG or WebP file.

    The result is None for other formats and for headers that cannot be read.
    """
    try:
        if encoded[:3] == b"\xff\xd8\xff":
            return _read_jpeg(encoded)
        if encoded[:8] == b"\x89PNG\r\n\x1a\n" and encoded[12:16] == b"IHDR":
            width, height = struct.unpack_from(">II", encoded, 16)
            return Header("PNG", height, width)
        if encoded[:4] == b"RIFF" and encoded[8:12] == b"WEBP":
            return _read_webp(encoded)
    except (IndexError, struct.error):
        pass  # cut inside the header
    return None


def _read_jpeg(encoded: bytes | bytearray) -> JpegHeader | None:
    """Reads the header of a JPEG, which is all segments before the first scan.

    The result is None if there is no frame segment, or a segment does not start with 0xFF.

    Raises: IndexError or struct.error: if the file ends within the header.
    """
    at, upright = 2, True
    frame: tuple[int, int] | None = None  # marker, where
    while True:
        if encoded[at] != 0xFF:
            return None  # libjpeg would search further; this is rare, and Pillow decodes it
        marker = encoded[at + 1]
        if marker == 0xFF:  # fill byte
            at += 1
            continue
        if marker in _NO_LENGTH:
            at += 2
            continue
        (length,) = struct.unpack_from(">H", encoded, at + 2)
        if marker == _APP1 and encoded[at + 4 : at + 10] == b"Exif\0\0":
            upright = upright and _upright(bytes(encoded[at + 10 : at + 2 + length]))
        elif marker in _SOF:
            frame = frame or (marker, at)
        elif marker == _SOS:
            break
        at += 2 + length
    if frame is None:
        return None
    marker, where = frame
    height, width, components = struct.unpack_from(">HHB", encoded, where + 5)
    in_one_scan = encoded[at + 4] == components
    row_step = 0
    if marker in _SOF_HUFFMAN_SEQUENTIAL and in_one_scan and height:
        factors = [encoded[where + 11 + 3 * i] & 15 for i in range(components)]
        row_step = 8 * max(factors)
    return JpegHeader("JPEG", height, width, upright, where + 5, row_step)


def _upright(tiff: bytes) -> bool:
    """Whether an image's EXIF data ask for no rotation; False if this parser cannot read them."""
    order = {b"II": "<", b"MM": ">"}.get(tiff[:2])
    if order is None:
        return False
    try:
        (start,) = struct.unpack_from(order + "I", tiff, 4)
        (count,) = struct.unpack_from(order + "H", tiff, start)
        for number in range(count):
            tag, kind = struct.unpack_from(order + "HH", tiff, start + 2 + 12 * number)
            if tag == _ORIENTATION:
                (value,) = struct.unpack_from(order + "H", tiff, start + 10 + 12 * number)
                return kind == _SHORT and value == 1
    except struct.error:
        return False
    return True


def _read_webp(encoded: bytes | bytearray) -> Header | None:
    """Reads the header of a WebP file; None if the first chunk is of none of the three known kinds.

    Source: RFC 9649 (the three kinds of first chunk).
    """
    kind = encoded[12:16]
    if kind == b"VP8X":
        width = int.from_bytes(encoded[24:27], "little") + 1
        height = int.from_bytes(encoded[27:30], "little") + 1
    elif kind == b"VP8L":
        (bits,) = struct.unpack_from("<I", encoded, 21)
        width, height = (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    elif kind == b"VP8 ":
        width, height = (x & 0x3FFF for x in struct.unpack_from("<HH", encoded, 26))
    else:
        return None
    return Header("WEBP", height, width)


def check_size(width: int, height: int, max_pixels: int, where: str) -> None:
    """Raises DataError if an image, named `where`, has more than `max_pixels` pixels."""
    if width * height > max_pixels:
        raise DataError(
            f"{where}: too large; got {width} x {height} pixels, expected at most {max_pixels} in "
            "all. Remove the file, make it smaller or raise --data.max_pixels."
        )
