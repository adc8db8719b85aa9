"""Class folders and labelled shards."""

from __future__ import annotations

import io
import pickle
import tarfile
from pathlib import Path

import numpy as np
import pytest
import webdataset
from PIL import Image
from torchvision.datasets import ImageFolder

from fd_large.data import listing
from fd_large.data.labelled import open_labelled, open_split, training_part
from fd_large.errors import DataError

# "a-b/" sorts before "a/", though "a" comes before "a-b"; a folder inside a class is no class.
FILES = ["a/1.png", "a/deep/2.png", "a-b/3.png", "\u00e9/4.png", "z/5.png", "z/6.png", "B/7.png"]


def picture(number: int) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(np.full((4, 5, 3), number, np.uint8)).save(stream, "PNG")
    return stream.getvalue()


def write(root: Path, files: list[str]) -> Path:
    for number, name in enumerate(files):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(picture(number))
    return root


def write_shard(path: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


def labels(source) -> list[int]:
    again = pickle.loads(pickle.dumps(source))
    found = [source.label(index) for index in range(len(source))]
    assert [again.label(index) for index in range(len(again))] == found
    return found


def test_labels_are_torchvisions(tmp_path):
    folder = open_labelled(str(write(tmp_path, FILES)))
    theirs = ImageFolder(str(tmp_path))
    assert list(folder.classes) == theirs.classes
    expected = dict(theirs.samples)
    assert labels(folder) == [expected[folder[i]] for i in range(len(folder))]


def test_a_test_set_takes_the_classes_of_training(tmp_path):
    write(tmp_path / "train", ["a/1.png", "b/2.png", "c/3.png"])
    write(tmp_path / "test", ["c/1.png", "a/2.png"])
    classes = open_split(str(tmp_path), "train").classes
    found = open_split(str(tmp_path), "val", classes)
    assert labels(found) == [0, 2]
    assert found.classes == classes
    write(tmp_path / "test", ["d/1.png"])
    with pytest.raises(DataError, match=r"eval\.root: classes .*; got d "):
        open_split(str(tmp_path), "val", classes, where="eval.root")


def test_what_is_missing_is_named(tmp_path):
    write(tmp_path / "train", ["1.png", "a/2.png"])
    with pytest.raises(DataError, match=r"data\.root: .*1\.png"):
        open_split(str(tmp_path), "train")
    with pytest.raises(DataError, match=r"eval\.root: .*val/ or validation/ or test/"):
        open_split(str(tmp_path), "val", where="eval.root")
    with pytest.raises(DataError, match=r"got 'builtin:"):
        open_labelled("builtin:photographs")


@pytest.mark.parametrize("cached_from", [1, 20_000])
def test_shards_of_webdataset(tmp_path, monkeypatch, cached_from):
    monkeypatch.setattr(listing, "CACHED_FROM", cached_from)
    numbers = [3, 0, 12, 3, 5]
    with webdataset.ShardWriter(str(tmp_path / "%03d.tar"), maxcount=2, verbose=0) as writer:
        for number, label in enumerate(numbers):
            sample = {"__key__": f"n{number}/pic.{number}"[:4], "png": picture(number)}
            writer.write({**sample, "cls": label, "json": {"a": 1}})
    found = open_labelled(str(tmp_path))
    assert found.classes == tuple(map(str, range(13)))
    assert found.fingerprint == found.images.fingerprint
    # The grey level of an image is its number.
    levels = [np.asarray(Image.open(io.BytesIO(found.read(i))))[0, 0, 0] for i in range(5)]
    assert labels(found) == [numbers[level] for level in levels]


def test_labels_come_with_pictures_whatever_the_order_of_members(tmp_path):
    write_shard(
        tmp_path / "b.tar",
        {"x/2.cls": b"7", "x/2.small.png": picture(2), "x/1.png": picture(1), "x/1.cls": b"4\n"},
    )
    write_shard(tmp_path / "a.tar", {"x/1.png": picture(3), "x/1.cls": b" 2 "})
    assert labels(open_labelled(str(tmp_path))) == [2, 4, 7]
    # Numbers count the classes of training, whatever their names.
    assert labels(open_labelled(str(tmp_path), tuple("abcdefgh"))) == [2, 4, 7]
    with pytest.raises(DataError, match=r"got .*7"):
        open_labelled(str(tmp_path), ("a", "b"))


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({"1.png": b"x", "2.png": b"x", "2.cls": b"1"}, r"got .*/1\.png, "),
        ({"1.png": b"x", "1.cls": b"cat"}, r"got .*/1\.png, "),
        ({"1.png": b"x", "1.cls": b"-1"}, r"got .*/1\.png, "),
    ],
)
def test_bad_labels_are_refused(tmp_path, members, message):
    with pytest.raises(DataError, match=message):
        open_labelled(str(write_shard(tmp_path / "a.tar", members)))


@pytest.mark.parametrize(
    ("folders", "learnt"),
    [
        (("train", "val"), "train"),
        (("train", "test"), "train"),
        (("train", "val", "test"), "train"),
        # Classes may be called so, and a part alone is a folder like another.
        (("train", "cat"), "."),
        (("val", "test"), "."),
    ],
)
def test_what_is_tested_is_not_learnt_from(tmp_path, folders, learnt, caplog):
    caplog.set_level("INFO")
    write(tmp_path, [f"{folder}/a/1.png" for folder in folders])
    assert training_part(str(tmp_path)) == str(tmp_path / learnt)
    assert ("training uses" in caplog.text) == (learnt == "train")
