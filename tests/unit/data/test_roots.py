"""Datasets that are none, found before torch is imported."""

from __future__ import annotations

import os
import tarfile
from contextlib import contextmanager

import pytest

from fd_large.data.photographs import SETS
from fd_large.data.roots import require_dataset
from fd_large.errors import ConfigError, DataError


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "empty" / "deeper").mkdir(parents=True)
    (tmp_path / "empty" / ".hidden").touch()
    (tmp_path / "images" / "a").mkdir(parents=True)
    (tmp_path / "images" / "a" / "one.jpg").touch()
    (tmp_path / "notes.txt").write_text("notes")
    (tmp_path / "notes.tar").write_text("notes")
    (tmp_path / "nothing.tar").touch()
    (tmp_path / "one.parquet").touch()
    for name in ("whole.tar", "without.tar"):
        with tarfile.open(tmp_path / name, "w") as archive:
            if name == "whole.tar":
                archive.add(tmp_path / "images", "images")
    return tmp_path


@pytest.mark.parametrize("root", ["images", "whole.tar", "without.tar", "one.parquet", "gone"])
def test_what_may_be_a_dataset_passes(folder, root):
    require_dataset(f"{folder}/{root}", where="data.root")
    require_dataset(f"0.5 {folder}/images + 0.5 b={folder}/{root}", where="data.root")


@pytest.mark.parametrize(
    "root", [*SETS, "s3://bucket/x", "module:x.py:Y", "train-{00..09}.tar", "a word"]
)
def test_what_is_no_path_passes(root):
    require_dataset(root, where="data.root")


@pytest.mark.parametrize("root", ["empty", "notes.txt", "notes.tar", "nothing.tar"])
def test_a_path_without_images_is_refused(folder, root):
    with pytest.raises(DataError, match=r"^eval\.root: .*--eval\.root"):
        require_dataset(f"{folder}/{root}", where="eval.root")
    with pytest.raises(DataError, match=r"^data\.root \(b\): "):
        require_dataset(f"0.5 {folder}/images + 0.5 b={folder}/{root}", where="data.root")


@pytest.mark.parametrize(
    ("root", "part"),
    [
        ("", "got ''"),
        ("builtin:photograph", "nearest: builtin:photographs"),
        ("biultin:photographs", "nearest: builtin:"),
        ("mist.py:run", "expected module:mist.py:run"),
    ],
)
def test_a_name_of_nothing_is_refused(root, part):
    with pytest.raises((DataError, ConfigError), match=r"^data\.root: ") as caught:
        require_dataset(root, where="data.root")
    assert part in str(caught.value)


def test_a_folder_that_cannot_be_listed_is_not_called_empty(folder, monkeypatch):
    def refusing(path):
        raise PermissionError(13, "Permission denied", path)

    monkeypatch.setattr("os.scandir", refusing)
    require_dataset(f"{folder}/empty", where="data.root")


def test_of_many_files_one_is_looked_at(folder, monkeypatch):
    scandir, taken = os.scandir, []

    @contextmanager
    def counting(path):
        with scandir(path) as entries:
            yield map(lambda entry: taken.append(entry.name) or entry, entries)

    for number in range(100):
        (folder / "images" / "a" / f"{number}.jpg").touch()
    monkeypatch.setattr("os.scandir", counting)
    require_dataset(f"{folder}/images", where="data.root")
    assert len(taken) == 2


def test_links_to_folders_are_followed_and_circles_end(folder):
    (folder / "linked").mkdir()
    (folder / "linked" / "a").symlink_to(folder / "images")
    require_dataset(f"{folder}/linked", where="data.root")
    (folder / "empty" / "again").symlink_to(folder / "empty")
    require_dataset(f"{folder}/empty", where="data.root")
