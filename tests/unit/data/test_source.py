from __future__ import annotations

import gzip
import tarfile

import pytest

from fd_large.data import source
from fd_large.data.folder import ImageFolder
from fd_large.data.photographs import Photographs
from fd_large.data.shards import TarShards
from fd_large.data.source import open_images
from fd_large.errors import DataError


@pytest.mark.parametrize(
    ("pattern", "num"),
    [
        ("", 26),
        ("/train-*.tar", 26),
        ("/train-{000..002}.tar", 26),
        ("/train-{000,002}.tar", 17),
        ("/train-000.tar", 9),
    ],
)
def test_what_names_tar_files_opens_shards(shards, pattern, num):
    opened = open_images(f"{shards}{pattern}")
    assert isinstance(opened, TarShards)
    assert len(opened) == num


def test_what_names_a_folder_or_a_builtin_set_opens_that(picture_folder):
    assert isinstance(open_images(str(picture_folder)), ImageFolder)
    pytest.importorskip("skimage")
    pytest.importorskip("sklearn")
    assert isinstance(open_images("builtin:photographs"), Photographs)


def test_loose_pictures_win_over_the_archive_they_came_from(shards, caplog):
    (shards / "a.jpg").write_bytes(b"x")
    opened = open_images(str(shards))
    assert [opened[i] for i in range(len(opened))] == [str(shards / "a.jpg")]
    assert "holds 3 .tar files beside images" in caplog.text


@pytest.mark.parametrize(
    ("root", "message"),
    [
        ("", "empty"),
        ("missing", "no such folder"),
        ("note.txt", "neither a folder nor a tar file"),
        ("empty", r"no image in the folder .*\.jpeg"),
        ("m-{0..3}.tar", r"got 'm-0\.tar' from 'm-\{0\.\.3\}\.tar'"),
        ("m-*.tar", r"got 'm-\*\.tar'"),
        ("labels.tar", r"no image in labels\.tar; "),
        ("note.tar", r"no image in note\.tar \(note\.tar: an incomplete shard: "),
        ("packed.tar", r"got gzip for 'packed\.tar'"),
        ("builtin:photos", "got 'builtin:photos'"),
    ],
)
def test_what_holds_no_picture_is_one_sentence_with_the_field(tmp_path, monkeypatch, root, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "note.txt").write_text("x")
    (tmp_path / "note.tar").write_text("no tar")
    (tmp_path / "empty").mkdir()
    (tmp_path / "packed.tar").write_bytes(gzip.compress(b"x"))
    with tarfile.open(tmp_path / "labels.tar", "w") as archive:
        archive.add(tmp_path / "note.txt", "a.cls")
    with pytest.raises(DataError, match=rf"^eval\.root: .*{message}") as info:
        open_images(root, where="eval.root")
    assert "\n" not in str(info.value)
    assert "data.root" not in str(info.value)


def test_a_source_is_added_by_a_line_of_the_table(monkeypatch):
    class Numbers:
        fingerprint = "numbers"

    def open_numbers(root, *, where):
        return Numbers() if root == "numbers:" else None

    monkeypatch.setattr(source, "SOURCES", (*source.SOURCES, open_numbers))
    assert isinstance(open_images("numbers:"), Numbers)
    with pytest.raises(DataError, match=r"^data\.root: .*'letters:'"):
        open_images("letters:")
