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


def names(folder):
    return [os.path.relpath(folder[i], folder.root) for i in range(len(folder))]


@pytest.mark.parametrize(
    "wanted",
    [
        ["B.PNG", "a-1/x.jpg", "a.jpeg", "a/b/c.WebP", "a/z.JPEG", "b.tif", "\u00e9.jpg"],
        # A folder's name is compared with its slash: "a-b", "a.b" come before "a/", "a0" after.
        ["a-b/x.jpg", "a.b.jpg", "a.b/x.jpg", "a/-.jpg", "a/x.jpg", "a0.jpg"],
    ],
)
def test_lists_pictures_below_in_the_order_of_their_bytes(tmp_path, wanted):
    touch(tmp_path, *reversed(wanted), "notes.txt", "jpg", ".hidden.jpg", ".cache/x.jpg")
    folder = ImageFolder(tmp_path)
    assert names(folder) == wanted == sorted(wanted, key=str.encode)
    assert [folder.read(i).decode() for i in range(len(folder))] == wanted
    assert names(pickle.loads(pickle.dumps(folder))) == wanted
    for index in (-1, len(wanted)):
        with pytest.raises(IndexError):
            folder[index]


def test_links_to_folders_are_followed_and_circles_end(tmp_path):
    touch(tmp_path, "elsewhere/x.jpg", "root/y.jpg")
    (tmp_path / "root" / "link").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    (tmp_path / "root" / "up").symlink_to(tmp_path / "root", target_is_directory=True)
    assert names(ImageFolder(tmp_path / "root")) == ["link/x.jpg", "y.jpg"]


def test_a_folder_that_cannot_be_listed_ends_the_start(tmp_path, monkeypatch):
    touch(tmp_path, "a.jpg", "b/c.jpg")
    scandir = os.scandir

    def fails(path):
        if str(path).endswith("b/"):
            raise PermissionError(13, "Permission denied")
        return scandir(path)

    monkeypatch.setattr(os, "scandir", fails)
    with pytest.raises(DataError, match=r"^eval\.root: .*Permission"):
        ImageFolder(tmp_path, where="eval.root")


def test_what_cannot_be_read_is_named(tmp_path, monkeypatch):
    touch(tmp_path, "a.jpg", "b.jpg", "c.jpg")
    (tmp_path / "d.jpg").symlink_to(tmp_path / "gone")
    folder = ImageFolder(tmp_path)
    assert len(folder) == 4  # A link that leads nowhere comes up by its name.
    (tmp_path / "a.jpg").unlink()
    (tmp_path / "b.jpg").unlink()
    os.mkfifo(tmp_path / "b.jpg")  # Reading it would wait for a writer.
    monkeypatch.setattr("fd_large.data.folder.MAX_FILE_BYTES", 4)
    messages = ("No such file", "not a regular file", "a file of 5 bytes", "No such file")
    for index, (name, message) in enumerate(zip("abcd", messages, strict=True)):
        with pytest.raises(DataError, match=rf"{name}\.jpg: .*{message}"):
            folder.read(index)
    assert names(ImageFolder(tmp_path)) == ["c.jpg", "d.jpg"]
