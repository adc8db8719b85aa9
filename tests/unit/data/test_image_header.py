from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from fd_large.data.decode import decode, size_before_decoding
from fd_large.data.image_header import JpegHeader, read_header
from fd_large.errors import DataError


def encoded(pixels: np.ndarray, format: str, **options) -> bytearray:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format, **options)
    return bytearray(buffer.getvalue())


@pytest.mark.parametrize(
    ("format", "options"),
    [
        ("JPEG", {}),
        ("JPEG", {"progressive": True}),
        ("PNG", {}),
        ("WEBP", {}),
        ("WEBP", {"lossless": True}),
        ("WEBP", {"lossless": True, "exif": b"Exif\0\0"}),
    ],
)
@pytest.mark.parametrize(("height", "width"), [(1, 1), (31, 57), (300, 200)])
def test_format_and_size_are_those_of_the_picture(photograph, format, options, height, width):
    header = read_header(encoded(photograph(height, width), format, **options))
    assert (header.format, header.height, header.width) == (format, height, width)


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP"])
def test_a_header_cut_anywhere_is_none_or_sound(photograph, format):
    data = encoded(photograph(40, 50), format)
    for size in range(min(len(data), 700)):
        header = read_header(data[:size])
        assert header is None or (header.height, header.width) == (40, 50)


def test_random_bytes_after_the_mark_do_no_harm():
    rng = np.random.default_rng(0)
    for mark in (b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR", b"RIFF\0\0\0\0WEBPVP8 "):
        for _ in range(200):
            header = read_header(mark + rng.bytes(int(rng.integers(0, 80))))
            assert header is None or (header.height >= 0 and header.width >= 0)


def test_other_formats_are_left_to_pillow(photograph):
    for format in ("BMP", "TIFF", "GIF"):
        assert read_header(encoded(photograph(9, 9), format)) is None
    assert read_header(b"") is None


@pytest.mark.parametrize("orientation", range(9))
def test_only_upright_pictures_stop_early(photograph, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(photograph(40, 60), "JPEG", exif=exif)
    assert (size_before_decoding(data) is None) == (orientation != 1)


def test_progressive_pictures_do_not_stop_early(photograph):
    assert size_before_decoding(encoded(photograph(40, 60), "JPEG", progressive=True)) is None


@pytest.mark.parametrize("subsampling", [0, 1, 2], ids=["444", "422", "420"])
@pytest.mark.parametrize("restarts", [0, 1, 3])
@pytest.mark.parametrize("grey", [False, True])
def test_the_rows_of_a_picture_decoded_in_part_are_those_of_the_whole(
    photograph, subsampling, restarts, grey, capfd
):
    pixels = photograph(117, 83)
    data = encoded(
        pixels[..., 0] if grey else pixels,
        "JPEG",
        quality=85,
        restart_marker_rows=restarts,
        **({} if grey else {"subsampling": subsampling}),
    )
    before = bytes(data)
    whole = decode(data, "x")
    for num_rows in (1, 7, 8, 9, 16, 17, 50, 96, 112, 116, 117):
        part = decode(data, "x", num_rows=num_rows)
        assert num_rows <= part.shape[1] <= 117
        assert (part == whole[:, : part.shape[1]])[:, :num_rows].all()
        assert data == before
    assert decode(data, "x", num_rows=1).shape[1] < 117
    assert capfd.readouterr().err == ""


def test_photographs_decoded_in_part_are_those_of_the_whole(photo_folder):
    for path in sorted(photo_folder.rglob("*.JPEG")):
        data = bytearray(path.read_bytes())
        whole = decode(data, "x")
        for part in (0.1, 0.5, 0.9):
            num_rows = max(1, int(part * whole.shape[1]))
            top = decode(data, "x", num_rows=num_rows)
            assert (top[:, :num_rows] == whole[:, :num_rows]).all()


def test_a_cut_file_is_noticed_though_the_cut_is_below_the_rows_wanted(photograph):
    data = encoded(photograph(200, 200), "JPEG")
    with pytest.raises(DataError, match="not an image"):
        decode(data[: len(data) * 9 // 10], "x", num_rows=20)


def test_a_size_over_the_limit_is_refused_before_decoding(photograph):
    for format in ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF"):
        data = encoded(photograph(40, 50), format)
        with pytest.raises(DataError, match=r"x: .*50 x 40 .* 1999"):
            decode(data, "x", max_pixels=1999)
        decode(data, "x", max_pixels=2000)


def test_a_jpeg_that_tells_no_height_is_not_decoded_in_part(photograph):
    data = encoded(photograph(40, 50), "JPEG")
    header = read_header(data)
    assert isinstance(header, JpegHeader)
    data[header.height_at : header.height_at + 2] = b"\0\0"
    assert size_before_decoding(data) is None
    with pytest.raises(DataError):
        decode(data, "x")
