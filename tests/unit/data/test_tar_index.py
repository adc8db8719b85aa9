from __future__ import annotations

import gzip
import io
import os
import random
import tarfile

import pytest

from fd_large.data.tar_index import NO_LABEL, Member, Torn, images_in, members
from fd_large.errors import DataError

BLOCK = tarfile.BLOCKSIZE
FORMATS = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}
PLAIN = {"a.jpg": b"1" * 700, "b.cls": b"7", "folder/c.png": b"", "z" * 90 + ".jpg": b"x" * 512}
LONG = {"d" * 80 + "/" + "e" * 80 + "/写真 é (1).jpg": b"long", "f" * 300 + ".jpg": b"longer"}


def write(path, files: dict[str, bytes], format: int) -> None:
    with tarfile.open(path, "w", format=format) as archive:
        folder = tarfile.TarInfo("folder")
        folder.type = tarfile.DIRTYPE
        archive.addfile(folder)
        link = tarfile.TarInfo("link.jpg")
        link.type, link.linkname = tarfile.SYMTYPE, "a.jpg"
        archive.addfile(link)
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))


def read(path) -> tuple[dict[str, bytes], str]:
    """What the index finds, and the message of a tear."""
    found: dict[str, bytes] = {}
    with open(path, "rb", buffering=0) as file:
        try:
            for name, offset, size in members(file):
                found[os.fsdecode(name)] = os.pread(file.fileno(), size, offset)
        except Torn as error:
            return found, str(error)
    return found, ""


@pytest.mark.parametrize("format", FORMATS)
def test_what_tarfile_writes_is_found(tmp_path, format):
    files = PLAIN | (LONG if format != "ustar" else {"d" * 80 + "/" + "e" * 90 + ".jpg": b"x"})
    write(tmp_path / "x.tar", files, FORMATS[format])
    assert read(tmp_path / "x.tar") == (files, "")


def test_names_from_the_folder_they_were_packed_in_lose_the_dot(tmp_path):
    write(tmp_path / "x.tar", {"./a/b.jpg": b"1"}, tarfile.GNU_FORMAT)
    assert list(read(tmp_path / "x.tar")[0]) == ["a/b.jpg"]


def test_a_size_told_by_a_pax_record_or_in_base_256_counts(tmp_path):
    write(tmp_path / "x.tar", PLAIN, tarfile.PAX_FORMAT)
    with tarfile.open(tmp_path / "y.tar", "w", format=tarfile.PAX_FORMAT) as archive:
        info = tarfile.TarInfo("big.jpg")
        info.size, info.pax_headers = 5, {"size": "5", "comment": "blanks = and signs"}
        archive.addfile(info, io.BytesIO(b"12345"))
    assert read(tmp_path / "y.tar") == ({"big.jpg": b"12345"}, "")
    data = bytearray((tmp_path / "y.tar").read_bytes())
    header = data.index(b"big.jpg\0")
    field = (5).to_bytes(12, "big")
    data[header + 124 : header + 136] = b"\x80" + field[1:]
    data[header + 148 : header + 156] = b" " * 8
    data[header + 148 : header + 156] = b"%06o\0 " % sum(data[header : header + BLOCK])
    (tmp_path / "y.tar").write_bytes(data)
    assert read(tmp_path / "y.tar") == ({"big.jpg": b"12345"}, "")


@pytest.fixture
def whole(tmp_path):
    path = tmp_path / "whole.tar"
    files = {f"{number}.jpg": bytes([number + 1]) * 600 for number in range(4)}
    write(path, files, tarfile.USTAR_FORMAT)
    return path, files


def test_an_archive_cut_anywhere_is_noticed_and_keeps_what_is_whole(whole, tmp_path):
    path, files = whole
    data = path.read_bytes()
    with tarfile.open(path) as archive:
        ends = [info.offset_data + info.size for info in archive if info.isreg()]
    end_mark = ends[-1] + -ends[-1] % BLOCK
    for size in range(0, end_mark + BLOCK, 100):
        (tmp_path / "cut.tar").write_bytes(data[:size])
        found, torn = read(tmp_path / "cut.tar")
        assert found == dict(list(files.items())[: sum(end <= size for end in ends)])
        assert torn
    (tmp_path / "cut.tar").write_bytes(data[: end_mark + BLOCK])  # one block of zeros will do
    assert read(tmp_path / "cut.tar") == (files, "")


def test_any_damaged_byte_of_a_header_is_noticed(whole, tmp_path):
    path = whole[0]
    data = path.read_bytes()
    with tarfile.open(path) as archive:
        header = [info.offset for info in archive if info.isreg()][2]
    for place in random.Random(0).sample(range(BLOCK), 60):
        damaged = bytearray(data)
        damaged[header + place] ^= 0x41
        (tmp_path / "damaged.tar").write_bytes(damaged)
        found, torn = read(tmp_path / "damaged.tar")
        assert list(found) == ["0.jpg", "1.jpg"]
        assert f"the header at byte {header} is damaged" in torn


def test_what_follows_the_end_is_noticed(whole, tmp_path):
    path, files = whole
    data = path.read_bytes()
    (tmp_path / "two.tar").write_bytes(data + data)
    assert read(tmp_path / "two.tar") == (files, read(tmp_path / "two.tar")[1])
    assert "other data follow" in read(tmp_path / "two.tar")[1]
    (tmp_path / "hole.tar").write_bytes(data + bytes(2 << 20))
    assert "the file at byte" in read(tmp_path / "hole.tar")[1]


def test_what_is_no_tar_is_noticed(tmp_path):
    for content in (b"", b"text\n" * 500, random.Random(0).randbytes(5000)):
        (tmp_path / "no.tar").write_bytes(content)
        found, torn = read(tmp_path / "no.tar")
        assert found == {}
        assert torn


def test_a_size_that_is_no_number_is_noticed(whole, tmp_path):
    data = bytearray(whole[0].read_bytes())
    header = data.index(b"1.jpg\0")
    data[header + 124 : header + 136] = b"9zzzzzzzzzz\0"
    data[header + 148 : header + 156] = b" " * 8
    data[header + 148 : header + 156] = b"%06o\0 " % sum(data[header : header + BLOCK])
    (tmp_path / "x.tar").write_bytes(data)
    found, torn = read(tmp_path / "x.tar")
    assert list(found) == ["0.jpg"]
    assert "is damaged" in torn


def test_a_member_is_its_place(whole):
    with open(whole[0], "rb") as file:
        assert next(members(file)) == Member(b"0.jpg", 3 * BLOCK, 600)  # after a folder and a link


@pytest.mark.parametrize("kind", [tarfile.REGTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.DIRTYPE])
@pytest.mark.parametrize("size", [-1, -512, -(2**62)])
def test_a_negative_size_is_a_damaged_header(tmp_path, kind, size):
    path = tmp_path / "a.tar"
    write(path, PLAIN, tarfile.GNU_FORMAT)
    sound, _ = read(path)
    info = tarfile.TarInfo("bad.jpg")
    info.type = kind
    header = bytearray(info.tobuf(tarfile.GNU_FORMAT))
    header[124:136] = (size % 256**12).to_bytes(12, "big")  # Base 256, as GNU's tar has it.
    header[124] = 0xFF
    header[148:156] = b"%06o\0 " % tarfile.calc_chksums(bytes(header))[0]
    content = path.read_bytes()
    end = content.rstrip(b"\0")
    place = -(-len(end) // BLOCK) * BLOCK
    path.write_bytes(content[:place] + header + bytes(4 * BLOCK))
    found, torn = read(path)
    assert found == sound
    assert f"header at byte {place} is damaged" in torn


def test_a_negative_size_in_a_pax_header_is_torn(tmp_path):
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as archive:
        archive.addfile(tarfile.TarInfo("a.jpg"))
        bad = tarfile.TarInfo("b.jpg")
        bad.pax_headers = {"size": "-700"}
        archive.addfile(bad)
    found, torn = read(path)
    assert found == {"a.jpg": b""}
    assert torn


def test_images_come_with_the_labels_beside_them(tmp_path):
    files = {
        "x/1.cls": b" 7\n",
        "x/1.small.JPG": b"one",
        "x/2.png": b"two",
        "x/3.png": b"three",
        "x/3.cls": b"-1",
        ".x/4.png": b"hidden",
        "x/.5.png": b"hidden",
        "x/6.txt": b"no image",
    }
    write(tmp_path / "a.tar", files, tarfile.GNU_FORMAT)
    with open(tmp_path / "a.tar", "rb", buffering=0) as file:
        images, torn = images_in(file, "a.tar", where="x")
        found = [os.pread(file.fileno(), image.size, image.offset) for image in images]
    assert [(image.name, image.label) for image in images] == [
        (b"x/1.small.JPG", 7),
        (b"x/2.png", NO_LABEL),
        (b"x/3.png", NO_LABEL),
    ]
    assert found == [b"one", b"two", b"three"]
    assert torn == ""


def test_an_archive_that_is_cut_has_its_first_images_and_a_compressed_one_none(tmp_path):
    path = tmp_path / "a.tar"
    write(path, {"1.png": b"1", "2.png": b"2" * 5000}, tarfile.GNU_FORMAT)
    path.write_bytes(path.read_bytes()[:4000])
    with open(path, "rb", buffering=0) as file:
        images, torn = images_in(file, "a.tar", where="x")
    assert [image.name for image in images] == [b"1.png"]
    assert torn.startswith("a.tar: ")
    path.write_bytes(gzip.compress(b"x"))
    with open(path, "rb", buffering=0) as file, pytest.raises(DataError, match=r"^x: .*gzip"):
        images_in(file, "a.tar", where="x")
