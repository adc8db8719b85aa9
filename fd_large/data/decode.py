"""From the bytes of a picture file to RGB pixels, upright.

torchvision's decoders go first, about twice as fast as Pillow; Pillow takes what they refuse
(BMP, TIFF, animated WebP). A file that both refuse is a `DataError` with its name.
"""

from __future__ import annotations

import io

import numpy as np
import torch
from PIL import Image, ImageOps
from torchvision.io import ImageReadMode, decode_image

from fd_large.errors import DataError

# Pillow's RGB conversion of other modes clips (16-bit, "I", "F"): white or black pictures.
_PILLOW_MODES = (
    "1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "LAB", "HSV",
)  # fmt: skip


def decode(encoded: bytes | bytearray, where: str) -> torch.Tensor:
    """Decodes one picture.

    EXIF orientation is applied, grey repeated to three channels, transparency dropped, 16 bits
    scaled to 8, CMYK converted, of an animation the first picture taken; colour profiles are
    left alone.

    Args:
        encoded: A picture file's bytes.
        where: What to call it in an error.

    Returns: (3, H, W) uint8; its memory may be in (H, W, 3) order.
    Raises: DataError: if no decoder can read it.
    """
    if not encoded:
        raise _refused(where, "an empty file")
    webp_with_exif = encoded[8:12] == b"WEBP" and b"EXIF" in encoded  # torchvision turns no WebP
    if not webp_with_exif:
        try:
            return _to_uint8(_decode_with_torchvision(encoded))
        except RuntimeError:
            pass  # not its format, or damaged: Pillow decides, and says what is wrong
    try:
        return _decode_with_pillow(encoded)
    except Exception as error:  # Pillow's plugins raise many kinds on damaged bytes
        raise _refused(where, f"{type(error).__name__}: {error}") from error


def _refused(where: str, got: str) -> DataError:
    return DataError(
        f"{where}: not a picture that can be decoded; got {got}, expected a whole JPEG, PNG, "
        "WebP, GIF, BMP or TIFF file. Replace the file or remove it."
    )


def _decode_with_torchvision(encoded: bytes | bytearray) -> torch.Tensor:
    # a bytearray is wrapped as it is; frombuffer warns of read-only bytes
    buffer = torch.frombuffer(
        encoded if isinstance(encoded, bytearray) else bytearray(encoded), dtype=torch.uint8
    )
    return decode_image(buffer, mode=ImageReadMode.RGB, apply_exif_orientation=True)


def _to_uint8(image: torch.Tensor) -> torch.Tensor:
    if image.ndim == 4:  # (pictures, 3, H, W) of an animated GIF
        image = image[0]
    if image.dtype == torch.uint16:
        image = ((image.to(torch.int32) + 128) // 257).to(torch.uint8)  # 65535 = 255 * 257
    return image


def _decode_with_pillow(encoded: bytes | bytearray) -> torch.Tensor:
    with Image.open(io.BytesIO(encoded)) as picture:
        picture = ImageOps.exif_transpose(picture)
        if picture.mode.startswith("I;16"):
            grey = (np.asarray(picture).astype(np.int32) + 128) // 257
            pixels = np.repeat(grey.astype(np.uint8)[:, :, None], 3, axis=2)
        elif picture.mode in _PILLOW_MODES:
            pixels = np.array(picture.convert("RGB"))
        else:
            raise ValueError(f"pixels of mode {picture.mode}, whose range is not known")
    return torch.from_numpy(pixels).permute(2, 0, 1)  # (3, H, W)
