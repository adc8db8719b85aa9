"""Decodes the bytes of an image file to RGB pixels by Pillow, without importing torch.

Sizes are read before pixels are decoded, so that a small file cannot claim much memory. A file that
cannot be used raises a `DataError` with the file's name.
"""

from __future__ import annotations

import io
import warnings

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from fd_large.data.image_header import MAX_PIXELS, check_size
from fd_large.errors import DataError

# Formats are named because Pillow would otherwise try all that it knows, such as PostScript, for
# which it runs an interpreter.
_PILLOW_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
# Pillow's RGB conversion of other modes clips (16-bit, "I", "F"): white or black images.
_PILLOW_MODES = (
    "1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "LAB", "HSV",
)  # fmt: skip


def decode_with_pillow(
    encoded: bytes | bytearray, where: str, *, max_pixels: int = MAX_PIXELS
) -> NDArray[np.uint8]:
    """Decodes an image file to RGB pixels, (H, W, 3) uint8, in the image's EXIF orientation.

    Args:
        encoded: The bytes of an image file.
        where: Name of the image in error messages.
        max_pixels: Largest number of pixels; an image with more is not decoded.

    Raises: DataError: if Pillow cannot read the image, or the image has too many pixels.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow warns of sizes and of damaged EXIF.
            with Image.open(io.BytesIO(encoded), formats=_PILLOW_FORMATS) as image:
                check_size(*image.size, max_pixels, where)
                ImageOps.exif_transpose(image, in_place=True)
                return _rgb(image)
    except DataError:
        raise
    except UnidentifiedImageError:  # its own text has an address in memory
        raise refused(where, "bytes of an unknown format, or a truncated header") from None
    except Exception as error:  # Pillow's plugins raise many kinds on damaged bytes
        raise refused(where, f"{type(error).__name__}: {error}") from error


def refused(where: str, got: str) -> DataError:
    """Returns the error for a file `where` that cannot be decoded, because it is `got` instead."""
    return DataError(
        f"{where}: not an image that can be decoded; got {got}, expected a whole JPEG, PNG, "
        "WebP, GIF, BMP or TIFF file. Replace the file or remove it."
    )


def _rgb(image: Image.Image) -> NDArray[np.uint8]:
    if image.mode.startswith("I;16"):
        grey = np.asarray(image).astype(np.int32)
        grey += 128
        grey //= 257  # 65535 = 255 * 257
        return np.repeat(grey.astype(np.uint8)[:, :, None], 3, axis=2)
    if image.mode == "RGB":
        return np.array(image)
    if image.mode in _PILLOW_MODES:
        return np.array(image.convert("RGB"))
    raise ValueError(f"pixels of mode {image.mode} with unknown range")
