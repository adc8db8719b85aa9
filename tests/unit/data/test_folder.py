from __future__ import annotations

import os
import pickle

import pytest

from fd_large.data.folder import ImageFolder
from fd_large.errors import DataError


def touch(root, *names):
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(name.encode())


def test_lists_pictures_below_in_the_order_of_their_bytes(tmp_path):
    wanted = ["B.PNG", "a-1/x.jpg", "a.jpeg", "a/b/c.WebP", "a/z.JPEG", "b.tif", "é.jpg"]
    touch(tmp_path, *reversed(wanted), "notes.txt", "jpg", ".hidden.jpg", ".cache/x.jpg")
    folder = ImageFolder(tmp_path)
    assert [os.path.relpath(folder[i], tmp_path) for i in range(len(folder))] == wanted
    assert [folder.read(i).decode() for i in range(len(folder))] == wanted


def test_survives_pickling(tmp_path):
    touch(tmp_path, "a.jpg", "b/c.png")
    folder = ImageFolder(tmp_path)
    copy = pickle.loads(pickle.dumps(folder))
    assert [copy[i] for i in range(2)] == [folder[i] for i in range(2)]


@pytest.mark.parametrize("index", [-1, 1])
def test_an_index_outside_is_an_index_error(tmp_path, index):
    touch(tmp_path, "a.jpg")
    with pytest.raises(IndexError):
        ImageFolder(tmp_path)[index]


def test_a_link_to_a_folder_above_ends(tmp_path):
    touch(tmp_path, "a/x.jpg")
    (tmp_path / "a" / "up").symlink_to(tmp_path, target_is_directory=True)
    assert len(ImageFolder(tmp_path)) == 1


def test_a_linked_folder_is_listed(tmp_path):
    touch(tmp_path, "elsewhere/x.jpg", "root/y.jpg")
    (tmp_path / "root" / "link").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    assert len(ImageFolder(tmp_path / "root")) == 2


@pytest.mark.parametrize("root", ["", "missing", "a.jpg"])
def test_a_missing_folder_is_one_sentence_with_the_flag(tmp_path, monkeypatch, root):
    monkeypatch.chdir(tmp_path)
    touch(tmp_path, "a.jpg")
    with pytest.raises(DataError, match=r"data\.root: no such folder; .* Set --data\.root") as info:
        ImageFolder(root)
    assert "\n" not in str(info.value)


def test_an_empty_folder_is_one_sentence_with_the_extensions(tmp_path):
    touch(tmp_path, "a/notes.txt")
    with pytest.raises(DataError, match=r"data\.root: no image .*\.jpeg.* Set --data\.root"):
        ImageFolder(tmp_path)


def test_a_picture_that_is_gone_is_named(tmp_path):
    touch(tmp_path, "a.jpg")
    folder = ImageFolder(tmp_path)
    (tmp_path / "a.jpg").unlink()
    with pytest.raises(DataError, match=r"a\.jpg: cannot be read; got No such file"):
        folder.read(0)


def test_what_would_wait_or_fill_the_memory_is_not_read(tmp_path, monkeypatch):
    touch(tmp_path, "a.jpg", "b.jpg")
    folder = ImageFolder(tmp_path)
    (tmp_path / "a.jpg").unlink()
    os.mkfifo(tmp_path / "a.jpg")
    assert len(ImageFolder(tmp_path)) == 1
    with pytest.raises(DataError, match=r"a\.jpg: cannot be read; got no regular file"):
        folder.read(0)
    monkeypatch.setattr("fd_large.data.folder.MAX_FILE_BYTES", 4)
    with pytest.raises(DataError, match=r"b\.jpg: cannot be read; got a file of 5 bytes"):
        folder.read(1)


def test_a_link_that_leads_nowhere_comes_up_by_name(tmp_path):
    touch(tmp_path, "a.jpg")
    (tmp_path / "b.jpg").symlink_to(tmp_path / "gone")
    folder = ImageFolder(tmp_path)
    assert len(folder) == 2
    with pytest.raises(DataError, match=r"b\.jpg: cannot be read; got No such file"):
        folder.read(1)


def test_the_order_is_that_of_whole_paths(tmp_path):
    """A folder's name is compared with its slash: "a-b", "a.b" come before "a/", "a0" after."""
    wanted = ["a-b/x.jpg", "a.b.jpg", "a.b/x.jpg", "a/-.jpg", "a/x.jpg", "a0.jpg"]
    touch(tmp_path, *wanted)
    folder = ImageFolder(tmp_path)
    names = [os.path.relpath(folder[i], tmp_path) for i in range(len(folder))]
    assert names == wanted == sorted(wanted, key=str.encode)
