from __future__ import annotations

import io
import json
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image

from fd_large.data.decode import decode
from fd_large.errors import DataError

HEIGHT, WIDTH = 30, 44
GRADIENT = np.add.outer(np.arange(HEIGHT) * 5, np.arange(WIDTH) * 2).astype(np.uint8)
GRAIN = np.random.default_rng(0).integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)


def encoded(picture: Image.Image | np.ndarray, format: str, **options) -> bytes:
    buffer = io.BytesIO()
    if isinstance(picture, np.ndarray):
        picture = Image.fromarray(picture)
    picture.save(buffer, format, **options)
    return buffer.getvalue()


def pixels(image: torch.Tensor) -> np.ndarray:
    assert image.dtype == torch.uint8
    assert image.shape[0] == 3
    return image.permute(1, 2, 0).numpy()  # (H, W, 3)


@pytest.mark.parametrize("format", ["PNG", "BMP", "TIFF", "WEBP"])
def test_lossless_formats_come_out_exact(photograph, format):
    image = photograph(HEIGHT, WIDTH)
    options = {"lossless": True} if format == "WEBP" else {}
    np.testing.assert_array_equal(pixels(decode(encoded(image, format, **options), "x")), image)


def test_jpeg_agrees_with_pillow(photograph):
    data = encoded(photograph(HEIGHT, WIDTH), "JPEG", quality=90)
    with Image.open(io.BytesIO(data)) as picture:
        expected = np.asarray(picture).astype(int)
    assert np.abs(pixels(decode(data, "x")) - expected).max() <= 3


@pytest.mark.parametrize("format", ["JPEG", "PNG", "BMP"])
def test_grey_is_repeated_to_three_channels(format):
    image = pixels(decode(encoded(GRADIENT, format), "x"))
    assert image.shape == (HEIGHT, WIDTH, 3)
    assert (image == image[..., :1]).all()
    assert np.abs(image[..., 0].astype(int) - GRADIENT).max() <= 3


@pytest.mark.parametrize("format", ["PNG", "TIFF"])
def test_16_bit_grey_is_scaled_not_clipped(format):
    image = pixels(decode(encoded(GRADIENT.astype(np.uint16) * 257, format), "x"))
    np.testing.assert_array_equal(image, np.repeat(GRADIENT[..., None], 3, axis=2))


def test_transparency_is_dropped(photograph):
    image = photograph(HEIGHT, WIDTH)
    data = encoded(np.dstack([image, GRADIENT]), "PNG")
    np.testing.assert_array_equal(pixels(decode(data, "x")), image)


def test_of_an_animation_the_first_picture_is_taken():
    frames = [Image.fromarray(np.full((HEIGHT, WIDTH, 3), v, np.uint8)) for v in (40, 200)]
    for format in ("GIF", "WEBP"):
        options = {"lossless": True} if format == "WEBP" else {}
        data = encoded(frames[0], format, save_all=True, append_images=frames[1:], **options)
        np.testing.assert_array_equal(pixels(decode(data, "x")), np.asarray(frames[0]))


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_undone(format, orientation):
    upright = GRADIENT // 2 + np.pad(np.full((10, 10), 80, np.uint8), ((0, 20), (0, 34)))
    undo = {  # how a viewer turns what is stored, so that the inverse stores it
        1: lambda x: x,
        2: lambda x: x[:, ::-1],
        3: lambda x: x[::-1, ::-1],
        4: lambda x: x[::-1],
        5: lambda x: x.T,
        6: lambda x: np.rot90(x, 1),
        7: lambda x: x[::-1, ::-1].T,
        8: lambda x: np.rot90(x, -1),
    }
    stored = np.ascontiguousarray(undo[orientation](upright))
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"WEBP": {"lossless": True}, "JPEG": {"quality": 95}}.get(format, {})
    data = encoded(Image.fromarray(stored).convert("RGB"), format, exif=exif, **options)
    image = pixels(decode(data, "x"))[..., 0].astype(int)
    assert image.shape == upright.shape
    assert np.abs(image - upright).mean() < 3


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"not an image",
        encoded(GRAIN, "JPEG")[:500],
        encoded(GRAIN, "PNG")[:500],
        # A wrong checksum, at which torchvision 0.29 ends the process.
        encoded(GRAIN, "PNG")[:500] + b"?" + encoded(GRAIN, "PNG")[501:],
        encoded(GRADIENT.astype(np.float32), "TIFF"),
    ],
    ids=["empty", "text", "cut jpeg", "cut png", "damaged png", "float tiff"],
)
def test_what_is_no_whole_picture_is_named(data):
    with pytest.raises(DataError, match=r"some/where\.jpg: "):
        decode(data, "some/where.jpg")


def test_odd_files_end_as_their_manifest_says(data_file):
    """Images alone; tests/integration has the whole, each in a process of its own."""
    with tarfile.open(data_file("bad_images.tar")) as archive:
        files = json.load(archive.extractfile("manifest.json"))["files"]
        wrong = {}
        for name, facts in files.items():
            if name.endswith(".tar"):
                continue
            try:
                image = pixels(decode(archive.extractfile(name).read(), name))
            except DataError as error:
                if facts["expect"] == "ok":
                    wrong[name] = str(error)
                continue
            if facts["expect"] == "skip":
                wrong[name] = "decoded"
            elif list(image.shape[1::-1]) != facts["size_after_exif"]:
                wrong[name] = f"size {image.shape}"
            elif name != "gray16.png":  # there the manifest has what Pillow clips to
                error = np.abs(image.mean(axis=(0, 1)) - facts["pil_rgb_mean"]).max()
                if error > 1:
                    wrong[name] = f"mean differs by {error}"
    assert not wrong
