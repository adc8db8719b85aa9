from __future__ import annotations

import gzip
import os
import pickle
import tarfile

import pytest

from fd_large.data import listing
from fd_large.data.folder import ImageFolder
from fd_large.data.shards import TarShards
from fd_large.data.source import expand_braces, open_images
from fd_large.errors import DataError


def pack(folder, tar, names=None, prefix="") -> None:
    """Packs files of a folder in a given order, or in any."""
    names = names or [str(path.relative_to(folder)) for path in folder.rglob("*.*")]
    with tarfile.open(tar, "w") as archive:
        for name in names:
            archive.add(folder / name, prefix + name)


@pytest.fixture
def shards(tmp_path, picture_folder):
    """The image folder in three shards, its order shuffled, with members of other kinds."""
    folder = tmp_path / "shards"
    folder.mkdir()
    names = sorted(str(path.relative_to(picture_folder)) for path in picture_folder.rglob("*.*"))
    names = names[::-2] + names[-2::-2]
    label = tmp_path / "label.cls"
    label.write_text("7")
    for number in range(3):
        with tarfile.open(folder / f"train-{number:03}.tar", "w") as archive:
            for name in names[number::3]:
                archive.add(picture_folder / name, f"./{name}" if number == 1 else name)
                archive.add(label, os.path.splitext(name)[0] + ".cls")
            archive.add(label, ".hidden.jpg")
            archive.add(label, "__MACOSX/._a.jpg")
    return folder


@pytest.mark.parametrize("pattern", ["", "/train-*.tar", "/train-{000..002}.tar"])
def test_shards_are_the_data_set_that_their_folder_was(shards, picture_folder, pattern):
    folder, source = ImageFolder(picture_folder), open_images(f"{shards}{pattern}")
    assert isinstance(source, TarShards)
    assert len(source) == len(folder) == 26
    assert source.fingerprint == folder.fingerprint
    assert source.torn == ()
    for index in range(26):
        assert source.read(index) == folder.read(index)
        assert source[index].partition(".tar/")[2] == os.path.relpath(folder[index], folder.root)


def test_one_shard_and_a_choice_of_them(shards):
    one = open_images(str(shards / "train-000.tar"))
    two = open_images(f"{shards}/train-{{000,002}}.tar")
    assert len(one) == 9
    assert len(two) == 17


def test_braces_are_written_out():
    assert expand_braces("a-{08..11}.tar") == ["a-08.tar", "a-09.tar", "a-10.tar", "a-11.tar"]
    assert expand_braces("{a,b}{2..1}") == ["a2", "a1", "b2", "b1"]
    assert expand_braces("{a}") == ["{a}"]


def test_survives_pickling(shards):
    source = open_images(str(shards))
    copy = pickle.loads(pickle.dumps(source))
    assert [copy[i] for i in range(26)] == [source[i] for i in range(26)]
    assert copy.read(3) == source.read(3)


def test_loose_pictures_win_over_the_archive_they_came_from(tmp_path, picture_folder, caplog):
    (tmp_path / "a.jpg").write_bytes(b"x")
    pack(picture_folder, tmp_path / "train.tar")
    source = open_images(str(tmp_path))
    assert [source[i] for i in range(len(source))] == [str(tmp_path / "a.jpg")]
    assert "holds 1 .tar files beside images" in caplog.text


def test_the_index_is_kept_until_a_shard_changes(shards, cache, monkeypatch):
    monkeypatch.setattr(listing, "CACHED_FROM", 3)
    fills = []
    fill = TarShards._fill
    monkeypatch.setattr(TarShards, "_fill", lambda s, w: fills.append(1) or fill(s, w))
    for shard in shards.iterdir():
        os.utime(shard, (1e9, 1e9))
    for _ in range(2):
        assert len(open_images(str(shards))) == 26
    assert len(fills) == 1
    os.utime(shards / "train-001.tar", (1e9 + 1, 1e9 + 1))
    open_images(str(shards))
    assert len(fills) == 2
    (shards / "train-001.tar").unlink()
    assert len(open_images(str(shards))) == 17
    assert len(fills) == 3


def test_a_shard_that_changed_under_a_run_is_not_read(shards):
    source = open_images(str(shards / "train-000.tar"))
    with open(shards / "train-000.tar", "ab") as file:
        file.write(bytes(512))
    with pytest.raises(DataError, match=r"train-000\.tar/.*cannot be read; got a shard that chang"):
        source.read(0)


@pytest.mark.parametrize(
    ("name", "num", "told"),
    [
        ("shard_good.tar", 4, None),
        ("shard_mixed.tar", 4, None),  # two of them are found bad when they are decoded
        ("shard_cut.tar", 3, "is not whole: the member at byte 28160 has 3993 of 7986 bytes; 3 "),
        ("shard_bad_checksum.tar", 2, "is not whole: the header at byte 18944 is damaged"),
    ],
)
def test_torn_shards_are_told_and_used_as_far_as_they_go(
    data_file, tmp_path, caplog, name, num, told
):
    with tarfile.open(data_file("bad_images.tar")) as archive:
        archive.extract(name, tmp_path, filter="data")
    source = open_images(str(tmp_path / name))
    assert len(source) == num
    if told is None:
        assert source.torn == ()
        assert caplog.text == ""
    else:
        assert told in source.torn[0]
        assert source.torn[0] in caplog.text


@pytest.mark.parametrize(
    ("root", "message"),
    [
        ("", "no such folder"),
        ("missing", "no such folder"),
        ("note.txt", "neither a folder nor a tar file"),
        ("empty", "no image in the folder"),
        ("m-{0..3}.tar", r"no such tar file; got 'm-0\.tar' from 'm-\{0\.\.3\}\.tar'"),
        ("m-*.tar", r"no such tar file; got 'm-\*\.tar'"),
        ("labels.tar", r"no image in labels\.tar; "),
        ("note.tar", r"no image in note\.tar \(note\.tar: a shard that is not whole: .*\); got"),
        ("packed.tar", r"a compressed shard; got gzip for 'packed\.tar', expected a plain tar"),
    ],
)
def test_what_holds_no_picture_is_one_sentence(tmp_path, monkeypatch, root, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "note.txt").write_text("x")
    (tmp_path / "note.tar").write_text("no tar")
    (tmp_path / "empty").mkdir()
    (tmp_path / "packed.tar").write_bytes(gzip.compress(b"x"))
    with tarfile.open(tmp_path / "labels.tar", "w") as archive:
        archive.add(tmp_path / "note.txt", "a.cls")
    with pytest.raises(DataError, match=rf"^data\.root: {message}") as info:
        open_images(root)
    assert "\n" not in str(info.value)
