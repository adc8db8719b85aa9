from __future__ import annotations

import io
import os

import pytest

from fd_large import files
from fd_large.data import objects
from fd_large.data.objects import Stored, asked, find
from fd_large.errors import DataError, StorageError


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch):
    monkeypatch.setattr(files, "PAUSES", (0.0, 0.0, 0.0))


@pytest.fixture
def folder(tmp_path):
    for name in ("b.tar", "a/x.TAR", "a/y.txt", ".hidden/z.tar"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(name.encode() * 1000)
    return tmp_path


@pytest.mark.parametrize("scheme", ["", "file://"])
def test_a_folder_is_searched_in_the_order_of_names(folder, scheme):
    found = find(f"{scheme}{folder}", (".tar",), "x")
    assert [stored.url for stored in found] == [
        f"{scheme}{folder}/a/x.TAR",
        f"{scheme}{folder}/b.tar",
    ]


@pytest.mark.parametrize("scheme", ["", "file://"])
def test_patterns(folder, scheme):
    (folder / "c.tar").write_bytes(b"c")
    assert [s.size for s in find(f"{scheme}{folder}/*.tar", (".tar",), "x")] == [5000, 1]
    assert [s.size for s in find(f"{scheme}{folder}/{{c,b}}.tar", (".tar",), "x")] == [1, 5000]
    with pytest.raises(DataError, match=r"^x: .*/b2\.tar"):
        find(f"{scheme}{folder}/b{{2..3}}.tar", (".tar",), "x")


@pytest.mark.parametrize("scheme", ["", "file://"])
def test_ranges_are_those_of_the_file(folder, scheme, monkeypatch):
    monkeypatch.setattr(objects, "RANGE_BYTES", 999)
    (stored,) = find(f"{scheme}{folder}/b.tar", (".tar",), "x")
    content = (folder / "b.tar").read_bytes()
    with stored.open() as file:
        assert file.read() == content
        file.seek(-10, io.SEEK_END)
        assert file.read() == content[-10:]
        file.seek(1234)
        assert file.read(2000) == content[1234:3234]
        assert file.read(0) == b""


@pytest.mark.parametrize("scheme", ["", "file://"])
def test_what_changed_is_not_read(folder, scheme):
    (stored,) = find(f"{scheme}{folder}/b.tar", (".tar",), "x")
    (folder / "b.tar").write_bytes(b"longer" * 2000)
    with pytest.raises(DataError, match=r"b\.tar: .*12000 bytes"):
        stored.open()


class Status(Exception):
    def __init__(self, status):
        super().__init__(f"status {status}")
        self.status = status


@pytest.mark.parametrize(
    "error",
    [
        ConnectionResetError("cut"),
        TimeoutError("slow"),
        OSError(5, "EIO"),
        Status(503),
        Status(429),
    ],
    ids=repr,
)
def test_what_passes_is_asked_again_until_it_is_enough(error):
    tries = []

    def fail(times):
        tries.append(1)
        if len(tries) <= times:
            raise error
        return "answer"

    assert asked("s3://b/x", lambda: fail(3)) == "answer"
    assert len(tries) == 4
    with pytest.raises(StorageError, match=r"s3://b/x: .* 4 times") as info:
        asked("s3://b/x", lambda: fail(100))
    assert info.value.exit_code == 75


@pytest.mark.parametrize(
    "error", [FileNotFoundError("x"), PermissionError("x"), Status(403), ValueError("x")], ids=repr
)
def test_what_does_not_pass_is_final(error):
    tries = []

    def fail():
        tries.append(1)
        raise error

    with pytest.raises(DataError, match="s3://b/x: "):
        asked("s3://b/x", fail)
    assert len(tries) == 1


def test_a_stamp_is_no_path():
    assert Stored("s3://b/x", 1, "").is_remote
    assert not Stored("/a/b://x", 1, "").is_remote


def test_a_pipe_among_the_files_is_refused_by_name(folder):
    os.mkfifo(folder / "c.tar")
    with pytest.raises(DataError, match=r"^x: .*c\.tar"):
        find(str(folder), (".tar",), "x")
