"""Decodes the bytes of an image file to RGB pixels, upright.

torchvision's decoders are tried first, as they are faster than Pillow; Pillow reads formats that
they refuse or handle badly (BMP, TIFF, GIF, animated WebP). Sizes are read before pixels are
decoded, so that a small file cannot claim much memory. A file that cannot be used raises a
`DataError` with the file's name.
"""

from __future__ import annotations

import torch
import torchvision
from packaging.version import Version
from torchvision.io import ImageReadMode, decode_image

from fd_large.data.decode_with_pillow import decode_with_pillow, refused
from fd_large.data.image_header import MAX_PIXELS, JpegHeader, check_size, read_header
from fd_large.data.suppress_stderr import suppress_stderr

# From 0.29 on, torchvision ends the process on a damaged PNG, which was an error before: on a wrong
# checksum of IDAT, or wrong pixels in it (seen in 0.29.2; none of 600 damaged JPEG, WebP and GIF
# files does it).
_PNG_NEEDS_PILLOW = Version(torchvision.__version__) >= Version("0.29")


def decode(
    encoded: bytes | bytearray,
    where: str,
    *,
    max_pixels: int = MAX_PIXELS,
    num_rows: int | None = None,
) -> torch.Tensor:
    """Decodes the bytes of an image file to RGB pixels.

    The EXIF orientation is applied. Grey is repeated to three channels, transparency is dropped, 16
    bits are scaled to 8, CMYK is converted, and the first image of an animation is taken. Colour
    profiles are ignored.

    Args:
        encoded: The bytes of an image file.
        where: Name of the image in error messages.
        max_pixels: Largest number of pixels; an image with more is not decoded.
        num_rows: Number of rows that are needed from the top; None for all rows. The result may
            have more rows, since decoding stops early only for images whose size
            `size_before_decoding` returns.

    Returns: (3, H, W) uint8, whose memory may be in (H, W, 3) order.
    Raises: DataError: if no decoder can read the image, or the image has too many pixels.
    """
    if not encoded:
        raise refused(where, "an empty file")
    header = read_header(encoded)
    with suppress_stderr():
        if header is not None:
            check_size(header.width, header.height, max_pixels, where)
            # torchvision ignores the orientation of a WebP
            is_turned = header.format == "WEBP" and b"EXIF" in encoded
            if not is_turned and not (header.format == "PNG" and _PNG_NEEDS_PILLOW):
                try:
                    if num_rows is not None and _rows_in_order(header):
                        return _decode_top(encoded, header, num_rows)
                    return _to_uint8(_decode_with_torchvision(encoded))
                except RuntimeError:
                    pass  # not its kind, or damaged: Pillow decides, and says what is wrong
        pixels = decode_with_pillow(encoded, where, max_pixels=max_pixels)
    return torch.from_numpy(pixels).permute(2, 0, 1)  # (3, H, W)


def size_before_decoding(encoded: bytes | bytearray) -> tuple[int, int] | None:
    """Returns the height and width in pixels of an image whose lower rows `decode` can skip.

    The result is None if the image has to be decoded whole.
    """
    header = read_header(encoded)
    return (header.height, header.width) if _rows_in_order(header) else None


def _rows_in_order(header: object) -> bool:
    return isinstance(header, JpegHeader) and header.upright and header.row_step > 0


def _decode_top(encoded: bytes | bytearray, header: JpegHeader, num_rows: int) -> torch.Tensor:
    """Decodes only the upper rows of a JPEG: the first `num_rows` rows and a few rows below them.

    The rows are equal, to the bit, to the same rows of an image that is decoded whole. A smaller
    height is written into the header of `encoded` during the decoding. libjpeg stops at this
    height, and skips the rest of the scan up to the end marker, so that a truncated file is still
    noticed. One more row of coded units is decoded, because the chroma of the last row is
    interpolated with the row below.

    Returns: (3, rows, W) uint8, with rows >= `num_rows` unless the image has fewer.
    """
    step = header.row_step
    height = min(header.height, (-(-num_rows // step) + 1) * step)
    shorter = encoded if isinstance(encoded, bytearray) else bytearray(encoded)
    place = slice(header.height_at, header.height_at + 2)
    try:
        shorter[place] = height.to_bytes(2, "big")
        return _decode_with_torchvision(shorter)
    finally:
        shorter[place] = header.height.to_bytes(2, "big")


def _decode_with_torchvision(encoded: bytes | bytearray) -> torch.Tensor:
    # a bytearray is wrapped as it is; frombuffer warns of read-only bytes
    buffer = torch.frombuffer(
        encoded if isinstance(encoded, bytearray) else bytearray(encoded), dtype=torch.uint8
    )
    return decode_image(buffer, mode=ImageReadMode.RGB, apply_exif_orientation=True)


def _to_uint8(image: torch.Tensor) -> torch.Tensor:
    if image.dtype != torch.uint16:
        return image
    scaled = torch.empty(image.shape, dtype=torch.uint8)
    # One channel at a time, since it takes four bytes a pixel meanwhile.
    for channel, target in zip(image, scaled, strict=True):
        target.copy_(channel.to(torch.int32).add_(128).floor_divide_(257))  # 65535 = 255 * 257
    return scaled
